"""A tiny dataset, a run on it, and a host that records events: shared by the tests of training."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lorasmith.engine.commands import Command
from lorasmith.engine.config import RunConfig
from lorasmith.engine.events import Event, StepsDone
from lorasmith.engine.families import Family, identify_base
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_folder import RunFolder, create_run
from lorasmith.engine.sources import locate_base
from lorasmith.engine.trainer import train
from tests.tiny import tiny_pictures

E = TypeVar("E", bound=Event)


def load_tiny(base: Path, dtype: torch.dtype = torch.float32) -> Family:
    files = locate_base(str(base))
    module, identity = identify_base(files)
    return module.load(files, identity, torch.device("cpu"), dtype)


def tiny_config(base_folder: Path, folder: Path, /, **sections: dict[str, Any]) -> RunConfig:
    """Return settings for a run of a few steps; pictures are written to `folder`/pictures where there are none."""
    pictures = folder / "pictures"
    if not pictures.exists():
        tiny_pictures(pictures, 5, sizes=((64, 64), (128, 64)), captions=["a circle, red, big", "a ball, blue"])
    values: dict[str, dict[str, Any]] = {
        "run": {"output_folder": str(folder / "runs"), "name": "tiny"},
        "base": {"model": str(base_folder)},
        "dataset": {"folder": str(pictures), "resolution": 64},
        "captions": {"trigger": "zqx"},
        "adapter": {"rank": 2, "alpha": 2.0},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 4, "batch_size": 2, "log_every": 2, "device": "cpu"},
        "checkpoints": {"every": 0},
        "previews": {"every": 0, "steps": 1},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return resolve_config([Layer("test", values)]).config


class RecordingHost:
    """Keeps every event; `at` maps a step to the commands that arrive once that step is known to be finished."""

    def __init__(
        self, at: dict[int, list[Command]] | None = None, on_event: Callable[[Event], None] | None = None
    ) -> None:
        self.events: list[Event] = []
        self.at = at or {}
        self.waiting: deque[Command] = deque()
        self.polls = 0
        self.on_event = on_event

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if self.on_event:
            self.on_event(event)

    def next_commands(self) -> list[Command]:
        for step in [step for step in self.at if step <= self.step()]:
            self.waiting.extend(self.at.pop(step))
        commands = list(self.waiting)
        self.waiting.clear()
        return commands

    def wait_command(self, timeout: float) -> Command | None:
        self.polls += 1
        if self.polls > 100:
            raise AssertionError("the run waits for ever")
        time.sleep(min(timeout, 0.001))
        return self.waiting.popleft() if self.waiting else None

    def step(self) -> int:
        return max((getattr(event, "step", 0) for event in self.events), default=0)

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def losses(self) -> list[float]:
        return [loss for event in self.of(StepsDone) for loss in event.losses]

    def rates(self) -> list[float]:
        return [event.learning_rate for event in self.of(StepsDone)]


def new_run(config: RunConfig) -> RunFolder:
    return create_run(resolve_config([Layer("test", config.model_dump())]))


def run_training(
    config: RunConfig, host: RecordingHost | None = None, run: RunFolder | None = None
) -> tuple[RunFolder, RecordingHost]:
    host, run = host or RecordingHost(), run or new_run(config)
    train(run, config, host)
    return run, host


def texts(events: Sequence[Event]) -> str:
    return "\n".join(str(getattr(event, "message", "")) for event in events)
