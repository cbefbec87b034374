"""What the monitor knows about a run: a pure fold over the engine's events, free of textual and of torch.

`state = reduce(state, event)` is the only way the monitor changes, so that a live view, an old run and a screenshot
show the same: the state after a live run equals the state replayed from its journal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from lorasmith.engine import events
from lorasmith.engine.event_words import describe_event
from lorasmith.tui.curve import Curve, Floats

__all__ = ["Curve", "Floats", "LogLine", "RunState", "reduce"]
EventT = TypeVar("EventT", bound=events.Event)

_WARNINGS = (events.NotFinite, events.RolledBack, events.MemoryReduced, events.Stalled)
LOG_LINES = 500
SPEED_WINDOW_STEPS = 200


@dataclass(frozen=True)
class LogLine:
    """One line of the log; `message` may hold foreign text."""

    time: float
    severity: events.Severity
    message: str


@dataclass(frozen=True)
class RunState:
    """Everything the monitor shows; times are seconds since the epoch, sizes GiB."""

    run: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    total_steps: int = 0
    resumed_from: int = 0
    started_at: float = 0.0
    last_event_at: float = 0.0
    stage: events.Stage | None = None
    stage_label: str = ""
    stage_since: float = 0.0
    progress: events.Progress | None = None
    dataset: events.DatasetReady | None = None
    step: int = 0
    epoch: int = 0
    losses: Curve = field(default_factory=Curve)
    learning_rate: float = math.nan
    grad_norm: float = math.nan
    paces: tuple[tuple[int, float], ...] = ()
    """The newest measurements as (steps, seconds per step), of `paced_steps` steps in all."""
    paced_steps: int = 0
    hardware: events.HardwareSampled | None = None
    vram_peak_gib: float = 0.0
    logs: tuple[LogLine, ...] = ()
    previews: tuple[events.PreviewReady, ...] = ()
    checkpoints: tuple[events.CheckpointSaved, ...] = ()
    validations: tuple[events.Validated, ...] = ()
    """In the order of their steps, the first of the base model alone where the run began with one."""
    exports: tuple[events.ExportDone, ...] = ()
    paused: bool = False
    pause_reason: str = ""
    parked: events.Parked | None = None
    stalled: events.Stalled | None = None
    not_finite: tuple[events.NotFinite, ...] = ()
    memory_reduced: tuple[events.MemoryReduced, ...] = ()
    stopping: bool = False
    ended: events.RunEnded | None = None

    @property
    def seconds_per_step(self) -> float:
        """Mean over the last steps, or NaN before the first."""
        steps = self.paced_steps
        return sum(count * seconds for count, seconds in self.paces) / steps if steps else math.nan

    @property
    def eta_seconds(self) -> float:
        """Training time that is left at the present speed, pauses and previews left out; NaN before the first step."""
        return max(0, self.total_steps - self.step) * self.seconds_per_step

    @property
    def fraction(self) -> float:
        """Share of the run's steps that are done, 0 to 1."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    @property
    def num_invalid_losses(self) -> int:
        """How many steps up to now have a loss or a gradient that is not finite, left-out steps included."""
        finite = np.isfinite(self.losses.values)
        known = {item.step for item in self.not_finite}
        gradients = sum(1 for step in known if step > len(finite) or finite[step - 1])
        return int(np.count_nonzero(~finite)) + gradients

    @property
    def marks(self) -> tuple[int, ...]:
        """The steps that changed nothing because their loss or gradient was not finite."""
        return tuple(item.step for item in self.not_finite)


def reduce(state: RunState, event: events.Event) -> RunState:
    """Return the state after `event`; an event of an unknown kind only moves the clock."""
    change = _CHANGES.get(type(event))
    changes = change(state, event) if change else {}
    line = _log_line(event)
    if isinstance(event, events.PreviewReady) and state.previews and state.previews[-1].step == event.step:
        line = None  # one line for all pictures of a step: the log is short and the pictures are shown
    if line:
        changes["logs"] = (*state.logs[1 - LOG_LINES :], line)
    return _with_changes(state, {"last_event_at": event.time, **changes})


def _with_changes(state: RunState, changes: Changes) -> RunState:
    # Not dataclasses.replace, which passes every field through __init__: a journal has tens of thousands of events.
    changed = object.__new__(RunState)
    vars(changed).update(vars(state), **changes)
    return changed


Changes = dict[str, Any]
_GOING_ON: Changes = {"paused": False, "pause_reason": "", "parked": None, "stalled": None}
_CHANGES: dict[type[events.Event], Callable[[RunState, Any], Changes]] = {}


def _on(kind: type[EventT]) -> Callable[[Callable[[RunState, EventT], Changes]], Callable[[RunState, EventT], Changes]]:
    def register(change: Callable[[RunState, EventT], Changes]) -> Callable[[RunState, EventT], Changes]:
        _CHANGES[kind] = change
        return change

    return register


@_on(events.RunStarted)
def _started(state: RunState, event: events.RunStarted) -> Changes:
    # A resumed run repeats what came after its checkpoint: the curve and the lists go back to that step.
    return {
        "run": event.run,
        "config": event.config,
        "versions": event.versions,
        "device": event.device,
        "total_steps": event.total_steps,
        "resumed_from": event.resumed_from,
        "started_at": event.time,
        "stage": None,
        "stage_label": "",
        "stage_since": event.time,
        "progress": None,
        "step": event.resumed_from,
        "losses": state.losses.cut(event.resumed_from),
        "paces": (),
        "paced_steps": 0,
        "previews": tuple(item for item in state.previews if item.step <= event.resumed_from),
        "checkpoints": tuple(item for item in state.checkpoints if item.step <= event.resumed_from),
        "validations": tuple(item for item in state.validations if item.step <= event.resumed_from),
        "exports": tuple(item for item in state.exports if item.step <= event.resumed_from),
        "not_finite": tuple(item for item in state.not_finite if item.step <= event.resumed_from),
        "memory_reduced": tuple(item for item in state.memory_reduced if item.step <= event.resumed_from),
        **_GOING_ON,
        "stopping": False,
        "ended": None,
    }


@_on(events.StageChanged)
def _stage(state: RunState, event: events.StageChanged) -> Changes:
    return {"stage": event.stage, "stage_label": event.label, "stage_since": event.time, "progress": None}


@_on(events.Progress)
def _progress(state: RunState, event: events.Progress) -> Changes:
    return {"progress": event}


@_on(events.DatasetReady)
def _dataset(state: RunState, event: events.DatasetReady) -> Changes:
    return {"dataset": event}


@_on(events.StepsDone)
def _steps(state: RunState, event: events.StepsDone) -> Changes:
    count = max(1, len(event.losses))
    paces, steps = (*state.paces, (count, event.seconds_per_step)), state.paced_steps + count
    while len(paces) > 1 and steps - paces[0][0] >= SPEED_WINDOW_STEPS:
        steps -= paces[0][0]
        paces = paces[1:]
    return {
        "step": event.step,
        "epoch": event.epoch,
        "losses": state.losses.put(event.step, event.losses),
        "learning_rate": event.learning_rate,
        "grad_norm": event.grad_norm,
        "paces": paces,
        "paced_steps": steps,
    }


@_on(events.HardwareSampled)
def _hardware(state: RunState, event: events.HardwareSampled) -> Changes:
    return {"hardware": event, "vram_peak_gib": max(state.vram_peak_gib, event.vram_used_gib or 0.0)}


@_on(events.PreviewReady)
def _preview(state: RunState, event: events.PreviewReady) -> Changes:
    return {"previews": (*(item for item in state.previews if item.path != event.path), event)}


@_on(events.Validated)
def _validated(state: RunState, event: events.Validated) -> Changes:
    return {"validations": (*(item for item in state.validations if item.step < event.step), event)}


@_on(events.CheckpointSaved)
def _checkpoint(state: RunState, event: events.CheckpointSaved) -> Changes:
    return {"checkpoints": (*(item for item in state.checkpoints if item.step != event.step), event)}


@_on(events.CheckpointPruned)
def _pruned(state: RunState, event: events.CheckpointPruned) -> Changes:
    return {"checkpoints": tuple(item for item in state.checkpoints if item.step != event.step)}


@_on(events.ExportDone)
def _export(state: RunState, event: events.ExportDone) -> Changes:
    return {"exports": (*(item for item in state.exports if item.path != event.path), event)}


@_on(events.Paused)
def _paused(state: RunState, event: events.Paused) -> Changes:
    return {"paused": True, "pause_reason": event.reason}


@_on(events.Parked)
def _parked(state: RunState, event: events.Parked) -> Changes:
    return {"paused": True, "pause_reason": "", "parked": event}


@_on(events.Resumed)
def _resumed(state: RunState, event: events.Resumed) -> Changes:
    return dict(_GOING_ON)


@_on(events.Stalled)
def _stalled(state: RunState, event: events.Stalled) -> Changes:
    return {"stalled": event}


@_on(events.StallEnded)
def _stall_ended(state: RunState, event: events.StallEnded) -> Changes:
    return {"stalled": None}


@_on(events.NotFinite)
def _not_finite(state: RunState, event: events.NotFinite) -> Changes:
    return {"not_finite": (*state.not_finite, event)}


@_on(events.MemoryReduced)
def _memory_reduced(state: RunState, event: events.MemoryReduced) -> Changes:
    return {"memory_reduced": (*state.memory_reduced, event)}


@_on(events.RolledBack)
def _rolled_back(state: RunState, event: events.RolledBack) -> Changes:
    return {
        "step": event.step,
        "losses": state.losses.cut(event.step),
        "validations": tuple(item for item in state.validations if item.step <= event.step),
    }


@_on(events.CommandReceived)
def _command(state: RunState, event: events.CommandReceived) -> Changes:
    return {"stopping": True} if event.command == "stop" else {}


@_on(events.RunEnded)
def _ended(state: RunState, event: events.RunEnded) -> Changes:
    return {"ended": event, "stopping": False, **_GOING_ON}


def _log_line(event: events.Event) -> LogLine | None:
    text = describe_event(event)
    if not text:
        return None
    severity: events.Severity = event.severity if isinstance(event, events.Logged) else "info"
    if isinstance(event, _WARNINGS):
        severity = "warning"
    if isinstance(event, events.RunEnded) and event.outcome == "failed":
        severity = "error"
    return LogLine(event.time, severity, text)
