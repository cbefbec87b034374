"""Notices that the engine shows no sign of life any more, and writes down where it is.

A sign of life is a look for commands, which the engine takes between steps and while it encodes or draws, or an event.
Silence is counted by this thread's own ticks, so that time in which the whole process was stopped, or the machine
asleep, is no silence, whatever the clocks say.
"""

from __future__ import annotations

import contextlib
import faulthandler
import re
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

from lorasmith.engine.events import (
    Event,
    HardwareSampled,
    Progress,
    Stage,
    StageChanged,
    Stalled,
    StallEnded,
    StepsDone,
)

LIMIT_SECONDS = 120.0
STEPS_OF_SILENCE = 10
UNKNOWN_PACE_SECONDS = 600.0
"""Before a step was measured: the first one compiles, tunes and fills caches, and may take minutes by right."""
TICK_SECONDS = 2.0
WRITE_SECONDS = 10.0
"""How long a disk may take for the stacks; it may be what hangs."""
MAX_STACK_FILES = 10
_OURS = "lorasmith."
_DOING: dict[Stage, str] = {
    "scan": "looking through the pictures; a slow disk can take this long",
    "load": "loading or downloading the base model; a slow disk or network can take this long",
    "cache": "encoding pictures and captions",
    "train": "training",
    "finish": "saving, drawing and exporting; a slow disk can take this long",
}


class Watchdog:
    """Watches the thread that calls `start`, from a thread of its own, and tells stalls through `emit`.

    Stacks of all threads go to `folder`, which is made when the first are written; the newest few are kept.
    """

    def __init__(self, emit: Callable[[Event], None], folder: Path, step: Callable[[], int]) -> None:
        self._emit = emit
        self._step = step
        self._stacks = StackFiles(folder)
        self._beats = 0
        self._seen_beats = 0
        self._stage: Stage = "scan"
        self._pace: deque[float] = deque(maxlen=101)
        self._silence = 0.0
        self._told_at = 0.0
        self._ticked = 0.0
        self._engine = 0
        self._stopping = threading.Event()
        # A daemon: where the disk hangs this thread may hang with it, and the process must still end.
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Watch the calling thread from now on."""
        self._engine = threading.get_ident()
        self._ticked = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, waiting for it only briefly; does nothing before `start`."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(TICK_SECONDS)

    def beat(self) -> None:
        """Take note that the engine lives."""
        self._beats += 1

    def note(self, event: Event) -> None:
        """Learn from an event of any thread; what the engine says, and progress of a download, is a sign of life."""
        if isinstance(event, HardwareSampled | Stalled | StallEnded):
            return
        if isinstance(event, StageChanged):
            self._stage = event.stage
        elif isinstance(event, StepsDone):
            self._pace.append(event.seconds_per_step)
        if isinstance(event, Progress) or threading.get_ident() == self._engine:
            self.beat()

    def limit(self) -> float:
        """Return how many seconds of silence are a stall now."""
        if self._pace:
            return max(LIMIT_SECONDS, STEPS_OF_SILENCE * statistics.median(self._pace))
        return UNKNOWN_PACE_SECONDS if self._stage == "train" else LIMIT_SECONDS

    def tick(self, now: float) -> None:
        """Judge the silence at `now` seconds of a clock that only goes forward, and tell what changed."""
        # A longer gap than this means that this thread, and with it the process, did not run.
        self._silence += min(max(0.0, now - self._ticked), 2 * TICK_SECONDS)
        self._ticked = now
        beats = self._beats
        if beats != self._seen_beats:
            self._seen_beats = beats
            silence, self._silence = self._silence, 0.0
            if self._told_at:
                self._told_at = 0.0
                self._emit(StallEnded(step=self._step(), seconds=silence))
        elif self._silence >= max(self.limit(), 2 * self._told_at):
            self._told_at = self._silence
            self._tell()

    def _run(self) -> None:
        while not self._stopping.wait(TICK_SECONDS):
            self.tick(time.monotonic())

    def _tell(self) -> None:
        frame = sys._current_frames().get(self._engine)
        where = f"{_DOING[self._stage]} ({describe_frame(frame)})"
        stacks = self._stacks.write()
        self._emit(Stalled(step=self._step(), seconds=self._silence, where=where, stacks=stacks))


class StackFiles:
    """Writes the stacks of all threads to `folder`/stacks-N.txt and keeps the newest few."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writing: threading.Thread | None = None

    def write(self) -> str:
        """Return the path of a new file, or an empty text where the disk refuses or hangs."""
        if self._writing is not None and self._writing.is_alive():
            return ""
        written: list[str] = []
        self._writing = threading.Thread(target=self._write, args=[written], name="stacks", daemon=True)
        self._writing.start()
        self._writing.join(WRITE_SECONDS)
        return written[0] if written else ""

    def _write(self, written: list[str]) -> None:
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            numbers = self._numbers()
            path = self._path(numbers[-1] + 1 if numbers else 1)
            with path.open("x") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            written.append(str(path))
            for number in numbers[: 1 - MAX_STACK_FILES]:
                self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"stacks-{number}.txt"

    def _numbers(self) -> list[int]:
        found = (re.fullmatch(r"stacks-(\d+)\.txt", path.name) for path in self._folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)


def describe_frame(frame: FrameType | None) -> str:
    """Return where a thread is: the innermost function of lorasmith, and whose code it waits in, where not its own."""
    inside = ""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(_OURS):
            return f"in {_function(frame.f_code)}, {module.removeprefix(_OURS)} line {frame.f_lineno}{inside}"
        inside = f", waiting in {module.partition('.')[0]}" if module else inside
        frame = frame.f_back
    return "outside of lorasmith"


def _function(code: CodeType) -> str:
    return code.co_qualname.replace(".<locals>", "")
