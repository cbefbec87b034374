"""How a run ends that a signal asked to end: with a checkpoint, but never so late that whoever asked kills it.

Before training, nothing is lost by ending at once, so the engine gets ten seconds to finish what it loads. While
training, a step or a save may take its time; what is written is written whole, so ending even then damages nothing.
"""

from __future__ import annotations

import os
import time
from typing import Protocol

from lorasmith.engine.commands import Command
from lorasmith.engine.errors import EXIT_STOPPED
from lorasmith.engine.events import CheckpointSaved, Event, Logged, RunEnded, RunStarted, StageChanged

IDLE_SECONDS = 8.0
BUSY_SECONDS = 120.0
GONE = "The terminal is gone; training goes on without it."


class Stoppable(Protocol):
    """What is needed of `engine.session.Session`."""

    @property
    def finished(self) -> bool:
        """Whether the engine is over."""
        ...

    @property
    def latest(self) -> dict[type[Event], Event]:
        """The last event of each type."""
        ...

    def send(self, command: Command) -> None:
        """Ask the engine for something."""
        ...

    def emit(self, event: Event) -> None:
        """Journal and show an event."""
        ...


class Stopping:
    """The end that a signal asked of one run, and whether it is overdue."""

    def __init__(self) -> None:
        self._asked_at: float | None = None

    @property
    def asked(self) -> bool:
        """Whether the end was asked for."""
        return self._asked_at is not None

    def ask(self, session: Stoppable | None) -> None:
        """Ask for a checkpoint and the end; may be called from a signal handler."""
        self._asked_at = time.monotonic()
        if session is not None and not session.finished:
            session.send(Command.STOP)

    def is_overdue(self, session: Stoppable) -> bool:
        """Whether the engine did not end in time; the journal then has the run's end as its last word.

        The engine is in the middle of something that cannot be interrupted: end the process by `os._exit`.
        """
        if self._asked_at is None or session.finished:
            return False
        training = _is_training(session)
        patience = BUSY_SECONDS if training else IDLE_SECONDS
        if time.monotonic() - self._asked_at < patience:
            return False
        if RunEnded not in session.latest:
            session.emit(_overdue(session, patience) if training else _nothing_lost(session))
        return True


def tell_loss(session: Stoppable, run_folder: str) -> str:
    """Journal that the terminal is gone and return how the run is seen again, in words."""
    text = f"{GONE} `lorasmith attach {run_folder}` shows it again; SIGTERM saves and ends (process {os.getpid()})."
    if not session.finished:
        session.emit(Logged(severity="info", message=text))
    return text


def _is_training(session: Stoppable) -> bool:
    stage = session.latest.get(StageChanged)
    over = RunEnded in session.latest
    return not over and isinstance(stage, StageChanged) and stage.stage in ("train", "finish")


def _nothing_lost(session: Stoppable) -> RunEnded:
    started = session.latest.get(RunStarted)
    return RunEnded(
        outcome="stopped",
        step=started.resumed_from if isinstance(started, RunStarted) else 0,
        message="Stopped before training went on; nothing is lost.",
        fix="Resume it whenever you like.",
        exit_code=EXIT_STOPPED,
    )


def _overdue(session: Stoppable, patience: float) -> RunEnded:
    saved = session.latest.get(CheckpointSaved)
    step = saved.step if isinstance(saved, CheckpointSaved) else 0
    where = f"its newest checkpoint is that of step {step}" if step else "no checkpoint was written since its start"
    return RunEnded(
        outcome="stopped",
        step=step,
        message=f"The run did not end within {patience:.0f} s and was left; {where}.",
        fix="Resume it whenever you like.",
        exit_code=EXIT_STOPPED,
    )
