"""`lorasmith doctor`: whether this machine can train, what each finding means, and how to mend it."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Final, TextIO

import typer

from lorasmith.engine.cli.output import say_json, visible
from lorasmith.engine.cli.train import AsJson
from lorasmith.engine.errors import HardwareError

if TYPE_CHECKING:
    from rich.progress import Progress

    from lorasmith.engine.doctor import Check

_NAME_WIDTH: Final = 14
_INDENT: Final = " " * (7 + _NAME_WIDTH)
_FIX: Final = "  fix: "
MAXIMUM_WIDTH: Final = 110


def doctor(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where runs will be made.")] = Path("runs"),
    hub: Annotated[
        bool, typer.Option("--hub", help="Also ask the Hub: reach, token, and models that ask for consent.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Try everything that a training needs on this machine, and say how to mend what fails.

    A failed optional part takes away only its choices. Ends with an error where no training can start.
    """
    from lorasmith.engine.doctor import run_checks

    started = time.monotonic()
    stream = sys.stderr if as_json else sys.stdout
    with _Report(stream, silent=as_json) as report:
        checks = run_checks(output, ask_hub=hub, on_check=report.show, on_start=report.start)
    if as_json:
        say_json([{"group": _group_of(check), **check.to_json()} for check in checks])
    else:
        for line in summary(checks, time.monotonic() - started):
            print(visible(line), flush=True)
    if any(check.blocking for check in checks):
        raise typer.Exit(HardwareError.exit_code)


class _Report:
    """Prints each check under its subject's heading; on a terminal, which check runs and since when."""

    def __init__(self, stream: TextIO, *, silent: bool) -> None:
        self._stream = stream
        self._silent = silent
        self._group = ""
        self._progress: Progress | None = None

    def __enter__(self) -> _Report:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
            self._progress = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._progress.add_task("starting", total=None)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def start(self, name: str) -> None:
        """Show that the check `name` runs now."""
        if self._progress is None:
            return
        if name == "terminal":
            # It draws on the line where the progress is.
            self._progress.stop()
            return
        self._progress.update(self._task, description=f"trying {name}")
        self._progress.start()

    def show(self, check: Check) -> None:
        """Print what a check found."""
        if self._silent:
            return
        group = _group_of(check)
        lines = ([] if group == self._group else ["" if self._group else None, group]) + check_lines(check, _width())
        self._group = group
        for line in lines:
            if line is not None:
                self._print(visible(line))

    def _print(self, line: str) -> None:
        if self._progress is None:
            print(line, file=self._stream, flush=True)
            return
        from rich.text import Text

        self._progress.console.print(Text(line), soft_wrap=True)


def check_lines(check: Check, width: int) -> list[str]:
    """Return a check as lines of at most `width` cells: what was found, what it means, how to mend it.

    The fix is not broken into lines, so that it can be copied whole.
    """
    head = f"{_mark(check):6} {check.name:{_NAME_WIDTH}}"
    lines = _wrapped(check.detail, width, head)
    if check.status != "pass" and check.meaning:
        lines += _wrapped(check.meaning, width, _INDENT)
    if check.fix and check.status in ("warn", "fail"):
        lines.append(f"{_FIX}{check.fix}")
    return lines


def summary(checks: Sequence[Check], seconds: float) -> list[str]:
    """Return what all checks come to: what blocks, what cannot be chosen, and how long it took."""
    from lorasmith.engine.doctor import unusable_choices

    blocking = [check.name for check in checks if check.blocking]
    others = [check.name for check in checks if not check.blocking and check.status in ("warn", "fail")]
    passed = sum(1 for check in checks if check.status == "pass")
    lines = [""]
    lost: dict[str, list[str]] = {}
    for key, value in unusable_choices(checks):
        lost.setdefault(key, []).append(str(value))
    for key, values in lost.items():
        lines += _wrapped(f"{key} {', '.join(values)}", _width(), "Cannot be chosen here: ")
    verdict = f"Mend this before training: {', '.join(blocking)}." if blocking else "This machine can train."
    look = f" To look at: {', '.join(others)}." if others else ""
    counts = f"{passed} of {len(checks)} checks passed in {seconds:.1f} s."
    return [*lines, *_wrapped(f"{verdict} {counts}{look}", _width(), "")]


def _mark(check: Check) -> str:
    if check.status == "fail":
        return "FAILED" if check.blocking else "off"
    return {"pass": "ok", "warn": "look", "skip": "-"}[check.status]


def _group_of(check: Check) -> str:
    from lorasmith.engine.doctor import group_of

    return group_of(check.name)


def _width() -> int:
    return min(MAXIMUM_WIDTH, shutil.get_terminal_size().columns - 1)


def _wrapped(text: str, width: int, head: str) -> list[str]:
    """Return `text` after `head`, its further lines below its first."""
    later = " " * min(len(head), len(_INDENT))
    wrapper = textwrap.TextWrapper(
        max(40, width), initial_indent=head, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.wrap(text) or [head.rstrip()]
