"""What a stage of a run really took of the device's memory: the allocator's own peak, or this process's growth.

On a card that is what torch reserved at most, since reserved memory is what others cannot have, and the CUDA context.
On the processor there is no allocator to ask: there the process's resident memory is watched while the stage runs.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch

from lorasmith.engine import hardware
from lorasmith.engine.memory.card_parts import CONTEXT_GIB
from lorasmith.engine.nvml import Gpu

GIB = 1 << 30
_WATCH_SECONDS = 0.01


@dataclass
class Peak:
    """GiB that a block took at most, known when it is over; 0 before."""

    gib: float = 0.0


class Meter(Protocol):
    """Measures memory; `words` says in a sentence what the figures are."""

    words: str

    def watch(self) -> contextlib.AbstractContextManager[Peak]:
        """Measure a block."""

    def wait(self) -> None:
        """Wait until the device has done what it was asked to."""


class CardMeter:
    """An NVIDIA GPU's memory of this process."""

    words = "measured by the card's memory manager, with the CUDA context"

    def __init__(self, device: torch.device) -> None:
        """Measure `device`, a CUDA one."""
        self.device = device

    @contextlib.contextmanager
    def watch(self) -> Iterator[Peak]:
        """Measure a block; what lies on the card before it counts, what is only reserved does not."""
        peak = Peak()
        self.start()
        try:
            yield peak
        finally:
            peak.gib = self.peak_gib()

    def start(self) -> None:
        """Begin to measure."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float:
        """Return the most that was taken since `start`."""
        return torch.cuda.max_memory_reserved(self.device) / GIB + self._context_gib()

    def wait(self) -> None:
        """Wait for the card."""
        torch.cuda.synchronize(self.device)

    def gpu(self) -> Gpu | None:
        """Return the card as NVML knows it; None where NVML does not answer."""
        uuid = str(torch.cuda.get_device_properties(self.device).uuid).lower()
        gpus = hardware.snapshot().gpus
        return next((gpu for gpu in gpus if gpu.uuid.lower().removeprefix("gpu-") == uuid), None)

    def _context_gib(self) -> float:
        """Return what the process has on the card beside what torch reserved; the usual where nobody tells."""
        gpu = self.gpu()
        used = next((each.used_gib for each in gpu.processes if each.pid == os.getpid()), None) if gpu else None
        context = CONTEXT_GIB if used is None else used - torch.cuda.memory_reserved(self.device) / GIB
        # A reading of another moment, or of another process with this number, is no context.
        return context if 0.0 < context < 2.0 else CONTEXT_GIB


class ProcessMeter:
    """The main memory that this process takes more than when the meter was made."""

    words = "this process's own memory in RAM, beyond what it had at the beginning"

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss

    @contextlib.contextmanager
    def watch(self) -> Iterator[Peak]:
        """Measure a block by looking every hundredth of a second."""
        peak, over, most = Peak(), threading.Event(), [0]

        def look() -> None:
            most[0] = max(most[0], self._process.memory_info().rss)

        def keep_looking() -> None:
            while not over.wait(_WATCH_SECONDS):
                look()

        watcher = threading.Thread(target=keep_looking, name="memory-meter", daemon=True)
        watcher.start()
        try:
            yield peak
        finally:
            over.set()
            watcher.join()
            look()
            peak.gib = max(0, most[0] - self._before) / GIB

    def wait(self) -> None:
        """Return at once: the processor is done when a call returns."""


def meter_of(device: torch.device) -> CardMeter | ProcessMeter:
    """Return what measures `device`."""
    return ProcessMeter() if device.type == "cpu" else CardMeter(device)
