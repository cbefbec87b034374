"""What this machine has: GPUs, memory, disk, without torch; gauges once a second; and the choice of the device."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from lorasmith.engine.errors import HardwareError
from lorasmith.engine.events import HardwareSampled
from lorasmith.engine.nvml import GIB, READ_SECONDS, Gpu, GpuProcess, GpuReader, GpuReading
from lorasmith.engine.storage import nearest_existing

__all__ = [
    "Disk",
    "Gpu",
    "GpuProcess",
    "GpuReader",
    "GpuReading",
    "HardwareSnapshot",
    "Memory",
    "Sampler",
    "TorchBuild",
    "gauges",
    "gpu_for",
    "read_memory",
    "resolve_device",
    "snapshot",
    "torch_build",
]

SAMPLE_SECONDS = 1.0
_gpus = GpuReader()
logger = logging.getLogger("lorasmith.hardware")


@dataclass(frozen=True)
class Memory:
    """System memory for this process in GiB; `limited` where a container or a service limit makes it smaller."""

    total_gib: float
    available_gib: float
    limited: bool = False

    @property
    def used_gib(self) -> float:
        """Memory that is taken."""
        return self.total_gib - self.available_gib


@dataclass(frozen=True)
class Disk:
    """The disk on which `path` lies or would be made; None where it does not tell."""

    path: Path
    total_gib: float | None
    free_gib: float | None


@dataclass(frozen=True)
class HardwareSnapshot:
    """The machine at one moment; `note` says in a sentence why GPUs or their values are missing."""

    gpus: tuple[Gpu, ...]
    note: str
    cuda_driver: tuple[int, int] | None
    memory: Memory
    disks: tuple[Disk, ...]
    cpu: str
    cores: int


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch, read from its files without importing it; `cuda` is None in a build without GPU support."""

    version: str
    cuda: str | None


def snapshot(folders: Iterable[Path] = (), timeout: float = READ_SECONDS) -> HardwareSnapshot:
    """Return what the machine has, and the disks of `folders`; never raises, and waits for no driver longer than told.

    `timeout` is in seconds.
    """
    reading = _gpus.read(timeout)
    disks = tuple(_disk(folder) for folder in folders)
    return HardwareSnapshot(
        reading.gpus, reading.note, reading.cuda_driver, read_memory(), disks, _cpu_name(), _cores()
    )


def gauges(reading: GpuReading, device: str = "auto") -> HardwareSampled:
    """Return `reading` and the memory as an event, of the GPU in use: `device` as `resolve_device` understands it."""
    gpu = None if device == "cpu" else _gpu_in_use(reading.gpus, device)
    memory = read_memory()
    return HardwareSampled(
        vram_used_gib=gpu.used_gib if gpu else None,
        vram_total_gib=gpu.total_gib if gpu else None,
        gpu_utilization_percent=gpu.utilization_percent if gpu else None,
        temperature_c=gpu.temperature_c if gpu else None,
        power_w=gpu.power_w if gpu else None,
        ram_used_gib=memory.used_gib,
        ram_total_gib=memory.total_gib,
        process_ram_gib=psutil.Process().memory_info().rss / GIB,
        note="" if device == "cpu" else reading.note,
    )


class Sampler:
    """Calls `callback` with the gauges about once a second from a thread of its own, until stopped."""

    def __init__(
        self,
        callback: Callable[[HardwareSampled], None],
        *,
        device: str = "auto",
        seconds: float = SAMPLE_SECONDS,
        reader: GpuReader | None = None,
    ) -> None:
        self._callback = callback
        self._device = device
        self._seconds = seconds
        self._reader = reader or _gpus
        self._stopping = threading.Event()
        self._failed = False
        # A daemon, since nothing is lost with it and a hanging driver must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="hardware", daemon=True)

    def start(self) -> None:
        """Take the first sample now and one each second from here on."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, waiting for it only briefly; does nothing before `start`."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(self._seconds)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                sample = gauges(self._reader.read(self._seconds), self._device)
                if not self._stopping.is_set():
                    self._callback(sample)
            except Exception:
                # No descriptor or no thread is left, for example: the next second may be better.
                if not self._failed:
                    logger.exception("the gauges cannot be read")
                self._failed = True
            self._stopping.wait(self._seconds)


def read_memory(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Memory:
    """Return the machine's memory, or that of the tightest control group around this process (versions 1 and 2)."""
    machine = psutil.virtual_memory()
    total, available = float(machine.total), float(machine.available)
    limited = False
    for limit, used in _memory_limits(root, membership):
        if limit < total:
            limited, total = True, limit
        available = min(available, max(0.0, limit - used))
    return Memory(total / GIB, available / GIB, limited)


def resolve_device(setting: str) -> str:
    """Return `cuda` or `cpu` for the setting `train.device`, and make a chosen GPU the only one that torch will see.

    Call it before torch first uses a GPU. `auto` takes the GPU with the most free memory, or the CPU where there is
    none; CUDA_VISIBLE_DEVICES as the user set it is respected. Raises HardwareError where the asked GPU is not there.
    """
    if setting == "cpu":
        return "cpu"
    build = torch_build()
    if setting == "auto" and (build is None or build.cuda is None):
        return "cpu"
    if build is not None and build.cuda is None:
        raise HardwareError(
            f"train.device is {setting}, but the installed torch {build.version} cannot use a GPU.",
            fix="Install torch's CUDA build, or set train.device to auto or cpu.",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting in ("auto", "cuda") and visible is not None:
        return _respect_visible(setting, visible)
    reading = _gpus.read()
    if setting in ("auto", "cuda"):
        return _take_freest(setting, reading)
    return _take_named(setting, reading)


def torch_build() -> TorchBuild | None:
    """Return which torch is installed, without importing it; None where there is none."""
    spec = importlib.util.find_spec("torch") if "torch" not in sys.modules else sys.modules["torch"].__spec__
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return None
    version = re.search(r"^__version__ = ['\"](.+)['\"]", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*= ['\"](.+)['\"]", text, re.MULTILINE)
    return TorchBuild(version.group(1) if version else "unknown", cuda.group(1) if cuda else None)


def _respect_visible(setting: str, visible: str) -> str:
    if visible.strip() not in ("", "-1"):
        return "cuda"
    if setting == "auto":
        return "cpu"
    raise HardwareError(
        "train.device is cuda, but CUDA_VISIBLE_DEVICES hides every GPU.", fix="Unset CUDA_VISIBLE_DEVICES."
    )


def gpu_for(gpus: tuple[Gpu, ...], setting: str) -> Gpu | None:
    """Return the GPU that a run with this `train.device` would take, as `resolve_device` does; None for the CPU."""
    if setting == "cpu" or not gpus:
        return None
    if setting not in ("auto", "cuda"):
        return _gpu_in_use(gpus, setting)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _freest(gpus)
    return None if visible.strip() in ("", "-1") else _gpu_in_use(gpus, setting)


def _freest(gpus: tuple[Gpu, ...]) -> Gpu:
    return max(gpus, key=lambda gpu: (gpu.free_gib or 0.0, -gpu.index))


def _take_freest(setting: str, reading: GpuReading) -> str:
    if reading.gpus:
        _show_only(_freest(reading.gpus).uuid)
        return "cuda"
    # A container may have the GPU without its management library, so its device file decides.
    if setting == "cuda" or any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")):
        return "cuda"
    return "cpu"


def _take_named(setting: str, reading: GpuReading) -> str:
    if setting.startswith("MIG-"):
        # A slice of a GPU: NVML lists it under its GPU only, CUDA takes it by this name.
        _show_only(setting)
        return "cuda"
    for gpu in reading.gpus:
        if gpu.uuid.lower() == setting.lower():
            _show_only(gpu.uuid)
            return "cuda"
    known = ", ".join(f"{gpu.uuid} ({gpu.name})" for gpu in reading.gpus)
    raise HardwareError(
        f"train.device is {setting}, which is no GPU of this machine.",
        why=f"It has {known}." if known else reading.note,
        fix="Set train.device to auto, cpu, cuda, or one of the GPUs that `lorasmith doctor` lists.",
    )


def _show_only(uuid: str) -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and os.environ.get("CUDA_VISIBLE_DEVICES") != uuid:
        raise HardwareError(
            f"This process already uses another GPU than {uuid}.",
            why="The GPU is fixed when it is first used.",
            fix="Start lorasmith again.",
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = uuid


def _gpu_in_use(gpus: tuple[Gpu, ...], device: str) -> Gpu | None:
    wanted = device if device not in ("auto", "cuda") else os.environ.get("CUDA_VISIBLE_DEVICES", "")
    first = wanted.split(",")[0].strip().lower()
    if not first:
        return gpus[0] if gpus else None
    if first.isdigit():
        return next((gpu for gpu in gpus if gpu.index == int(first)), None)
    return next((gpu for gpu in gpus if gpu.uuid.lower().startswith(first)), None)


def _memory_limits(root: Path, membership: Path) -> Iterable[tuple[float, float]]:
    """Yield (limit, used) in bytes of each control group from this process's own up to the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            yield from _group_limits(root, group, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _group_limits(root / "memory", group, *names)


def _group_limits(
    root: Path, group: str, limit_name: str, used_name: str, reclaimable: str
) -> Iterable[tuple[float, float]]:
    folder = root / group.strip("/")
    for place in (folder, *folder.parents):
        if not place.is_relative_to(root):
            return
        try:
            limit, used = float((place / limit_name).read_text()), float((place / used_name).read_text())
            # The page cache of files counts as used until it is needed; saves would look like a leak.
            used -= _stat(place / "memory.stat", reclaimable)
        except (OSError, ValueError):
            # "max", or a group of the host that a container does not see.
            continue
        yield limit, used


def _stat(path: Path, name: str) -> float:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return float(value)
    return 0.0


def _disk(path: Path) -> Disk:
    try:
        usage = shutil.disk_usage(nearest_existing(path))
    except OSError:
        return Disk(path, None, None)
    return Disk(path, usage.total / GIB, usage.free / GIB)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return "CPU"
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else "CPU"
