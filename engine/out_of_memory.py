"""What counts as running out of memory, and how the same work is tried again with less: rung by rung, each one told.

Every phase has its own list of rungs in a fixed order. Work that runs out of memory is done again after each rung, with
the same pictures, noise and captions; when no rung is left, the run ends in words. The rungs that a run has taken are
part of its checkpoints (`Rungs.shared`), so that a resumed run computes as the first one did.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import psutil

from lorasmith.engine.errors import HardwareError, LorasmithError
from lorasmith.engine.events import Event, MemoryReduced
from lorasmith.engine.hardware import read_memory
from lorasmith.engine.nvml import GIB

logger = logging.getLogger(__name__)

Phase = Literal["load", "image encode", "text encode", "step", "preview", "save"]
T = TypeVar("T")

MAX_FREED = 3
"""How often in a run freeing the allocator's cache alone is tried in a phase: where it does not last, it is no help."""
_GPU_TEXT = re.compile(
    r"(CUDA|HIP|XPU) out of memory|(CUDA|HIP)( driver)? error: out of memory|CUDA_ERROR_OUT_OF_MEMORY"
    r"|CU(BLAS|DNN|SOLVER|SPARSE|FFT)_(STATUS_)?ALLOC_FAILED"
    # The handle cannot be made where no memory is left for its workspace.
    r"|CUBLAS_STATUS_NOT_INITIALIZED.*cublasCreate",
    re.DOTALL,
)
_MACHINE_TEXT = re.compile(
    r"DefaultCPUAllocator: (can't|not enough memory)|[Cc]annot allocate memory|std::bad_alloc|os error 12\b"
    # oneDNN's words where its code or its scratchpad finds no room; for shapes that it cannot do it has others.
    r"|could not (create a primitive|create a memory object|execute a primitive)$"
    # What safetensors makes of a bytes object that Python has no memory for.
    r"|PyObject pointer is null"
)
_ASKED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)? ?\w+)")
_FREE = re.compile(r"of which (\d+(?:\.\d+)? \w+) is free")
_NAMES: Mapping[Phase, str] = {
    "load": "while the base model was loaded",
    "image encode": "while pictures were encoded",
    "text encode": "while captions were encoded",
    "step": "in a training step",
    "preview": "while previews were drawn",
    "save": "while a checkpoint was written",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error`, or what caused it, says that the GPU or the machine has no memory left.

    Known by class name and text, so that torch need not be imported: its OutOfMemoryError, the allocation errors of
    CUDA, cuBLAS and cuDNN, the CPU allocator's RuntimeError, MemoryError, and a file that cannot be mapped (ENOMEM).
    """
    return any(_memory_kind(each) for each in _causes(error))


def describe_shortage(error: BaseException) -> str:
    """Return one sentence: what ran out of memory, and where it is known how much was asked for and free."""
    kind, text = "machine", str(error)
    for each in _causes(error):
        if found := _memory_kind(each):
            kind, text = found, str(each)
            break
    asked, free = _ASKED.search(text), _FREE.search(text)
    parts = [f"{_readable(asked.group(1))} more were asked for"] if asked else []
    if free:
        parts.append(f"{free.group(1)} were free")
    elif kind == "machine":
        parts.append(_left())
    what = "The GPU" if kind == "gpu" else "This machine"
    return f"{what} ran out of memory{': ' if parts else ''}{', '.join(parts)}."


def free_memory() -> None:
    """Give back what is held for nothing: unreachable objects, and the allocators' caches."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class Rung:
    """One way to need less: `name` in checkpoints, `change` in words, `take` does it, and returns False for no change.

    A rung that does not `last` helps once and may be taken again for other work.
    """

    name: str
    change: str
    take: Callable[[], bool]
    lasts: bool = True


FREE_CACHE = Rung("free", "memory that was held for nothing was given back", lambda: True, lasts=False)
"""The first rung of each phase: once more, after `Rungs.attempt` has called `free_memory` as after every failure."""


@dataclass
class Limit:
    """How many things are worked on at once, at most."""

    most: int

    def rung(self, most: int, words: str) -> Rung:
        """Return the rung from which on at most `most` `words` at once, e.g. "captions are encoded"."""

        def take() -> bool:
            smaller = most < self.most
            self.most = min(most, self.most)
            return smaller

        return Rung(f"batch {most}", f"at most {most} {words} at once", take)


class Rungs:
    """The rungs that one run has taken, by phase, and the work that is tried again after each.

    `step` tells how many steps are finished; `taken` is what `shared` was at the checkpoint that is gone on from.
    """

    def __init__(
        self,
        emit: Callable[[Event], None] | None = None,
        step: Callable[[], int] = lambda: 0,
        taken: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Tell each rung to `emit`, or the log."""
        self._emit = emit or _log
        self._step = step
        self.shared: dict[str, list[str]] = {phase: list(names) for phase, names in (taken or {}).items()}
        """The names of the lasting rungs taken, by phase and in order: JSON-ready, and always up to date."""
        self._freed: dict[str, int] = {}

    def taken(self, phase: Phase) -> Sequence[str]:
        """Return the names of the lasting rungs that were taken in `phase`."""
        return tuple(self.shared.get(phase, ()))

    def retake(self, phase: Phase, rungs: Sequence[Rung]) -> None:
        """Take again, in silence, those of `rungs` that the run had taken in `phase` before it was resumed."""
        for rung in rungs:
            if rung.name in self.shared.get(phase, ()):
                rung.take()

    def attempt(
        self,
        phase: Phase,
        work: Callable[[], T],
        rungs: Sequence[Rung],
        *,
        fix: str,
        clean: Callable[[], None] | None = None,
    ) -> T:
        """Return what `work` returns; where memory runs out, take the next rung and do `work` again.

        `clean` clears what a failed try leaves half-done. Raises HardwareError with `fix` when no rung is left; every
        other error of `work` passes through.
        """
        fresh: set[str] = set()
        while True:
            try:
                return work()
            except BaseException as error:
                if not is_out_of_memory(error):
                    raise
                shortage = describe_shortage(error)
            # Outside the handler: the traceback would keep the failed try's tensors alive.
            if clean is not None:
                clean()
            free_memory()
            if not self._descend(phase, rungs, fresh):
                raise self._end(phase, shortage, fix)

    def _descend(self, phase: Phase, rungs: Sequence[Rung], fresh: set[str]) -> bool:
        """Take the first rung that is left and changes anything; False where there is none."""
        for rung in rungs:
            if rung.name in self.shared.get(phase, ()) or rung.name in fresh or not self._may(phase, rung):
                continue
            if not rung.take():
                continue
            if rung.lasts:
                self.shared.setdefault(phase, []).append(rung.name)
            else:
                fresh.add(rung.name)
                self._freed[phase] = self._freed.get(phase, 0) + 1
            self._emit(MemoryReduced(step=self._step(), phase=phase, change=rung.change))
            return True
        return False

    def _may(self, phase: Phase, rung: Rung) -> bool:
        return rung.lasts or self._freed.get(phase, 0) < MAX_FREED

    def _end(self, phase: Phase, shortage: str, fix: str) -> HardwareError:
        tried = len(self.shared.get(phase, ()))
        why = f"It happened {_NAMES[phase]}"
        why += f", after {tried} {'change' if tried == 1 else 'changes'} to need less." if tried else "."
        return HardwareError(shortage, why=why, fix=fix)


def _log(event: Event) -> None:
    logger.warning("%s", event)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        # An error of our own is in words already, whatever its cause.
        if isinstance(seen, LorasmithError):
            return
        yield seen
        seen = seen.__cause__


def _memory_kind(error: BaseException) -> Literal["gpu", "machine", ""]:
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if "OutOfMemoryError" in names:
        return "gpu"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "machine"
    if names.isdisjoint(("RuntimeError", "SafetensorError", "PanicException", "OSError")):
        return ""
    return "gpu" if _GPU_TEXT.search(text) else "machine" if _MACHINE_TEXT.search(text) else ""


def _left() -> str:
    """Return how much this process could still have had."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return f"{read_memory().available_gib:.1f} GiB were free"
    left = max(0, limit - psutil.Process().memory_info().vms)
    return f"{left / GIB:.2f} GiB were left of the {limit / GIB:.1f} GiB of addresses that `ulimit -v` allows"


def _readable(size: str) -> str:
    number, _, unit = size.partition(" ")
    return f"{int(number) / GIB:.2f} GiB" if unit == "bytes" and number.isdigit() else size


def rung_state(learner_state: Mapping[str, Any]) -> Mapping[str, Sequence[str]]:
    """Return the rungs in a checkpoint's learner state; none in one of a version that knew no ladder."""
    return learner_state.get("memory") or {}
