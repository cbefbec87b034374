"""A real session around an engine that the test writes itself: for faults of what surrounds the training."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from lorasmith.engine.events import Event, RunEnded, StepsDone
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_folder import create_run
from lorasmith.engine.session import Session

E = TypeVar("E", bound=Event)
Train = Callable[..., None]
Host = Callable[[Train], Session]


@contextmanager
def hosting(folder: Path, monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> Iterator[Host]:
    """Give a function that starts a session, in a run folder of its own, around a train function; each is ended."""
    settings = {"run": {"output_folder": str(folder / "runs")}, "train": {"device": device}}
    resolved = resolve_config([Layer("test", settings)])
    monkeypatch.setenv("LORASMITH_RUNTIME", str(folder / "runtime"))
    sessions: list[Session] = []

    def host(train: Train) -> Session:
        trainer = types.ModuleType("lorasmith.engine.trainer")
        trainer.train = train  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lorasmith.engine.trainer", trainer)
        sessions.append(Session(create_run(resolved), resolved.config))
        sessions[-1].start()
        return sessions[-1]

    try:
        yield host
    finally:
        for session in sessions:
            assert session.stop_and_join(30)


def wait_for(session: Session, kind: type[E], holds: Callable[[E], bool] = lambda event: True) -> E:
    """Return the newest event of `kind` once there is one for which `holds`, within twenty seconds."""
    pause = threading.Event()
    for _ in range(2000):
        event = session.latest.get(kind)
        if isinstance(event, kind) and holds(event):
            return event
        pause.wait(0.01)
    raise AssertionError(f"no such {kind.__name__} came; the last is {session.latest.get(kind)}")


def steps(step: int, seconds: float = 0.001) -> StepsDone:
    """Return the event of one step."""
    return StepsDone(step=step, epoch=1, losses=[0.5], learning_rate=1e-4, grad_norm=0.1, seconds_per_step=seconds)


def stop(host: Any, step: int = 7) -> None:
    """End the run as the user's stop does."""
    host.emit(RunEnded(outcome="stopped", step=step, message="Stopped."))
