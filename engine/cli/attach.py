"""`lorasmith attach`: see a run of another process again, from any terminal; leaving never touches it."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from lorasmith.engine.cli.output import columns, fail, say, visible
from lorasmith.engine.errors import EXIT_STOPPED, ConfigError, LorasmithError

if TYPE_CHECKING:
    from lorasmith.engine.cli.progress import RunPrinter
    from lorasmith.engine.events import Event, RunEnded
    from lorasmith.engine.run_folder import RunFolder
    from lorasmith.engine.run_watch import RunWatch

READ_SECONDS = 0.2
LOOK_SECONDS = 1.0
PAST_LINES = 10

open_monitor: Callable[[RunFolder, bool], int] | None = None
"""Shows a run on the terminal, read-only or in control, and returns the exit code; the screen puts itself here."""


def attach(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A run folder, a run's name or a unique beginning of it."),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Watch, without keys that command the run.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Print plain lines, as where no terminal is there.")] = False,
    folder: Annotated[Path, typer.Option("--folder", metavar="DIR", help="The output folder of the runs.")] = Path(
        "runs"
    ),
) -> None:
    """Watch and command a training of another process: its monitor, with the whole history.

    Without RUN it is the only one that is going on, wherever its folder is. Leaving (q, Ctrl-C, a closed terminal)
    never touches the training. As plain lines it ends with the run, and with the run's exit code.
    """
    found = choose_run(run, folder)
    if open_monitor is not None and not follow:
        raise typer.Exit(open_monitor(found, read_only))
    raise typer.Exit(follow_run(found, sys.stdout))


def choose_run(text: str | None, folder: Path) -> RunFolder:
    """Return the run that `text` means: in `folder`, or among those going on anywhere; without text the only one.

    Raises ConfigError that lists the candidates where none or several fit.
    """
    from lorasmith.engine.control import running_runs
    from lorasmith.engine.run_actions import resolve_run

    if text is None:
        return _only_one(running_runs())
    try:
        return resolve_run(text, folder)
    except ConfigError:
        named = [run for run in running_runs() if run.name == text or (text and run.name.startswith(text))]
        exact = [run for run in named if run.name == text] or named
        if len(exact) == 1:
            return exact[0]
        if exact:
            raise _several(exact, f"{text} may mean {len(exact)} runs that are going on.") from None
        raise


def _only_one(going_on: list[RunFolder]) -> RunFolder:
    if len(going_on) == 1:
        return going_on[0]
    if going_on:
        raise _several(going_on, f"{len(going_on)} runs are going on.")
    raise ConfigError(
        "No run of yours is going on.",
        fix="`lorasmith runs` lists those that are over; `lorasmith attach RUN` shows one of them.",
    )


def _several(runs: list[RunFolder], what: str) -> ConfigError:
    from lorasmith.engine.run_summary import summarize_run

    rows = [[run.name, summarize_run(run).describe(), run.path.parent] for run in runs]
    return ConfigError(what, why="\n".join(["They are:", *columns(rows, indent="")]), fix="Name one of them.")


def attach_command(run: RunFolder) -> str:
    """Return the command that shows `run` in any terminal of this user while it goes on."""
    return f"lorasmith attach {run.name}"


def follow_run(run: RunFolder, stream: TextIO) -> int:
    """Print what happened to `run` shortly, then its news until it is over; return its exit code.

    Ctrl-C and a reader that goes away leave the run as it is: 130, as for any interrupted command.
    """
    from lorasmith.engine.cli.progress import RunPrinter
    from lorasmith.engine.run_watch import RunWatch

    watch = RunWatch(run)
    try:
        with RunPrinter(stream) as printer:
            _tell_past(watch, printer)
            _tell_news(watch, printer)
        return _tell_end(run, watch, printer, stream)
    except KeyboardInterrupt:
        say(f"The run goes on; attach again with: {attach_command(run)}", to_stderr=True)
    except BrokenPipeError:
        # Whoever read this has enough. Python would write to the pipe once more at its end, and complain.
        sys.stdout = None
    return EXIT_STOPPED


def _tell_past(watch: RunWatch, printer: RunPrinter) -> None:
    """Print the newest start, the last things worth a line, and the last step."""
    from lorasmith.engine.events import HardwareSampled, Progress, RunStarted, StepsDone

    told: deque[tuple[int, Event]] = deque(maxlen=PAST_LINES)
    left_out = 0
    start: RunStarted | None = None
    step: list[tuple[int, Event]] = []
    for number, event in enumerate(event for _, part in watch.past() for event in part):
        if isinstance(event, RunStarted):
            left_out += len(told)
            start, step = event, []
            told.clear()
        elif isinstance(event, StepsDone):
            step = [(number, event)]
        elif not isinstance(event, Progress | HardwareSampled):
            left_out += len(told) == PAST_LINES
            told.append((number, event))
    if start is not None:
        printer.show(start)
    if left_out:
        printer.line(f"  … {left_out} earlier lines are in {watch.run.journal}")
    for _, event in sorted([*told, *step], key=lambda one: one[0]):
        printer.show(event)


def _tell_news(watch: RunWatch, printer: RunPrinter) -> None:
    looked = time.monotonic()
    while not watch.over:
        time.sleep(READ_SECONDS)
        due = time.monotonic() - looked >= LOOK_SECONDS
        if due:
            looked = time.monotonic()
        for event in watch.look() if due else watch.news():
            printer.show(event)


def _tell_end(run: RunFolder, watch: RunWatch, printer: RunPrinter, stream: TextIO) -> int:
    ended = watch.ended
    if ended is None:
        error = interrupted(run)
        fail(error)
        return error.exit_code
    if ended.outcome == "failed":
        fail(_failure(ended))
        return ended.exit_code or LorasmithError.exit_code
    print(f"{visible(ended.message)} Run folder: {visible(run.path)}", file=stream, flush=True)
    for export in printer.exports:
        print(f"LoRA: {visible(export.path)}", file=stream, flush=True)
    return EXIT_STOPPED if ended.outcome == "stopped" else ended.exit_code


def _failure(ended: RunEnded) -> LorasmithError:
    return LorasmithError(ended.message, why=ended.why, fix=ended.fix)


def interrupted(run: RunFolder) -> LorasmithError:
    """Return what to say of a run whose process ended without a word, and how to go on."""
    from lorasmith.engine.run_summary import summarize_run
    from lorasmith.engine.sudden_end import describe_sudden_end

    summary = summarize_run(run)
    if summary.state == "not started":
        return LorasmithError(
            f"The run {run.name} has not started.", fix=f"Start it: lorasmith train --resume {run.path}"
        )
    return LorasmithError(
        f"The run {run.name} is {summary.describe()}.",
        why=describe_sudden_end(run) or "Its process ended without a word; run.log in its folder may say why.",
        fix=f"Go on with it: lorasmith train --resume {run.path}",
    )
