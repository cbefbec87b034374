"""A program: several runs in one process, each ended in another way; prints what of each is still in memory as JSON.

    python -m tests.faults.memory_rounds FOLDER

A process of its own, since a test runner keeps log records, and with them tracebacks and all that is behind those.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import psutil
import torch

from lorasmith.engine import trainer
from lorasmith.engine.commands import Command
from lorasmith.engine.config import RunConfig
from lorasmith.engine.events import CheckpointSaved, Event, Parked, Progress, StepsDone
from lorasmith.engine.families import Family
from lorasmith.engine.learner import Learner
from lorasmith.engine.session import Session
from tests import tiny
from tests.engine.running import new_run, tiny_config

MIB = 2**20
Ending = Callable[[Session, Event], None]
networks: list[weakref.ref[Any]] = []
sessions: list[Session] = []


def build_mid_size(folder: Path) -> Path:
    """Write a base model of some 100 MiB, of which nearly all is the UNet."""
    from diffusers import UNet2DConditionModel

    small = tiny._unet

    def wide(build: tiny.TinyBuild) -> Any:
        return UNet2DConditionModel.from_config(dict(small(build).config) | {"block_out_channels": (160, 320)})

    tiny._unet = wide
    return tiny.build_tiny_sd15(folder)


def fail_with(error: Callable[[], Exception]) -> Callable[[], None]:
    """Make the third and every later step raise a new `error` in its middle; returns what undoes that."""
    real = Learner.batch_loss

    def batch_loss(self: Learner, batch: Any, step: int, first: int) -> torch.Tensor:
        loss = real(self, batch, step, first)
        if step >= 2:
            raise error()
        return loss

    Learner.batch_loss = batch_loss  # type: ignore[method-assign]
    return lambda: setattr(Learner, "batch_loss", real)


def send(kind: type[Event], command: Command, **fields: object) -> Ending:
    """Return what sends `command` when an event of that kind, with these fields, is told."""

    def on_event(session: Session, event: Event) -> None:
        if isinstance(event, kind) and all(getattr(event, name) == value for name, value in fields.items()):
            session.send(command)

    return on_event


def both(*endings: Ending) -> Ending:
    return lambda session, event: [ending(session, event) for ending in endings].clear()


def hold(config: RunConfig, ending: Ending) -> Session:
    """Run to the end, and keep the session as the wizard does."""
    session = Session(new_run(config), config)
    real = session.emit

    def emit(event: Event) -> None:
        real(event)
        ending(session, event)

    session.emit = emit  # type: ignore[method-assign]
    sessions.append(session)
    session.start()
    if not session.join(120):
        raise SystemExit("a run does not end")
    return session


def in_memory() -> dict[str, Any]:
    """Return what is there without collecting anything first: that is the engine's business."""
    alive = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return {
        "networks": sum(reference() is not None for reference in networks),
        "tensors": len(alive),
        "mib": sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in alive}.values()) / MIB,
        "rss": psutil.Process().memory_info().rss / MIB,
        "frozen": gc.get_freeze_count(),
    }


def main(folder: Path) -> None:
    base = build_mid_size(folder / "base")
    gc.collect()
    real_load = trainer.load_base

    def load_base(*rest: Any) -> Family:
        family = real_load(*rest)
        networks.append(weakref.ref(family.denoiser))
        return family

    trainer.load_base = load_base

    def config(**sections: dict[str, Any]) -> RunConfig:
        train = {"steps": 30, "log_every": 1, "batch_size": 1, "ema_decay": 0.9, "device": "cpu"}
        return tiny_config(base, folder, train=train | sections.pop("train", {}), **sections)

    at_third = send(StepsDone, Command.STOP, step=3)
    previews = {"previews": {"every": 2, "steps": 30, "prompts": ["a"]}, "checkpoints": {"every": 2}}
    rounds: list[tuple[str, RunConfig, Ending, Callable[[], Exception] | None]] = [
        ("finish", config(train={"steps": 3}), lambda session, event: None, None),
        ("stop", config(), at_third, None),
        ("exception in a step", config(), at_third, lambda: RuntimeError("in the middle")),
        (
            "out of memory",
            config(),
            at_third,
            lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        ),
        ("stop while encoding", config(dataset={"flip": True}), send(Progress, Command.STOP, stage="cache"), None),
        ("stop while drawing", config(**previews), send(CheckpointSaved, Command.STOP, step=2), None),
        (
            "stop while parked",
            config(),
            both(send(StepsDone, Command.PARK, step=2), send(Parked, Command.STOP)),
            None,
        ),
        ("stop again", config(), at_third, None),
    ]
    results = []
    for name, settings, ending, error in rounds:
        undo = fail_with(error) if error else lambda: None
        began = time.perf_counter()
        session = hold(settings, ending)
        undo()
        outcome = session.outcome
        assert outcome is not None
        told = {"round": name, "outcome": outcome.outcome, "message": outcome.message, "step": outcome.step}
        results.append(told | in_memory() | {"seconds": time.perf_counter() - began})
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
