"""The checks that need torch, in a process of their own: what crashes or hangs there takes nothing down with it.

A driver that never answers, an illegal instruction in a library's kernel or a CUDA context that stays are the child's
and not the wizard's. The child says in JSON lines which trial it starts and what it found; where it dies or takes too
long, that trial has failed and a new child goes on with the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from lorasmith.engine.doctor import computing, quantized
from lorasmith.engine.doctor.check import Check, isolated, no_answer, reinstall
from lorasmith.engine.doctor.choices import DISABLED_BY, DISABLED_TOGETHER_BY, take_away
from lorasmith.engine.doctor.torch_builds import TORCH_PIN
from lorasmith.engine.errors import HardwareError
from lorasmith.engine.hardware import resolve_device
from lorasmith.engine.run_log import plain_text

TRIALS: Final[Mapping[str, Callable[[], Check]]] = {
    "torch": computing.check_torch,
    "cuda": computing.check_cuda,
    "bf16": computing.check_bf16,
    "fp16": computing.check_fp16,
    "attention": computing.check_attention,
    "pinned memory": computing.check_pinned_memory,
    "bitsandbytes": quantized.check_bitsandbytes,
    "nf4": quantized.check_nf4,
    "int8": quantized.check_int8,
    "fp8": quantized.check_fp8,
    "int8 product": quantized.check_int8_product,
    "fp8 product": quantized.check_fp8_product,
}
"""Every trial by its name, in the order in which they are made."""

FOUNDATIONS: Final = ("torch", "cuda")
"""Where one of these fails, the trials after it would only fail for the same reason."""
ESSENTIAL: Final = (*FOUNDATIONS, "attention")
"""Without these nothing can be trained; the others are optional."""
SECONDS: Final[Mapping[str, float]] = {"torch": 60.0, "cuda": 30.0, "bitsandbytes": 30.0}
OTHER_SECONDS: Final = 15.0
"""How long a trial may take; the first import from a slow disk takes most of it."""
_ENDED: Final = None


def seconds_for(name: str, *, first: bool = False) -> float:
    """Return how long this trial may take; the `first` of a child may take as long as the import of torch."""
    own = SECONDS.get(name, OTHER_SECONDS)
    return max(own, SECONDS["torch"]) if first and name != "torch" else own


def try_here(name: str) -> Check:
    """Make one trial in this process; a failed check where it raises, with what is then to be done."""
    return explained(isolated(name, TRIALS[name]))


def explained(check: Check) -> Check:
    """Return a trial's check with the choices that it takes away, and a fix where it has none of its own."""
    if check.status == "fail" or (check.status == "skip" and check.name in DISABLED_TOGETHER_BY):
        check = take_away(check)
    if check.status != "fail":
        return check
    return replace(
        check,
        fix=check.fix or _fix_of(check.name),
        meaning=check.meaning or _MEANINGS.get(check.name, ""),
        optional=check.name not in ESSENTIAL,
    )


def run_trials(
    names: Sequence[str],
    on_start: Callable[[str], None] | None = None,
    device: str = "auto",
) -> Generator[Check, None, None]:
    """Make the trials `names` in child processes and yield what each found, in that order; never raises.

    To be closed where it is left early. `device` is what `train.device` is set to. Where a foundation fails, those
    after it are skipped.
    """
    left = list(names)
    child: _Child | None = None
    try:
        while left:
            child = child or _Child(left, device)
            if on_start:
                on_start(left[0])
            check = explained(child.next_check(left[0]))
            yield check
            left.pop(0)
            if check.status == "fail" and check.name in FOUNDATIONS:
                yield from (_skipped(name, check.name) for name in left)
                return
            if not child.goes_on:
                child.end()
                child = None
    finally:
        if child is not None:
            child.end()


def _skipped(name: str, foundation: str) -> Check:
    return Check(name, "skip", f"not tried, since {foundation} does not work")


class _Child:
    """One child process that makes trials, and what it has said."""

    def __init__(self, names: Sequence[str], device: str) -> None:
        self._said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.goes_on = True
        self._is_first = True
        # -P: what lies in the current folder is not imported.
        command = [sys.executable, "-P", "-m", "lorasmith.engine.doctor.trial_process", device, *names]
        self._process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
            # Of its own, so that Ctrl-C in the terminal is this process's to handle.
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, name="doctor child", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(line)
        self._said.put(_ENDED)

    def next_check(self, name: str) -> Check:
        """Return what the child finds in the trial `name`, which is its next."""
        started, limit = time.monotonic(), seconds_for(name, first=self._is_first)
        self._is_first = False
        while True:
            try:
                line = self._said.get(timeout=max(0.0, started + limit - time.monotonic()))
            except queue.Empty:
                return self._gave_up(name, no_answer(limit), started)
            if line is _ENDED:
                return self._gave_up(name, self._how_it_ended(), started)
            try:
                return Check.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError):
                # Not from the child's own hand: something printed to its stdout before it was moved away.
                continue

    def _gave_up(self, name: str, detail: str, started: float) -> Check:
        self.goes_on = False
        return Check(name, "fail", plain_text(detail), crashed=True, seconds=time.monotonic() - started)

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"The process that tried it crashed ({_signal_name(-code)})."
        return f"The process that tried it ended with code {code}."

    def end(self) -> None:
        """End the process, whatever it hangs in; one that even this does not end is left behind."""
        if self._process.poll() is None:
            self._process.kill()
        try:
            self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            return
        self._listener.join(2.0)
        if self._process.stdout is not None and not self._listener.is_alive():
            self._process.stdout.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_MEANINGS: Final[Mapping[str, str]] = {
    "torch": "Nothing can be trained.",
    "cuda": "Nothing can be trained on the graphics card.",
    "attention": "No base model can be trained.",
    "bitsandbytes": "Its optimizers cannot be chosen; adamw and the others work.",
    "nf4": "nf4 cannot be chosen; fp8 and int8 save memory too.",
    "int8": "int8 cannot be chosen; fp8 takes the same memory.",
    "fp8": "fp8 cannot be chosen; int8 takes the same memory.",
    "int8 product": "memory.quantized_matmul cannot be chosen with int8.",
    "fp8 product": "memory.quantized_matmul cannot be chosen with fp8.",
    "pinned memory": "memory.swapped_blocks and memory.offload_activations work, but slowly.",
}


def _fix_of(name: str) -> str:
    """Return what helps where a trial broke down."""
    if name in ("bitsandbytes", "nf4"):
        return quantized.reinstall_bitsandbytes()
    if name in DISABLED_BY or name in DISABLED_TOGETHER_BY:
        return f"Leave it out, or: {reinstall(f'torch=={TORCH_PIN}')}"
    return reinstall(f"torch=={TORCH_PIN}")


def serve(device: str, names: Sequence[str]) -> None:
    """Make the trials `names` and write each check as one JSON line to what stdout was; the child's own work."""
    # Before torch is imported: the card that a training takes is the one to be tried.
    with contextlib.suppress(HardwareError):
        if resolve_device(device) == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # What libraries print must not come between the lines.
    private = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(private, "w", encoding="utf-8", errors="backslashreplace") as told:
        for name in names:
            check = try_here(name)
            told.write(json.dumps(check.to_json()) + "\n")
            told.flush()
