"""Trials of the memory savers' kernels: an 8-bit optimizer's step, packed weights forward and backward, products.

Packed layers are those that a training has (`engine.quantization`). These run in a process of their own
(`doctor.trials`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from lorasmith.engine.doctor.check import Check, reinstall
from lorasmith.engine.doctor.computing import device_of, import_torch, where
from lorasmith.engine.families import Quantization

FP8_CAPABILITY: Final = (8, 9)
"""Cards before Ada (compute capability 8.9) have no fp8 units (NVIDIA Ada GPU architecture whitepaper)."""
INT8_CAPABILITY: Final = (7, 5)
"""Cards before Turing have no int8 tensor cores (NVIDIA Turing GPU architecture whitepaper)."""
TOLERANCE: Final[Mapping[Quantization, float]] = {"nf4": 0.2, "int8": 0.03, "fp8": 0.1}
"""Largest share of its length that a result or gradient may be off: about twice what random weights give."""
_INPUTS, _OUTPUTS, _ROWS = 256, 128, 32
_TIMED_ROWS, _TIMED_SIDE, _TIMED_TURNS = 4608, 3072, 10
"""A layer of FLUX.1 at 1024 pixels: 4096 picture and 512 text tokens, 3072 wide."""


def check_bitsandbytes() -> Check:
    """One real step of 8-bit AdamW moves the weights by its learning rate."""
    torch = import_torch()
    bitsandbytes = _import_bitsandbytes()
    device = device_of(torch)
    # Below 4096 numbers bitsandbytes keeps 32-bit state and the 8-bit code would not run.
    weights = torch.nn.Parameter(torch.ones(8192, device=device))
    weights.grad = torch.ones_like(weights)
    optimizer = bitsandbytes.optim.AdamW8bit([weights], lr=0.01, weight_decay=0.0)
    optimizer.step()
    moved = float((1.0 - weights.detach()).mean())
    if abs(moved - 0.01) > 0.001 or optimizer.state[weights]["state1"].dtype != torch.uint8:
        detail = f"A step of 8-bit AdamW moved the weights by {moved:.4f} instead of 0.01."
        return Check("bitsandbytes", "fail", detail)
    return Check("bitsandbytes", "pass", f"8-bit AdamW works on {where(device)} ({bitsandbytes.__version__})")


def check_nf4() -> Check:
    """A layer packed into 4 bits gives nearly the same product, and a gradient to what came in."""
    # Its own message first: pack_module says what to choose instead.
    _import_bitsandbytes()
    return _try_packed("nf4", "nf4")


def check_int8() -> Check:
    """A layer packed into 8-bit whole numbers gives nearly the same product, and a gradient to what came in."""
    return _try_packed("int8", "int8")


def check_fp8() -> Check:
    """A layer packed into 8-bit floats gives nearly the same product, and a gradient to what came in."""
    return _try_packed("fp8", "fp8")


def check_int8_product() -> Check:
    """Packed 8-bit whole numbers are multiplied as they are, forward and backward."""
    return _try_product("int8", INT8_CAPABILITY)


def check_fp8_product() -> Check:
    """Packed 8-bit floats are multiplied as they are, forward and backward."""
    return _try_product("fp8", FP8_CAPABILITY)


def _try_product(quantization: Quantization, needed: tuple[int, int]) -> Check:
    torch = import_torch()
    name = f"{quantization} product"
    have = torch.cuda.get_device_capability() if device_of(torch) == "cuda" else None
    if have is not None and have < needed:
        detail = "this card has none: compute capability {}.{}, needed {}.{}".format(*have, *needed)
        return Check(name, "skip", detail, meaning=f"memory.quantized_matmul cannot be chosen with {quantization}.")
    check = _try_packed(name, quantization, product=True)
    if check.status != "pass" or have is None:
        return check
    speedup = _speedup(quantization)
    words = f"{speedup:.1f} times as fast as widening the weights"
    return replace(check, detail=f"{check.detail}; {words}", speedup=round(speedup, 2))


def _speedup(quantization: Quantization) -> float:
    """Return how many times as fast a layer of a usual size is, forward and backward, that multiplies in 8 bits.

    Only on a card: its own clock is read, so that nothing else of the process counts.
    """
    torch = import_torch()
    device = torch.device(device_of(torch))
    came_in = torch.randn(_TIMED_ROWS, _TIMED_SIDE, dtype=torch.bfloat16, device=device, requires_grad=True)
    return _milliseconds(quantization, came_in, product=False) / _milliseconds(quantization, came_in, product=True)


def _milliseconds(quantization: Quantization, came_in: Any, *, product: bool) -> float:
    """Return the time of a packed layer's forward and backward, the mean of several after two to warm up."""
    torch = import_torch()
    from lorasmith.engine.quantization import pack_module

    layer = torch.nn.Linear(_TIMED_SIDE, _TIMED_SIDE, bias=False, dtype=torch.bfloat16)
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.ModuleList([layer])])}).requires_grad_(False)
    pack_module(model, came_in.device, quantization, quantized_matmul=product)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for turn in range(_TIMED_TURNS + 2):
        if turn == 2:
            begin.record()
        model["blocks"][0][0](came_in).sum().backward()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / _TIMED_TURNS


def _try_packed(name: str, quantization: Quantization, *, product: bool = False) -> Check:
    """Pack a layer of random weights, and compare its result and its input's gradient with those of the layer."""
    torch = import_torch()
    device = device_of(torch)
    from lorasmith.engine.quantization import pack_module

    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(_OUTPUTS, _INPUTS, generator=draw).to(torch.bfloat16)
    came_in = torch.randn(_ROWS, _INPUTS, generator=draw).to(torch.bfloat16).to(device).requires_grad_(True)
    block = torch.nn.ModuleList([torch.nn.Linear(_INPUTS, _OUTPUTS, bias=False, dtype=torch.bfloat16)])
    block[0].weight.data.copy_(weight)
    # Layers of numbered blocks are packed.
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([block])}).requires_grad_(False)
    if pack_module(model, torch.device(device), quantization, quantized_matmul=product) != 1:
        return Check(name, "fail", "The layer was not packed.")
    result = model["blocks"][0][0](came_in)
    result.float().square().sum().backward()
    right = came_in.detach().float() @ weight.to(device).float().t()
    gradient = 2 * right @ weight.to(device).float()
    off = max(_apart(result.detach(), right), _apart(came_in.grad, gradient))
    if not off < TOLERANCE[quantization]:
        return Check(name, "fail", f"A layer in {quantization} is {off:.0%} off on {where(device)}.")
    return Check(name, "pass", f"works on {where(device)} (rounding changes {off:.1%})")


def _apart(found: Any, right: Any) -> float:
    """Return the length of the difference over the length of what is right."""
    return float(((found.float() - right).norm() / right.norm()).item())


def _import_bitsandbytes() -> Any:
    # It tells its missing CPU kernels to stderr, over whatever is on the screen.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module("bitsandbytes")


def reinstall_bitsandbytes() -> str:
    """Return the command that installs bitsandbytes anew, in a version that lorasmith was tested with."""
    from packaging.requirements import Requirement

    found = [Requirement(line) for line in importlib.metadata.requires("lorasmith") or []]
    return reinstall(
        next((f"{each.name}{each.specifier}" for each in found if each.name == "bitsandbytes"), "bitsandbytes")
    )
