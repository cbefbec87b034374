"""Products of 8-bit numbers, for `memory.quantized_matmul`.

Inputs and gradients are brought to 8 bits row by row as they come; torch multiplies (int8 with exact sums in 32 bits,
fp8 with sums in fp32), and the result is scaled back in fp32. The weight is never widened.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lorasmith.engine.errors import HardwareError
from lorasmith.engine.quantization.codecs import scale_rows

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_ROWS, _INT8_STEP, _FP8_STEP = 17, 8, 16
"""Fewest rows, and what the other sides must be multiples of, for cuBLASLt (torch._int_mm, torch._scaled_mm)."""


def can_multiply(x: Tensor, weight: Tensor) -> bool:
    """Tell whether the shapes of x (…, k) and a weight (n, k) of 8 bits suit torch's products of 8-bit numbers."""
    step = _INT8_STEP if weight.dtype == torch.int8 else _FP8_STEP
    return x.numel() // x.shape[-1] >= _ROWS and weight.shape[0] % step == 0 and weight.shape[1] % step == 0


def multiply(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Return x (…, in) times the weight (out, in) that `values` and the `scales` of its rows are: (…, out)."""
    rows, row_scales = _rounded(x.reshape(-1, x.shape[-1]), values.dtype)
    sums = _product(rows, values.T)
    return _scaled(sums, row_scales, scales.view(1, -1), x)


def multiply_back(gradient: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Return gradient (…, out) times the weight (out, in): the gradient of the input (…, in)."""
    # The weight's scales lie along what is summed over, so they go into the gradient before it is rounded.
    rows, row_scales = _rounded(gradient.reshape(-1, gradient.shape[-1]) * scales.view(1, -1), values.dtype)
    if values.dtype != torch.int8:
        # fp8 products read the second matrix by columns only.
        values = values.T.contiguous().T
    return _scaled(_product(rows, values), row_scales, None, gradient)


@cache
def has_products(quantization: str, device: torch.device) -> bool:
    """Tell whether `device` multiplies numbers of this format: int8 everywhere, fp8 from compute capability 8.9 on."""
    if quantization != "fp8" or device.type == "meta":
        return quantization != "nf4"
    numbers = torch.ones(32, 32, device=device).to(torch.float8_e4m3fn)
    try:
        _product(numbers, numbers.T)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def require_products(quantization: str, device: torch.device) -> None:
    """Raise HardwareError where `device` cannot multiply numbers of this format as they are."""
    if quantization == "fp8" and not has_products(quantization, device):
        raise HardwareError(
            "memory.quantized_matmul cannot be used with fp8 on this card.",
            why="It keeps fp8 numbers but does not multiply them; cards from the RTX 40 series on do.",
            fix="Set memory.quantized_matmul to false, or memory.quantize to int8.",
        )


def _rounded(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scaled, scales = scale_rows(rows, _LARGEST[dtype])
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scales


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    if rows.dtype == torch.int8:
        sums: Tensor = torch._int_mm(rows, columns)
        return sums
    one = torch.ones((), dtype=torch.float32, device=rows.device)
    # bf16 has the range of fp32: sums of products up to 448² leave that of fp16.
    return torch._scaled_mm(rows, columns, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _scaled(sums: Tensor, row_scales: Tensor, column_scales: Tensor | None, like: Tensor) -> Tensor:
    """Return the sums (rows, n) with their scales, in the format and with the leading sizes of `like` (…, k)."""
    scaled = sums * row_scales
    if column_scales is not None:
        scaled = scaled.mul_(column_scales)
    return scaled.to(like.dtype).view(*like.shape[:-1], -1)
