"""Where a training computes and in which number format, and how it shares this process with the screen."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate.utils import get_grad_scaler, is_bf16_available

from lorasmith.engine.config import TrainSettings
from lorasmith.engine.errors import HardwareError, TrainingError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = (
    "lorasmith",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "bitsandbytes",
    "pytorch-optimizer",
)
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_SAME_EACH_TIME = (":4096:8", ":16:8")
"""The two workspaces with which cuBLAS gives the same bits each time, by its manual."""


@dataclass(frozen=True)
class Compute:
    """Where and in which number format the base model works; `label` is for people."""

    device: torch.device
    dtype: torch.dtype
    label: str


@contextlib.contextmanager
def engine_threads() -> Iterator[None]:
    """Leave one core to the screen while training on the CPU, and undo the garbage collector's freeze at the end.

    As many torch threads as cores would let a key press wait 250 ms. The number is the calling thread's own.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores - 1))
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def deterministic_kernels(wanted: bool, on_warning: Callable[[str], None]) -> Iterator[None]:
    """Let torch use only kernels that give the same bits each time while the block runs, where it is `wanted`.

    The switches are the process's own, so they are put back for its next run. cuBLAS reads its workspace when CUDA
    starts: the variable stays set, and where CUDA has started without it `on_warning` is told. Raises TrainingError
    where an operation has no such kernel.
    """
    if not wanted:
        yield
        return
    _fix_cublas_workspace(on_warning)
    cudnn, filling = torch.backends.cudnn, torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        # Fills each new tensor, to make reading it too early repeatable; costs time, and nothing here reads too early.
        filling.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise TrainingError(
            "One operation of this base model has no kernel that gives the same bits each time.",
            why=str(error).partition(". ")[0] + ".",
            fix="Set train.deterministic to false.",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = flags  # type: ignore[attr-defined]


def freeze_garbage() -> None:
    """Take what is loaded out of the garbage collector's sight: a full pass over it stops every thread for 0.3 s."""
    gc.collect()
    gc.freeze()


def choose_compute(settings: TrainSettings) -> Compute:
    """Return the device and number format for `settings`.

    Raises HardwareError where the device is not there or cannot compute in that format.
    """
    device = _choose_device(settings.device)
    precision: str = settings.precision
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16" if _has_fast_bf16(device) else "fp16"
    if precision == "bf16" and not has_bf16(device):
        raise HardwareError(
            f"{torch.cuda.get_device_name(device)} cannot compute in bf16.", fix="Set train.precision to fp16 or fp32."
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Compute(device, DTYPES[precision], f"{name}, {precision}")


# Of accelerate only these two helpers are used: its Accelerator is a singleton of the process, and a process here hosts
# several runs, each with a device and a number format of its own.
def build_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler | None:
    """Return what keeps small fp16 gradients from vanishing: the loss is scaled up, the gradients down; else None."""
    if dtype != torch.float16:
        return None
    # Where there is no GPU at all accelerate returns the scaler of CUDA, switched off.
    scaler: torch.amp.GradScaler = torch.amp.GradScaler("cpu") if device.type == "cpu" else get_grad_scaler()
    return scaler


@functools.cache
def package_versions() -> dict[str, str]:
    """Return the versions of the packages that determine the result of a training."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _fix_cublas_workspace(on_warning: Callable[[str], None]) -> None:
    if os.environ.get(_CUBLAS) in _SAME_EACH_TIME:
        return
    os.environ[_CUBLAS] = _SAME_EACH_TIME[0]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        on_warning(
            "Another run has started the GPU in this process already: train.deterministic may not hold in full. Start "
            f"lorasmith anew for this run, or with {_CUBLAS}={_SAME_EACH_TIME[0]} in its environment."
        )


def _choose_device(wanted: str) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HardwareError(
            f"train.device is {wanted}, but torch sees no NVIDIA GPU.",
            why=f"This torch is {torch.__version__}.",
            fix="Set train.device to cpu, or see what `lorasmith doctor` says about the driver.",
        )
    if wanted in ("auto", "cuda"):
        return torch.device("cuda", 0)
    for index in range(torch.cuda.device_count()):
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        if wanted.removeprefix("GPU-").lower() == uuid.lower():
            return torch.device("cuda", index)
    raise HardwareError(
        f"There is no device {wanted}.", fix="Use auto, cpu, cuda, or a GPU's UUID as `lorasmith doctor` lists it."
    )


def has_bf16(device: torch.device) -> bool:
    """Tell whether `device` can compute in bf16, emulated or not."""
    if device.type == "cpu":
        return True
    # It asks the current GPU.
    with torch.cuda.device(device):
        return bool(is_bf16_available())


def _has_fast_bf16(device: torch.device) -> bool:
    # Before Ampere (8.0) bf16 is emulated, slower than fp16.
    return has_bf16(device) and torch.cuda.get_device_capability(device) >= (8, 0)
