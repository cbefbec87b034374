"""What can be said about a start of a run that ended without a word: killed, crashed, or gone with its machine.

The journal tells how far it was, the lock's record which process it was, and the system, where it lets itself be read,
why it ended. What is only likely is called so.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.engine.checkpoint_proof import step_folders, step_of
from lorasmith.engine.errors import StorageError
from lorasmith.engine.events import Event, HardwareSampled, RunEnded, RunStarted
from lorasmith.engine.journal import decode
from lorasmith.engine.kill_evidence import boot_mark, killed_by_kernel, memory_kills
from lorasmith.engine.nvml import INITIAL_PID_NAMESPACE
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import RECORD_BYTES, lock_holder

NEARLY_FULL = 0.92
"""From this share of the memory on, a process that just vanished was probably ended for lack of it."""
_TAIL_BYTES = 1 << 16
_BOUNDS = (b'{"event": "RunStarted"', b'{"event": "RunEnded"')
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", re.MULTILINE)
_FATAL = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)
_LESS_MEMORY = (
    "close other programs, or lower train.batch_size, train.loader_workers or dataset.resolution in a new run, if it "
    "happens again."
)


@dataclass(frozen=True)
class _LastStart:
    """The last start in the journal: its first event, its last one, its last step, and the last gauges."""

    began: RunStarted
    last: Event
    step: int
    gauges: HardwareSampled | None


def describe_sudden_end(run: RunFolder) -> str:
    """Return in words how the last start of `run` ended, where it could not say so itself; else an empty text.

    Ask before the lock is taken, which overwrites the record of the process that had it. Never raises: a journal that
    cannot be read has no last start.
    """
    try:
        start = _last_start(run)
        if start is None or lock_holder(run) is not None:
            return ""
        record = _read_record(run.lock)
        parts = [_what(start, record), _why(run, start, record), _what_now(run, start.step)]
    except (OSError, StorageError):
        return ""
    return " ".join(part for part in parts if part)


def _last_start(run: RunFolder) -> _LastStart | None:
    """Return the last start of which the journal holds no end, or None."""
    last: Event | None = None
    gauges: HardwareSampled | None = None
    step: int | None = None
    for line in _lines_from_the_end(run.journal):
        # A long run has tens of thousands of lines, of which few say anything new.
        if last and gauges and step is not None and not line.startswith(_BOUNDS):
            continue
        event = decode(line, run.journal)
        if isinstance(event, RunEnded):
            return None
        if event is None or event.time == 0.0:
            # A header or a damaged line.
            continue
        last = last or event
        if gauges is None and isinstance(event, HardwareSampled):
            gauges = event
        if step is None:
            step = getattr(event, "step", None)
        if isinstance(event, RunStarted):
            return _LastStart(event, last, event.resumed_from if step is None else step, gauges)
    return None


def _lines_from_the_end(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, the last first, without reading more of it than is asked for."""
    with path.open("rb") as file:
        end, rest = file.seek(0, os.SEEK_END), b""
        while end:
            start = max(0, end - _TAIL_BYTES)
            file.seek(start)
            rest, *lines = (file.read(end - start) + rest).split(b"\n")
            yield from reversed(lines)
            end = start
        yield rest


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes()[:RECORD_BYTES])
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _what(start: _LastStart, record: dict[str, Any]) -> str:
    pid, began = record.get("pid"), record.get("started", start.began.time)
    who = f"process {pid} since {_clock(began)}" if pid else f"since {_clock(began)}"
    where = f"after step {start.step}" if start.step else "before its first step"
    return f"The last start ({who}) ended without a word {where} at {_clock(start.last.time)}."


def _why(run: RunFolder, start: _LastStart, record: dict[str, Any]) -> str:
    """Return the likeliest cause, by the strongest evidence there is."""
    if fatal := _fatal_error(run.log):
        return f"It crashed: {fatal}. {run.log.name} holds the stack; mostly a driver or a library is at fault."
    host = record.get("host")
    if host and host != socket.gethostname():
        return f"It ran on {host}; why it ended cannot be seen from this machine."
    pid, since = record.get("pid"), start.began.time - 60.0
    if record.get("namespace") == INITIAL_PID_NAMESPACE and isinstance(pid, int) and killed_by_kernel(pid, since):
        return f"The system ended it for lack of memory, says the kernel's log{_fullness(start.gauges)}: {_LESS_MEMORY}"
    if _restarted(record, start.last.time):
        return "The machine has been restarted since."
    if _more_kills(record):
        return (
            "Since then the system has ended a process of this container or service for lack of memory, probably this "
            f"one{_fullness(start.gauges)}: {_LESS_MEMORY}"
        )
    gauges = start.gauges
    if gauges is not None and gauges.ram_used_gib >= NEARLY_FULL * gauges.ram_total_gib:
        return (
            f"The machine's memory was {_share(gauges)} full, so the system probably ended it for lack of memory: "
            f"{_LESS_MEMORY}"
        )
    return "It was killed from outside or crashed; nothing on this machine says why."


def _what_now(run: RunFolder, step: int) -> str:
    folders = step_folders(run.checkpoints)
    if not folders:
        return "It had saved no checkpoint, so training begins anew." if step else ""
    saved = step_of(folders[-1])
    repeated = step - saved
    if repeated <= 0:
        return f"Training goes on from the checkpoint of step {saved}; no step is repeated."
    steps = "one step is" if repeated == 1 else f"{repeated} steps are"
    return f"Training goes on from the checkpoint of step {saved}; {steps} repeated."


def _fatal_error(log: Path) -> str:
    """Return what Python's fault handler wrote at the very end of the run's log, or an empty text."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    found = list(_FATAL.finditer(text))
    # A dated line after it is of a later start, or of a process that lived on.
    if not found or _LOG_LINE.search(text, found[-1].end()):
        return ""
    return found[-1].group(1)


def _restarted(record: dict[str, Any], last: float) -> bool:
    before, now = record.get("boot"), boot_mark()
    if before and now:
        return bool(before != now)
    return time.time() - time.monotonic() > last


def _more_kills(record: dict[str, Any]) -> bool:
    before, now = record.get("kills"), memory_kills()
    return isinstance(before, list) and now is not None and before[0] == now[0] and now[1] > before[1]


def _fullness(gauges: HardwareSampled | None) -> str:
    return f" (it was {_share(gauges)} full)" if gauges is not None else ""


def _share(gauges: HardwareSampled) -> str:
    return f"{gauges.ram_used_gib:.1f} of {gauges.ram_total_gib:.1f} GiB"


def _clock(seconds: float) -> str:
    when = time.localtime(seconds)
    today = time.strftime("%Y-%m-%d", when) == time.strftime("%Y-%m-%d")
    return time.strftime("%H:%M" if today else "%H:%M on %Y-%m-%d", when)
