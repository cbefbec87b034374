"""How a run is shown without a screen: one line an event, with a moving bar where stdout is a terminal."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from lorasmith.engine import events
from lorasmith.engine.cli.output import visible
from lorasmith.engine.event_words import describe_event

SECONDS_BETWEEN_LINES = 5.0

logger = logging.getLogger("lorasmith.run")


def duration(seconds: float) -> str:
    """Return a duration in words of at most two units: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(num_bytes: float) -> str:
    """Return a size in KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


class RunPrinter:
    """Prints the events of one run; `stream` is stderr when stdout belongs to a JSON document."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """Show a bar if `stream` is a terminal."""
        self.total_steps = 0
        self.ended: events.RunEnded | None = None
        self.exports: list[events.ExportDone] = []
        self.last_loss: float | None = None
        self._stream = stream
        self._clock = clock
        self._last_line = float("-inf")
        self._bar = _Bar(stream) if stream.isatty() else None
        self._to_log = False

    def __enter__(self) -> RunPrinter:
        """Start the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def show(self, event: events.Event) -> None:
        """Print what the event says, if it is worth a line."""
        self._remember(event)
        if self._bar is not None:
            self._bar.update(event, self.total_steps)
        if self._is_due(event) and (line := self._line(event)):
            self.line(line)
        if self._to_log and isinstance(event, events.RunEnded):
            self.line(event.message)

    def line(self, text: str) -> None:
        """Print one line above the bar."""
        if self._to_log:
            logger.info("%s", text.strip())
        elif self._bar is not None:
            self._bar.print(visible(text))
        else:
            print(visible(text), file=self._stream, flush=True)

    def go_to_log(self) -> None:
        """Show no more than what a log is for, and there: nobody watches any more."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None
        self._to_log = True

    def hide(self) -> None:
        """Leave the terminal as it was while the process is stopped."""
        if self._bar is not None:
            self._bar.stop()

    def show_again(self) -> None:
        """Draw the bar again after `hide`."""
        if self._bar is not None:
            self._bar.start()

    def _remember(self, event: events.Event) -> None:
        match event:
            case events.RunStarted():
                self.total_steps = event.total_steps
            case events.StepsDone():
                self.last_loss = event.losses[-1] if event.losses else self.last_loss
            case events.ExportDone():
                self.exports.append(event)
            case events.RunEnded():
                self.ended = event

    def _is_due(self, event: events.Event) -> bool:
        """Whether a frequent event gets a line: the last one always, others now and then, none beside a bar."""
        if isinstance(event, events.StepsDone):
            last = event.step >= self.total_steps
        elif isinstance(event, events.Progress):
            last = event.done >= event.total
        else:
            return True
        if self._bar is not None or self._to_log:
            return False
        now = self._clock()
        if not last and now - self._last_line < SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True

    def _line(self, event: events.Event) -> str:
        match event:
            case events.RunStarted():
                resumed = f", resumed at step {event.resumed_from}" if event.resumed_from else ""
                return f"Run {event.run} on {event.device}: {event.total_steps} steps{resumed}"
            case events.StageChanged():
                return f"· {event.label}"
            case events.Progress():
                left = f", {duration(event.seconds_left)} left" if event.seconds_left else ""
                return f"  {event.label}: {event.done} of {event.total}{left}"
            case events.DatasetReady():
                buckets = ", ".join(f"{name}: {count}" for name, count in event.buckets.items())
                return (
                    f"  {event.images} pictures, {event.regularization} of regularization, {event.refused} refused; "
                    f"buckets {buckets}; {event.steps_per_epoch} steps an epoch"
                )
            case events.StepsDone():
                return self._step_line(event)
            case _:
                return _rare_line(event)

    def _step_line(self, event: events.StepsDone) -> str:
        share = event.step / self.total_steps if self.total_steps else 0.0
        left = duration((self.total_steps - event.step) * event.seconds_per_step)
        loss = f"loss {event.losses[-1]:.4f}  " if event.losses else ""
        return (
            f"  step {event.step}/{self.total_steps} ({share:.0%})  {loss}lr {event.learning_rate:.2e}  "
            f"{event.seconds_per_step:.3f} s/step  {left} left"
        )


def _rare_line(event: events.Event) -> str:
    match event:
        case events.Validated():
            levels = ", ".join(
                f"{level:.0%} {loss:.4f}" for level, loss in zip(event.levels, event.losses, strict=True)
            )
            return f"  validation at step {event.step}: loss {event.mean:.4f}; by noise: {levels}"
        case events.CheckpointSaved():
            return f"  checkpoint of step {event.step}: {event.path} ({size(event.bytes)}, {event.seconds:.1f} s)"
        case events.PreviewReady():
            return f"  preview of step {event.step}: {event.path}"
        case events.ExportDone():
            loads = f"; loads in {', '.join(event.programs)}" if event.programs else ""
            return f"  LoRA ({event.layout}, {event.keys} keys proved): {event.path} ({size(event.bytes)}{loads})"
        case events.Paused():
            return f"  paused at step {event.step}" + (f": {event.reason}" if event.reason else "")
        case events.Resumed():
            return f"  goes on at step {event.step}"
        case events.CommandReceived():
            return f"  {event.command} at step {event.step}"
        case events.Logged():
            return f"  {event.severity}: {event.message}"
        case (
            events.Parked()
            | events.NotFinite()
            | events.RolledBack()
            | events.MemoryReduced()
            | events.Stalled()
            | events.StallEnded()
        ):
            return f"  {describe_event(event)}"
        case _:
            return ""


class _Bar:
    """A rich progress bar over the steps of the current stage."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console, ConsoleDimensions
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        class OfStream(Console):
            @property  # type: ignore[misc]
            def size(self) -> ConsoleDimensions:
                # rich asks the descriptors 0 to 2, which are no terminal while stray output is kept off it.
                try:
                    return ConsoleDimensions(*os.get_terminal_size(stream.fileno()))
                except (OSError, ValueError):
                    return super().size

        self._console = OfStream(file=stream, markup=False, highlight=False, emoji=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            # rich would print above the bar what any library prints.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("starting", total=None)

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def advance(self, label: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=visible(label), completed=done, total=total)

    def update(self, event: events.Event, total_steps: int) -> None:
        if isinstance(event, events.StepsDone):
            loss = f"loss {event.losses[-1]:.4f}" if event.losses else "training"
            self._progress.update(self._task, description=loss, completed=event.step, total=total_steps)
        elif isinstance(event, events.Progress):
            self.advance(event.label, event.done, event.total)
        elif isinstance(event, events.StageChanged):
            self._progress.update(self._task, description=visible(event.label), completed=0, total=None)


def default_stream(as_json: bool) -> TextIO:
    """Return where progress goes: stdout, or stderr when stdout belongs to a JSON document."""
    return sys.stderr if as_json else sys.stdout


class FileProgress:
    """A moving bar with the time left, on stderr, for work on many files that takes longer than a moment."""

    PATIENCE_SECONDS = 1.0

    def __init__(self, label: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Show nothing yet, and nothing at all where `stream` is no terminal."""
        self._label = label
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start = clock()
        self._bar: _Bar | None = None

    def __enter__(self) -> FileProgress:
        """Start the clock."""
        self._start = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Tell how many of how many files are done."""
        if self._bar is None:
            if self._clock() - self._start < self.PATIENCE_SECONDS or not self._stream.isatty():
                return
            self._bar = _Bar(self._stream)
            self._bar.start()
        self._bar.advance(self._label, done, total)
