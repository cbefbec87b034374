"""What became of each run, told by its lock and its journal.

No state is ever stored. That somebody works on a run means that a living process holds its lock; what it does there,
and all states of runs that nobody works on, are read from the journal.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lorasmith.engine.errors import StorageError
from lorasmith.engine.events import (
    CheckpointSaved,
    Event,
    Parked,
    Paused,
    Resumed,
    RunEnded,
    RunStarted,
    Stalled,
    StallEnded,
    StepsDone,
)
from lorasmith.engine.journal import replay
from lorasmith.engine.resume import settings_before
from lorasmith.engine.run_folder import RunFolder, is_run
from lorasmith.engine.run_lock import lock_holder

State = Literal[
    "running",
    "paused",
    "parked",
    "stalled",
    "silent",
    "finished",
    "stopped",
    "failed",
    "interrupted",
    "not started",
]
LIVE: frozenset[State] = frozenset({"running", "paused", "parked", "stalled", "silent"})
"""The states of a run that a process works on now."""
SILENT_SECONDS = 60.0
"""A living run writes its gauges every second; after this long without a line something is wrong with it."""
_SUMMARY_EVENTS = frozenset(
    kind.__name__
    for kind in (RunStarted, StepsDone, CheckpointSaved, RunEnded, Paused, Parked, Resumed, Stalled, StallEnded)
)


@dataclass(frozen=True)
class RunSummary:
    """What became of a run, as far as its lock and its journal tell.

    `step` is the last journaled step, `checkpoint_step` the newest checkpoint's (None: none), `changed` the time of the
    last of these events or, before the first, of the folder's last change, `since` that at which `state` began (0.0
    where unknown); `message` says how it ended or why it waits, `process` is the pid of the one that works on it.
    """

    run: RunFolder
    state: State
    step: int = 0
    total_steps: int = 0
    checkpoint_step: int | None = None
    changed: float = 0.0
    message: str = ""
    process: int | None = None
    since: float = 0.0

    @property
    def live(self) -> bool:
        """Whether a process works on the run now."""
        return self.state in LIVE

    def describe(self) -> str:
        """Return the state in words, e.g. "interrupted at step 120 of 300" or "paused at step 7 of 10 since 14:02"."""
        if self.state in ("finished", "not started"):
            return self.state
        words = "no sign of life" if self.state == "silent" else self.state
        of_total = f" of {self.total_steps}" if self.total_steps else ""
        since = f" since {_clock(self.since)}" if self.since and self.live and self.state != "running" else ""
        return f"{words} at step {self.step}{of_total}{since}"


def summarize_run(run: RunFolder) -> RunSummary:
    """Derive the state of `run`; an unreadable journal is said in `message`, never raised."""
    try:
        # Asked before and after: a run that ends or starts while its journal is read must not look interrupted.
        holder = lock_holder(run)
        fold = _Fold(RunSummary(run, "not started", changed=run.path.stat().st_mtime))
        steps = None
        for event in replay(run.journal, only=_SUMMARY_EVENTS):
            if isinstance(event, StepsDone):
                # Most lines are these, and only the last before another event counts.
                steps = event
                continue
            fold, steps = fold.take(steps).take(event), None
        fold = fold.take(steps)
        if holder is None and fold.summary.state == "interrupted":
            holder = lock_holder(run)
    except (StorageError, OSError) as error:
        return RunSummary(run, "interrupted", message=str(error))
    if holder is None:
        return _if_extended(fold.summary)
    pid = holder.get("pid")
    return replace(fold.alive(), process=pid if isinstance(pid, int) else None)


def _if_extended(summary: RunSummary) -> RunSummary:
    """Return a finished run that was extended since then as one that waits to go on."""
    if summary.state != "finished" or not settings_before(summary.run.path, summary.step).exists():
        return summary
    return replace(summary, state="stopped", total_steps=0, message="It was extended; resuming it trains on.")


def list_runs(output_folder: Path) -> list[RunSummary]:
    """Return the runs in `output_folder`, the last changed first; an absent or unreadable folder has none."""
    try:
        folders = [path for path in output_folder.expanduser().absolute().iterdir() if is_run(path)]
    except OSError:
        return []
    return sorted((summarize_run(RunFolder(path)) for path in folders), key=lambda run: run.changed, reverse=True)


@dataclass(frozen=True)
class _Fold:
    """A summary as for a run that nobody works on, and what it would be doing if somebody did."""

    summary: RunSummary
    waiting: Paused | Parked | None = None
    stalled: Stalled | None = None

    def take(self, event: Event | None) -> _Fold:
        """Return the fold with one more event."""
        if event is None:
            return self
        summary = replace(self.summary, changed=event.time)
        if isinstance(event, Paused | Parked):
            return replace(self, summary=replace(summary, step=event.step), waiting=event)
        if isinstance(event, Stalled):
            return replace(self, summary=summary, stalled=event)
        if isinstance(event, StallEnded):
            return replace(self, summary=summary, stalled=None)
        if isinstance(event, CheckpointSaved):
            return replace(self, summary=replace(summary, checkpoint_step=event.step))
        return _Fold(_moved(summary, event))

    def alive(self) -> RunSummary:
        """Return the summary of a run that a process works on now."""
        summary, waiting = replace(self.summary, state="running", message=""), self.waiting
        heard = _last_sign(summary.run)
        if time.time() - heard > SILENT_SECONDS:
            return replace(summary, state="silent", since=heard)
        if self.stalled is not None:
            since = self.stalled.time - self.stalled.seconds
            return replace(summary, state="stalled", since=since, message=self.stalled.where)
        if isinstance(waiting, Paused):
            return replace(summary, state="paused", since=waiting.time, message=waiting.reason)
        if waiting is not None:
            freed = waiting.freed_gib
            message = f"{freed:.1f} GiB of the card are free for others." if freed else ""
            return replace(summary, state="parked", since=waiting.time, message=message)
        return summary


def _moved(summary: RunSummary, event: Event) -> RunSummary:
    if isinstance(event, RunStarted):
        begun = replace(summary, state="interrupted", step=event.resumed_from, total_steps=event.total_steps)
        return replace(begun, message="", since=event.time)
    if isinstance(event, StepsDone):
        return replace(summary, step=event.step)
    if isinstance(event, RunEnded):
        return replace(summary, state=event.outcome, step=event.step, message=event.message, since=event.time)
    return summary


def _last_sign(run: RunFolder) -> float:
    """Return when the journal last grew or, for a process that has just begun, when it locked the run."""
    return max((path.stat().st_mtime for path in (run.journal, run.lock) if path.exists()), default=time.time())


def _clock(moment: float) -> str:
    today = time.strftime("%Y-%m-%d") == time.strftime("%Y-%m-%d", time.localtime(moment))
    return time.strftime("%H:%M" if today else "%Y-%m-%d %H:%M", time.localtime(moment))
