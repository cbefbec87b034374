"""What the driver says, without torch: the cards, the driver against torch's build, and who holds their memory."""

from __future__ import annotations

import os
from typing import Final

import psutil

from lorasmith.engine.doctor.check import Check, is_wsl
from lorasmith.engine.doctor.torch_builds import MINIMUM_DRIVERS, how_to_mend
from lorasmith.engine.hardware import Gpu, GpuProcess, HardwareSnapshot, torch_build

HELD_GIB: Final = 1.0
"""More than this in other programs' hands is worth telling: a desktop without a browser takes less."""
_DESKTOP: Final = ("Xorg", "Xwayland", "gnome-shell", "kwin_wayland", "kwin_x11", "plasmashell", "sway", "Hyprland")
"""Without these the screen is gone."""


def check_gpu(machine: HardwareSnapshot) -> Check:
    """There is an NVIDIA GPU and its driver answers."""
    if not machine.gpus:
        fix = "nvidia-smi   # must list the card, if there is one"
        if is_wsl():
            fix = "Install the NVIDIA driver in Windows, not in WSL, then: wsl --shutdown"
        meaning = "Trainings run on the CPU: enough for the demo, not for a large base model."
        return Check("gpu", "warn", machine.note or "No NVIDIA GPU was found.", fix, meaning)
    words = []
    for gpu in machine.gpus:
        free = f", {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free" if gpu.free_gib and gpu.total_gib else ""
        words.append(f"{gpu.name}{free} ({gpu.uuid})")
    detail = "; ".join(words)
    if machine.note:
        meaning = "The other cards can be used."
        return Check("gpu", "warn", f"{detail}. {machine.note}", "sudo reboot", meaning)
    return Check("gpu", "pass", detail)


def check_driver(machine: HardwareSnapshot) -> Check:
    """The driver is new enough for the CUDA version that the installed torch is built for. Torch-free."""
    build = torch_build()
    if not machine.gpus:
        return Check("driver", "skip", "no NVIDIA GPU")
    gpu = machine.gpus[0]
    mend = how_to_mend(gpu.compute_capability, machine.cuda_driver)
    if build is None or build.cuda is None:
        detail = f"There is a GPU, but torch {build.version if build else ''} cannot use it.".replace("  ", " ")
        return Check("driver", "fail", detail, mend, "Trainings would run on the CPU, a hundred times slower.")
    driver = f"driver {gpu.driver}" if gpu.driver else "the driver"
    if machine.cuda_driver is None:
        return Check("driver", "warn", f"{driver} does not say which CUDA it runs", "nvidia-smi", "It may be too old.")
    have = ".".join(map(str, machine.cuda_driver))
    wanted = int(build.cuda.partition(".")[0])
    if machine.cuda_driver[0] < wanted:
        minimum = MINIMUM_DRIVERS.get(wanted)
        needed = f" and needs driver {minimum} or newer" if minimum else ""
        place = " of Windows" if is_wsl() else ""
        detail = f"torch is built for CUDA {build.cuda}{needed}; {driver}{place} runs up to CUDA {have}."
        return Check("driver", "fail", detail, mend, "Every training would end when it first uses the card.")
    return Check("driver", "pass", f"{driver} runs up to CUDA {have}, torch needs {build.cuda}")


def check_vram(machine: HardwareSnapshot) -> Check:
    """The cards' memory is free; who holds it is named, without this process."""
    known = [gpu for gpu in machine.gpus if gpu.used_gib is not None]
    if not known:
        return Check("vram", "skip", "no NVIDIA GPU" if not machine.gpus else "the driver does not tell")
    words = [_occupancy(gpu) for gpu in known]
    crowded = [gpu for gpu in known if (gpu.used_gib or 0.0) > HELD_GIB]
    if not crowded:
        return Check("vram", "pass", "; ".join(words))
    held = max(gpu.used_gib or 0.0 for gpu in crowded)
    large = [process for gpu in crowded for process in gpu.processes if _may_be_ended(process)]
    names = ", ".join(str(process.name) for process in large)
    pids = " ".join(str(process.pid) for process in large)
    fix = f"kill {pids}   # {names}: if it is yours and no longer needed" if large else "nvidia-smi"
    meaning = f"{held:.1f} GiB less for training; what fits is reckoned with what is free now."
    return Check("vram", "warn", "; ".join(words), fix, meaning)


def _may_be_ended(process: GpuProcess) -> bool:
    large = process.used_gib is None or process.used_gib > HELD_GIB
    return large and process.name is not None and process.name not in _DESKTOP and _is_own(process.pid)


def _is_own(pid: int) -> bool:
    """Tell whether a process is this user's; the first one of a container or machine is nobody's."""
    try:
        return pid > 1 and psutil.Process(pid).uids().real == os.getuid()
    except (psutil.Error, AttributeError):
        return False


def _occupancy(gpu: Gpu) -> str:
    used, total = gpu.used_gib or 0.0, gpu.total_gib or 0.0
    holders = ", ".join(_holder(process) for process in gpu.processes)
    by = f" by {holders}" if holders else ""
    return f"{gpu.name}: {total - used:.1f} of {total:.1f} GiB free, {used:.1f} held{by}"


def _holder(process: GpuProcess) -> str:
    size = "" if process.used_gib is None else f" {process.used_gib:.1f} GiB"
    return f"{process.name or 'a process outside this container'} ({process.pid}){size}"
