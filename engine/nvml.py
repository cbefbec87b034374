"""What NVIDIA's management library says about the GPUs, with every way in which it fails as a normal case.

No library, no driver, a driver that was updated under a running system, a GPU that falls off the bus and a call that
never returns: each becomes a sentence in `GpuReading.note`, and whatever can still be read is read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pynvml

GIB = 1 << 30
INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO in Linux
READ_SECONDS = 3.0
T = TypeVar("T")


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes or draws on a GPU; None where the driver or the rights do not tell."""

    pid: int
    used_gib: float | None
    name: str | None


@dataclass(frozen=True)
class Gpu:
    """One GPU now; None where it does not tell. `index` is NVML's, which need not be CUDA's: choose by `uuid`."""

    uuid: str
    index: int
    name: str
    total_gib: float | None
    free_gib: float | None
    compute_capability: tuple[int, int] | None
    driver: str | None
    utilization_percent: float | None
    temperature_c: float | None
    power_w: float | None
    processes: tuple[GpuProcess, ...]

    @property
    def used_gib(self) -> float | None:
        """Memory that is taken, by whatever process."""
        return None if self.total_gib is None or self.free_gib is None else self.total_gib - self.free_gib


@dataclass(frozen=True)
class GpuReading:
    """All GPUs at one moment; `note` says in a sentence what is missing, e.g. "No NVIDIA driver was found."

    `cuda_driver` is the newest CUDA version that the driver runs, as (major, minor).
    """

    gpus: tuple[Gpu, ...] = ()
    note: str = ""
    cuda_driver: tuple[int, int] | None = None


class GpuReader:
    """Reads the GPUs, each time in a thread of its own, since a call into a sick driver may never return."""

    def __init__(self) -> None:
        self._reading = threading.Lock()
        self._pending: threading.Thread | None = None
        self._asked_at = 0.0
        self._answer = GpuReading()
        self._started = False
        self._known: dict[int, Gpu] = {}
        self._lost_since: dict[int, float] = {}
        self._failing_since: float | None = None

    def read(self, timeout: float = READ_SECONDS) -> GpuReading:
        """Return what the GPUs say, waiting at most `timeout` seconds; at once while an earlier call still hangs.

        Never raises.
        """
        with self._reading:
            if self._pending is not None and self._pending.is_alive():
                timeout = 0.0
            else:
                self._asked_at = time.time()
                self._pending = _start(self._read_into_answer)
            if self._pending is None:
                return GpuReading((), "The GPUs cannot be read: this process may start no more threads.")
            self._pending.join(timeout)
            if self._pending.is_alive():
                return GpuReading((), f"The GPU readings were lost at {_clock(self._asked_at)}: the driver hangs.")
            return self._answer

    def _read_into_answer(self) -> None:
        try:
            self._answer = self._read_now()
            self._failing_since = None
        except pynvml.NVMLError as error:
            self._answer = GpuReading((), self._failed(_explain(error)))
        except Exception as error:
            self._answer = GpuReading((), self._failed(f"The GPUs cannot be read: {type(error).__name__}: {error}."))

    def _failed(self, sentence: str) -> str:
        self._failing_since = self._failing_since or time.time()
        # On a machine that never had a GPU nothing was lost.
        return f"The GPU readings were lost at {_clock(self._failing_since)}. {sentence}" if self._known else sentence

    def _read_now(self) -> GpuReading:
        if not self._started:
            pynvml.nvmlInit()
            self._started = True
        try:
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            # Start anew next time: the library answers "uninitialized" for ever after some driver failures.
            self._started = error.value != pynvml.NVML_ERROR_UNINITIALIZED
            raise
        driver = _optional(pynvml.nvmlSystemGetDriverVersion)
        gpus, notes = [], []
        for index in range(count):
            gpu, note = self._read_gpu(index, driver)
            gpus += [gpu] if gpu else []
            notes += [note] if note else []
        if not count:
            notes.append("There is a driver, but no NVIDIA GPU.")
        return GpuReading(tuple(gpus), " ".join(notes), _cuda_version())

    def _read_gpu(self, index: int, driver: str | None) -> tuple[Gpu | None, str]:
        try:
            gpu = _query(index, driver)
        except pynvml.NVMLError as error:
            since = self._lost_since.setdefault(index, time.time())
            known = self._known.get(index)
            if known is None:
                return None, f"GPU {index} cannot be read. {_explain(error)}"
            return None, f"GPU {index} ({known.name}) was lost at {_clock(since)}. {_explain(error)}"
        self._known[index] = gpu
        self._lost_since.pop(index, None)
        return gpu, ""


def _start(work: Callable[[], None]) -> threading.Thread | None:
    thread = threading.Thread(target=work, name="nvml", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def _query(index: int, driver: str | None) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    uuid = pynvml.nvmlDeviceGetUUID(handle)
    memory = _optional(_memory, handle)
    power = _optional(pynvml.nvmlDeviceGetPowerUsage, handle)
    utilization = _optional(pynvml.nvmlDeviceGetUtilizationRates, handle)
    drawing = _optional(pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3, handle) or []
    computing = _optional(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle) or []
    # One that does both is in both lists.
    processes = {process.pid: process for process in (*drawing, *computing)}
    return Gpu(
        uuid=uuid,
        index=index,
        name=_optional(pynvml.nvmlDeviceGetName, handle) or "NVIDIA GPU",
        total_gib=memory.total / GIB if memory else None,
        free_gib=memory.free / GIB if memory else None,
        compute_capability=_optional(pynvml.nvmlDeviceGetCudaComputeCapability, handle),
        driver=driver,
        utilization_percent=float(utilization.gpu) if utilization else None,
        temperature_c=_optional(_temperature, handle),
        power_w=power / 1000 if power is not None else None,
        processes=tuple(_process(process) for process in processes.values()),
    )


def _memory(handle: Any) -> Any:
    try:
        # Version 2 keeps what the driver reserves apart from what programs use.
        return pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except pynvml.NVMLError as error:
        if error.value not in (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_NOT_SUPPORTED):
            raise
        return pynvml.nvmlDeviceGetMemoryInfo(handle)


def _temperature(handle: Any) -> float:
    try:
        return float(pynvml.nvmlDeviceGetTemperatureV(handle, pynvml.NVML_TEMPERATURE_GPU))
    except pynvml.NVMLError as error:
        if error.value not in (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_NOT_SUPPORTED):
            raise
        return float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))


def _process(process: Any) -> GpuProcess:
    used = process.usedGpuMemory
    return GpuProcess(process.pid, None if used is None else used / GIB, _process_name(process.pid))


def _process_name(pid: int) -> str | None:
    try:
        # Inside a container NVML's numbers are the machine's: here they may belong to some other process.
        if Path("/proc/self/ns/pid").stat().st_ino != INITIAL_PID_NAMESPACE:
            return None
        return str(psutil.Process(pid).name())
    except (OSError, psutil.Error):
        return None


def _optional(call: Callable[..., T], *arguments: Any) -> T | None:
    """Return what `call` says, or None where this GPU, driver or user cannot have it; a lost GPU still raises."""
    try:
        return call(*arguments)
    except pynvml.NVMLError as error:
        if error.value in (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNINITIALIZED):
            raise
        return None


def _cuda_version() -> tuple[int, int] | None:
    version = _optional(pynvml.nvmlSystemGetCudaDriverVersion_v2)
    return None if version is None else (version // 1000, version % 1000 // 10)


def _explain(error: Any) -> str:
    sentences = {
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "No NVIDIA driver was found (libnvidia-ml.so.1 is missing).",
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "The NVIDIA driver is not loaded; restart the machine.",
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "The NVIDIA driver was updated while in use; restart the machine.",
        pynvml.NVML_ERROR_NO_PERMISSION: "This user may not use the GPU; ask the administrator.",
        pynvml.NVML_ERROR_GPU_IS_LOST: "The GPU fell off the bus; restart the machine.",
    }
    return sentences.get(error.value) or f"The NVIDIA driver says: {error} (NVML error {error.value})."


def _clock(moment: float) -> str:
    return time.strftime("%H:%M", time.localtime(moment))
