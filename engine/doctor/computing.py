"""Trials of torch and the card: real products, attention forward and backward, pinned memory.

These run in a process of their own (`doctor.trials`), on the device that `train.device = "auto"` would take.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any, Final

from lorasmith.engine.doctor.check import Check, reinstall
from lorasmith.engine.doctor.torch_builds import TORCH_PIN, has_code_for, how_to_mend
from lorasmith.engine.hardware import snapshot

PINNED_MIB: Final = 64
_SIDE = 64
_RIGHT = 2.0 * 3.0 * _SIDE


def import_torch() -> Any:
    """Return torch, imported now if it was not yet."""
    return importlib.import_module("torch")


def device_of(torch: Any) -> str:
    """Return the device that trials compute on: the card where torch can use one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def where(device: str) -> str:
    """Return the device in words."""
    return "the graphics card" if device == "cuda" else "the CPU"


def check_torch() -> Check:
    """The installed torch is the pinned one and can be imported."""
    torch = import_torch()
    version = str(torch.__version__)
    if version.partition("+")[0] != TORCH_PIN:
        return Check(
            "torch",
            "warn",
            f"torch {version}; lorasmith is tested with {TORCH_PIN}",
            reinstall(f"torch=={TORCH_PIN}"),
            "Trainings may work, or fail in ways that nobody has seen.",
        )
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Check("torch", "pass", f"torch {version}, {build}")


def check_cuda() -> Check:
    """torch's build has code for the card, proved by a product of two matrices on it."""
    torch = import_torch()
    cuda = torch.version.cuda
    if not cuda:
        return Check("cuda", "skip", "this torch is built without CUDA")
    if not torch.cuda.is_available():
        machine = snapshot()
        if not machine.gpus:
            return Check("cuda", "skip", "no NVIDIA GPU")
        if machine.cuda_driver and machine.cuda_driver[0] < int(cuda.partition(".")[0]):
            return Check("cuda", "skip", "the driver is too old for it")
        fix = "Unset CUDA_VISIBLE_DEVICES, and see that nvidia-smi lists the card."
        return Check("cuda", "fail", f"torch for CUDA {cuda} finds no usable GPU.", fix, "Training cannot start.")
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    architectures = torch.cuda.get_arch_list()
    if not has_code_for(architectures, major, minor):
        return Check(
            "cuda",
            "fail",
            f"torch for CUDA {cuda} has no code for the {name}; it has {', '.join(architectures)}.",
            how_to_mend((major, minor), snapshot().cuda_driver),
            "Every training would end with “no kernel image is available”.",
        )
    if _product(torch, torch.float32, "cuda") != _RIGHT:
        fix = "Update the NVIDIA driver; if it stays, the card or its memory is broken."
        return Check("cuda", "fail", f"The {name} multiplies wrongly.", fix, "Nothing that it trains can be trusted.")
    return Check("cuda", "pass", f"CUDA {cuda} on {name}")


def check_bf16() -> Check:
    """A bf16 product of two matrices is right."""
    torch = import_torch()
    device = device_of(torch)
    if _product(torch, torch.bfloat16, device) != _RIGHT:
        fix = "--set train.precision=fp32"
        return Check("bf16", "fail", f"bf16 gives wrong numbers on {where(device)}.", fix, "Nothing trains in bf16.")
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        meaning = "Trainings take fp16 by themselves, which some base models do not bear as well as bf16."
        return Check("bf16", "warn", "This card computes bf16 slowly.", "--set train.precision=fp16", meaning)
    return Check("bf16", "pass", f"works on {where(device)}")


def check_fp16() -> Check:
    """An fp16 product of two matrices is right, and its gradient too."""
    torch = import_torch()
    device = device_of(torch)
    left = torch.full((_SIDE, _SIDE), 2.0, dtype=torch.float16, device=device, requires_grad=True)
    right = torch.full((_SIDE, _SIDE), 3.0, dtype=torch.float16, device=device)
    product = left @ right
    product.sum().backward()
    if product[0, 0].item() != _RIGHT or left.grad[0, 0].item() != 3.0 * _SIDE:
        fix = "--set train.precision=bf16"
        return Check("fp16", "fail", f"fp16 gives wrong numbers on {where(device)}.", fix, "Nothing trains in fp16.")
    return Check("fp16", "pass", f"works on {where(device)}")


def check_attention() -> Check:
    """Each kernel of scaled dot product attention, with and without a mask, forward and backward."""
    torch = import_torch()
    device = device_of(torch)
    dtype = torch.float16 if device == "cuda" and torch.cuda.get_device_capability() < (8, 0) else torch.bfloat16
    backends = torch.nn.attention.SDPBackend
    names = {"flash": backends.FLASH_ATTENTION, "memory-efficient": backends.EFFICIENT_ATTENTION}
    names |= {"cuDNN": backends.CUDNN_ATTENTION, "math": backends.MATH}
    plain = [name for name, backend in names.items() if _attends(torch, backend, device, dtype, masked=False)]
    masked = [name for name, backend in names.items() if _attends(torch, backend, device, dtype, masked=True)]
    detail = f"{_listed(plain)} on {where(device)}; with masks {_listed(masked)}"
    if not plain:
        return Check("attention", "fail", detail, reinstall(f"torch=={TORCH_PIN}"), "No base model can be trained.")
    if device == "cpu" or (set(plain) - {"math"} and set(masked) - {"math"}):
        return Check("attention", "pass", detail)
    kind = "Base models whose attention has masks take" if set(plain) - {"math"} else "Attention takes"
    meaning = f"{kind} several times the memory and time: only the plain kernel works."
    return Check("attention", "warn", detail, reinstall(f"torch=={TORCH_PIN}"), meaning)


def check_pinned_memory() -> Check:
    """Main memory can be pinned, so that copies to the card run beside its work."""
    torch = import_torch()
    name = "pinned memory"
    if device_of(torch) == "cpu":
        return Check(name, "skip", "only with a graphics card")
    try:
        held = torch.empty(PINNED_MIB << 20, dtype=torch.uint8, pin_memory=True)
        arrived = torch.empty(PINNED_MIB << 20, dtype=torch.uint8, device="cuda")
        held.fill_(7)
        arrived.copy_(held, non_blocking=True)
        right = held.is_pinned() and int(arrived[-1].item()) == 7
    except RuntimeError as error:
        return _not_pinned(f"{PINNED_MIB} MiB were refused: {str(error).splitlines()[0]}")
    return Check(name, "pass", f"{PINNED_MIB} MiB pinned and copied") if right else _not_pinned("the copy was wrong")


def _not_pinned(detail: str) -> Check:
    meaning = "memory.swapped_blocks and memory.offload_activations work, but slowly."
    fix = "ulimit -l unlimited   # in a container: docker run --ulimit memlock=-1"
    return Check("pinned memory", "warn", detail, fix, meaning, optional=True)


def _product(torch: Any, dtype: Any, device: str) -> float:
    left = torch.full((_SIDE, _SIDE), 2.0, dtype=dtype, device=device)
    return float((left @ torch.full((_SIDE, _SIDE), 3.0, dtype=dtype, device=device))[0, 0].item())


def _attends(torch: Any, backend: Any, device: str, dtype: Any, *, masked: bool) -> bool:
    """Tell whether one kernel gives the mean of equal values, and a gradient that is a number."""
    shape = (1, 2, _SIDE, _SIDE)
    query = torch.ones(shape, dtype=dtype, device=device, requires_grad=True)
    mask = torch.ones((1, 1, _SIDE, _SIDE), dtype=torch.bool, device=device) if masked else None
    try:
        with warnings.catch_warnings(), torch.nn.attention.sdpa_kernel([backend]):
            # A kernel that does not suit says why in warnings.
            warnings.simplefilter("ignore")
            result = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
            result.sum().backward()
        return bool((result - 1).abs().max().item() < 0.05) and bool(query.grad.isfinite().all().item())
    except RuntimeError:
        return False


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
