"""Everything that the engine says, as small immutable records.

An event is written to the journal as one JSON line before anyone sees it. The screen is a fold over these records
(`tui.state.reduce`), so an event holds all that a viewer needs and nothing that only this process knows.
Times are seconds since the epoch (UTC); `step` counts finished optimizer steps, so the first step is 1.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1

Stage = Literal["scan", "load", "cache", "train", "finish"]
Outcome = Literal["finished", "stopped", "failed"]
Severity = Literal["info", "warning", "error"]


# Counts the time in which the machine sleeps, so that the hour of an event stays right; macOS lacks it.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_BEGAN_AT = time.time() - time.clock_gettime(_CLOCK)


def now() -> float:
    """Return seconds since the epoch as this process knew them when it began, and never less than before.

    A clock that is set while a run goes on changes neither the order of its events nor the time between them.
    """
    return _BEGAN_AT + time.clock_gettime(_CLOCK)


@dataclass(frozen=True, kw_only=True)
class Event:
    """What all events share: the time at which it happened, by `now`."""

    time: float = field(default_factory=now)


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A process began to work on the run; a resumed run has several of these.

    `config` is the whole run configuration as nested plain values, `versions` maps package names to versions.
    """

    run: str
    total_steps: int
    resumed_from: int
    config: dict[str, Any]
    versions: dict[str, str]
    device: str
    schema: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class StageChanged(Event):
    """The run entered a stage."""

    stage: Stage
    label: str


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """How far a stage other than training is: `done` of `total` things, e.g. pictures encoded.

    `seconds_left` is None before there is a pace to judge by.
    """

    stage: Stage
    label: str
    done: int
    total: int
    seconds_left: float | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetReady(Event):
    """The dataset as it will be trained: counts and buckets, {"64x64": images}."""

    images: int
    refused: int
    regularization: int
    buckets: dict[str, int]
    steps_per_epoch: int


@dataclass(frozen=True, kw_only=True)
class StepsDone(Event):
    """Optimizer steps finished since the last such event; `losses[-1]` belongs to `step`.

    The loss of each step is the mean over its micro-batches. `seconds_per_step` is measured over these steps, pauses,
    saves and previews left out. `learning_rate` is the first parameter group's, `grad_norm` before clipping.
    """

    step: int
    epoch: int
    losses: list[float]
    learning_rate: float
    grad_norm: float
    seconds_per_step: float


@dataclass(frozen=True, kw_only=True)
class Validated(Event):
    """The loss on the `pictures` held-out pictures after `step`: `losses[i]` is their mean at noise level `levels[i]`.

    Levels are 0 (no noise) to 1; noise and levels are the same each time.
    """

    step: int
    levels: list[float]
    losses: list[float]
    pictures: int

    @property
    def mean(self) -> float:
        """The mean over all levels."""
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A resumable checkpoint was written and verified."""

    step: int
    path: str
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CheckpointPruned(Event):
    """An old checkpoint was removed because of keep-last-N."""

    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class PreviewReady(Event):
    """One preview picture was written; `line` reproduces it elsewhere."""

    step: int
    prompt: str
    seed: int
    path: str
    line: str


@dataclass(frozen=True, kw_only=True)
class ExportDone(Event):
    """A shareable LoRA file was written and proved by loading it; `programs` load it, as far as is known."""

    step: int
    path: str
    layout: str
    keys: int
    bytes: int
    programs: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Paused(Event):
    """Training waits for a command; `reason` says in words why it paused by itself, empty where the user asked."""

    step: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Parked(Event):
    """Training waits with everything moved off the card: `freed_gib` of its memory are free for others."""

    step: int
    freed_gib: float


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """Training goes on after a pause or out of the parking place."""

    step: int


@dataclass(frozen=True, kw_only=True)
class CommandReceived(Event):
    """A command of the user was taken up."""

    command: str
    step: int


@dataclass(frozen=True, kw_only=True)
class NotFinite(Event):
    """The loss or gradient of `step` was no number and the step changed nothing; `files` are its pictures."""

    step: int
    what: Literal["loss", "gradient"]
    files: list[str]


@dataclass(frozen=True, kw_only=True)
class RolledBack(Event):
    """Weights and optimizer are as they were after `step`, the last finite state; `given_up` is the later step."""

    step: int
    given_up: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class MemoryReduced(Event):
    """Memory ran out in `phase`, and one rung of the ladder was taken; the same work is tried again.

    `change` says in words what is different from now on, e.g. "gradient checkpointing is on".
    """

    step: int
    phase: str
    change: str


@dataclass(frozen=True, kw_only=True)
class Stalled(Event):
    """The engine has shown no sign of life for `seconds`; `where` is what it is in, `stacks` a file with all stacks."""

    step: int
    seconds: float
    where: str
    stacks: str


@dataclass(frozen=True, kw_only=True)
class StallEnded(Event):
    """The engine goes on after a stall of `seconds`."""

    step: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class HardwareSampled(Event):
    """Gauges, about once a second; None where a value cannot be had. Sizes in GiB.

    `note` says in words what is missing, e.g. "no NVIDIA driver" or "GPU lost at 12:31".
    """

    vram_used_gib: float | None
    vram_total_gib: float | None
    gpu_utilization_percent: float | None
    temperature_c: float | None
    power_w: float | None
    ram_used_gib: float
    ram_total_gib: float
    process_ram_gib: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Logged(Event):
    """One line for the log, maybe with foreign text in it."""

    severity: Severity
    message: str


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """The process left the run; `message`, `why` and `fix` say how it ended in words."""

    outcome: Outcome
    step: int
    message: str
    why: str = ""
    fix: str = ""
    exit_code: int = 0


def _event_types(root: type[Event]) -> dict[str, type[Event]]:
    found = {root.__name__: root}
    for subclass in root.__subclasses__():
        found |= _event_types(subclass)
    return found


def to_record(event: Event) -> dict[str, Any]:
    """Return `event` as a JSON-ready dictionary with its type under `event`."""
    # Not dataclasses.asdict: it deep-copies, which costs more than the write to the journal.
    return {"event": type(event).__name__} | {f.name: getattr(event, f.name) for f in dataclasses.fields(event)}


def from_record(record: dict[str, Any]) -> Event | None:
    """Return the event that `record` holds, or None for a type of a newer version.

    Raises TypeError where a known type lacks a field.
    """
    name = str(record.get("event"))
    if name not in _FIELDS:
        _FIELDS.update(
            {
                each: (kind, frozenset(f.name for f in dataclasses.fields(kind)))
                for each, kind in _event_types(Event).items()
            }
        )
    if name not in _FIELDS:
        return None
    kind, known = _FIELDS[name]
    return kind(**{key: value for key, value in record.items() if key in known})


# Looked up once: a long journal has tens of thousands of records of a few types.
_FIELDS: dict[str, tuple[type[Event], frozenset[str]]] = {}
