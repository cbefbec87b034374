"""The number formats that a frozen weight is kept in: how it is packed into plain tensors, and widened again.

int8 and fp8 (e4m3, 3 bits of fraction) have one fp32 scale for each output, its largest weight over the largest number
of the format. nf4 is bitsandbytes': 16 values that a normal distribution is cut into, a scale for each 64 weights,
itself in 8 bits. Widening multiplies in fp32 and rounds once, to the format that is computed in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from lorasmith.engine.errors import HardwareError
from lorasmith.engine.quantization import BLOCK, SCALE_BLOCK

_PIECE = 1 << 20
"""Weights that are packed at once, so that what packing needs beside the weight is small: 4 bytes for each."""
_CPU_PIECE = 1 << 18
"""The same for nf4 on the processor, where bitsandbytes takes 64 bytes for each; on a card it takes none."""
_INT8, _FP8 = 127.0, 448.0
"""The largest numbers of the formats."""

Packed = tuple[Tensor, ...]


class Codec(Protocol):
    """A number format; `names` are those of the tensors that `pack` returns."""

    names: tuple[str, ...]

    def pack(self, weight: Tensor) -> Packed:
        """Return a weight (out, in) of 16 or 32 bits as tensors on the same device."""

    def widen(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) as a new tensor of `dtype`."""


class RowScaled:
    """int8 and fp8: `values` (out, in) and fp32 `scales` (out, 1)."""

    names: tuple[str, ...] = ("packed_values", "packed_scales")

    def __init__(self, dtype: torch.dtype, largest: float) -> None:
        """Keep values as `dtype`, whose largest number is `largest`."""
        self.dtype, self.largest = dtype, largest

    def pack(self, weight: Tensor) -> Packed:
        """Return values and scales; a row of zeros stays zero."""
        values = torch.empty(weight.shape, dtype=self.dtype, device=weight.device)
        scales = torch.empty((len(weight), 1), dtype=torch.float32, device=weight.device)
        for rows in _pieces(weight):
            scaled, scales[rows] = scale_rows(weight[rows], self.largest)
            # Rounded by itself for fp8; int8 would cut off.
            values[rows] = scaled.round_() if self.dtype == torch.int8 else scaled
        return values, scales

    def widen(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return values times scales; every value is exact in 16 bits."""
        values, scales = packed
        return values.to(dtype).mul_(scales)


class NormalFloat:
    """nf4: values, two weights a byte, 8-bit scales, their own fp32 scales and mean, and what the 8 bits stand for."""

    names: tuple[str, ...] = ("packed_values", "packed_scales", "packed_scale_scales", "packed_mean", "packed_code")

    def pack(self, weight: Tensor) -> Packed:
        """Return what bitsandbytes' quantize_4bit(compress_statistics=True) returns, packed piece by piece."""
        functional = bitsandbytes()
        values, scales = [], []
        at_once = _CPU_PIECE if weight.device.type == "cpu" else weight.numel()
        for piece in torch.split(weight.detach().contiguous().view(-1), at_once):
            packed, largest = torch.ops.bitsandbytes.quantize_4bit(piece, BLOCK, "nf4", torch.uint8)
            values.append(packed.view(-1))
            scales.append(largest.float().view(-1))
        largest = torch.cat(scales)
        mean = largest.mean()
        code = _dynamic_code().to(weight.device, copy=True)
        scales_8bit, state = functional.quantize_blockwise(largest - mean, code=code, blocksize=SCALE_BLOCK)
        return torch.cat(values), scales_8bit, state.absmax, mean, code

    def widen(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return what bitsandbytes' dequantize_4bit returns."""
        values, scales, scale_scales, mean, code = packed
        operations = torch.ops.bitsandbytes
        largest = operations.dequantize_blockwise(scales, scale_scales, code, SCALE_BLOCK, torch.float32) + mean
        # As one long row: blocks go over the ends of rows, which not every kernel expects.
        count = shape[0] * shape[1]
        flat: Tensor = operations.dequantize_4bit(values, largest, BLOCK, "nf4", (count,), dtype)
        return flat.view(shape)


CODECS: dict[str, Codec] = {
    "int8": RowScaled(torch.int8, _INT8),
    "fp8": RowScaled(torch.float8_e4m3fn, _FP8),
    "nf4": NormalFloat(),
}


def scale_rows(rows: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Return rows (n, k) stretched in fp32 so that the largest number of each is ±`largest`, and the scales (n, 1)."""
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    size = torch.maximum(-low, high).float()
    scales = torch.where(size > 0, size / largest, 1.0)
    # Rounding up could leave the format's range.
    return (rows / scales).clamp_(-largest, largest), scales


@cache
def _dynamic_code() -> Tensor:
    """Return the 256 numbers (256,) that bitsandbytes' 8-bit blocks are made of; making them takes 20 ms."""
    code: Tensor = bitsandbytes().create_dynamic_map()
    return code


@cache
def bitsandbytes() -> Any:
    """Return bitsandbytes.functional; raises HardwareError where it cannot be used."""
    # It complains at its first import on a machine without a GPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except Exception as error:  # a broken installation raises whatever its native library meets
        raise HardwareError(
            "memory.quantize = nf4 needs bitsandbytes, which does not work here.",
            why=f"{type(error).__name__}: {error}"[:300],
            fix="Set memory.quantize (or memory.quantize_text_encoders) to fp8 or int8, which need no other package.",
        ) from error
    return functional


def _pieces(weight: Tensor) -> Iterator[slice]:
    rows = max(1, _PIECE // max(1, weight.shape[1]))
    for first in range(0, len(weight), rows):
        yield slice(first, first + rows)
