"""Main memory and what limits it, swap, shared memory, locked memory, and the clock."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Final

import psutil

from lorasmith.engine.doctor.check import Check, is_wsl
from lorasmith.engine.hardware import HardwareSnapshot
from lorasmith.engine.storage import readable_size

CONTROL_GROUPS: Final = Path("/sys/fs/cgroup")
LOW_RAM_GIB: Final = 8.0
NO_SWAP_RAM_GIB: Final = 16.0
"""With less than this and no swap, the kernel ends a program while a large base model is loaded."""
SMALL_SHM_MIB: Final = 256
"""A container gets 64 MiB if nobody asks for more."""
CLOCK_SLACK_SECONDS: Final = 86_400.0


def check_memory(machine: HardwareSnapshot) -> Check:
    """There is enough main memory to load a base model; a container's or a service's limit is named."""
    memory = machine.memory
    detail = f"{memory.available_gib:.1f} of {memory.total_gib:.1f} GiB available"
    detail += f" ({_limit()})" if memory.limited else ""
    if memory.available_gib >= LOW_RAM_GIB:
        return Check("memory", "pass", detail)
    meaning = "Large base models may be killed while they load."
    if memory.limited:
        return Check("memory", "warn", detail, "docker run --memory=32g …   # or the service's MemoryMax=", meaning)
    if is_wsl():
        fix = "In %UserProfile%\\.wslconfig: [wsl2] memory=24GB, then: wsl --shutdown"
        return Check("memory", "warn", detail, fix, meaning)
    return Check("memory", "warn", detail, "ps aux --sort=-rss | head   # close what is not needed", meaning)


def _limit() -> str:
    version = "2" if (CONTROL_GROUPS / "cgroup.controllers").exists() else "1"
    return f"limited by a control group, version {version}: a container or service"


def check_swap(machine: HardwareSnapshot) -> Check:
    """There is swap where main memory is small."""
    swap = psutil.swap_memory()
    detail = f"{readable_size(swap.used)} of {readable_size(swap.total)} used" if swap.total else "none"
    if swap.total or machine.memory.limited or machine.memory.total_gib >= NO_SWAP_RAM_GIB:
        return Check("swap", "pass", detail)
    fix = (
        "sudo fallocate -l 16G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"
    )
    if is_wsl():
        fix = "In %UserProfile%\\.wslconfig: [wsl2] swap=16GB, then: wsl --shutdown"
    return Check("swap", "warn", detail, fix, "A base model that does not fit into memory is killed while it loads.")


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:  # noqa: S108  (nothing is written there)
    """Shared memory, through which processes hand tensors to each other, is there and not tiny."""
    name = "shared memory"
    if not folder.is_dir():
        return Check(name, "skip", f"{folder} does not exist here")
    usage = shutil.disk_usage(folder)
    detail = f"{readable_size(usage.free)} of {readable_size(usage.total)} free in {folder}"
    if usage.free >= SMALL_SHM_MIB << 20:
        return Check(name, "pass", detail)
    meaning = "lorasmith needs little of it, but libraries that share tensors between processes fail without."
    return Check(
        name, "warn", detail, f"sudo mount -o remount,size=8G {folder}   # or docker run --shm-size=8g", meaning
    )


def check_locked_memory() -> Check:
    """How much memory a process of this user may lock (`ulimit -l`), which some drivers ask for pinned memory."""
    name = "locked memory"
    try:
        import resource
    except ImportError:
        return Check(name, "skip", "not limited on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check(name, "pass", "no limit")
    more = "" if hard == soft else f", up to {'no limit' if hard == resource.RLIM_INFINITY else readable_size(hard)}"
    return Check(name, "pass", f"{readable_size(soft)}{more} (ulimit -l); whether memory can be pinned is tried above")


def check_clock(now: float | None = None, built: float | None = None) -> Check:
    """The clock is not before this installation was made: a wrong one makes encrypted connections fail."""
    now = time.time() if now is None else now
    built = Path(__file__).stat().st_mtime if built is None else built
    detail = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now >= built - CLOCK_SLACK_SECONDS:
        return Check("clock", "pass", detail)
    late = f"{detail}, before lorasmith was installed ({time.strftime('%Y-%m-%d', time.gmtime(built))})"
    meaning = "Downloads fail with certificate errors, and runs are listed in the wrong order."
    return Check("clock", "warn", late, "sudo timedatectl set-ntp true", meaning)
