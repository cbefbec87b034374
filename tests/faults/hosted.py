"""`tests.faults.hosted_run` in a real terminal, and what it left behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasmith.engine.events import Event, StepsDone
from lorasmith.engine.journal import replay
from tests.tui.terminal_program import TerminalProgram

SHOWS_STEPS = {"headless": "loss ", "screen": "Step "}


class HostedRun(TerminalProgram):
    """A run in `folder` with a screen or without one; started when it has shown its first steps."""

    def __init__(self, folder: Path, mode: str, *, columns: int = 80, rows: int = 24, **options: Any) -> None:
        self.folder = folder
        self.shown = SHOWS_STEPS[mode] if options.get("stage", "train") == "train" else "Training"
        environ = {"LORASMITH_RUNTIME": str(folder / "runtime"), "TMUX": ""}
        arguments = ["-m", "tests.faults.hosted_run", mode, str(folder), json.dumps(options)]
        super().__init__(arguments, columns, rows, environ)

    def wait_for_steps(self, count: int = 5) -> HostedRun:
        """Wait until some more steps are done and shown."""
        target = len(self.beats()) + count
        ready = self.wait_for(lambda: len(self.beats()) >= target and (self.master < 0 or self.shown in self.text()))
        assert ready, self.output[-2000:]
        return self

    def beats(self) -> list[tuple[float, float]]:
        """Moment and length of each step; their numbers are contiguous."""
        return read_beats(self.folder)

    @property
    def run(self) -> Path:
        (run,) = (self.folder / "runs").iterdir()
        return run

    def journal(self) -> list[Event]:
        return list(replay(self.run / "journal.jsonl"))

    def said(self) -> str:
        """Every message in the journal."""
        return "\n".join(str(getattr(event, "message", "")) for event in self.journal())

    def log(self) -> str:
        return (self.run / "run.log").read_text()

    def steps(self) -> list[StepsDone]:
        return [event for event in self.journal() if isinstance(event, StepsDone)]

    def saved(self) -> list[Path]:
        return sorted((self.run / "checkpoints").iterdir())

    def main_thread_seconds(self) -> float:
        """CPU time of the main thread so far."""
        pid = (self.folder / "pid").read_text()
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9

    def state(self) -> str:
        """The state of the process, T for stopped."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def read_beats(folder: Path) -> list[tuple[float, float]]:
    try:
        lines = [line.split() for line in (folder / "beats").read_text().splitlines() if line.count(" ") == 2]
    except FileNotFoundError:
        return []
    assert [int(step) for step, *_ in lines] == list(range(1, len(lines) + 1))
    return [(float(moment), float(length)) for _, moment, length in lines]


def wait_until(done: Callable[[], Any], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(done())
