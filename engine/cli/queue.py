"""`lorasmith queue`: several runs, one after another or one a GPU."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.engine.cli.output import columns, say, say_json
from lorasmith.engine.cli.train import Sets
from lorasmith.engine.run_file import load_run_file, parse_assignments, resolve_config

if TYPE_CHECKING:
    from lorasmith.engine.queue_worker import QueueWorker
    from lorasmith.engine.run_file import ResolvedConfig
    from lorasmith.engine.run_folder import RunFolder
    from lorasmith.engine.run_queue import Entry, EntryState

Number = Annotated[int, typer.Argument(metavar="N", help="The number that `lorasmith queue list` shows.")]

queue_app = typer.Typer(
    no_args_is_help=True,
    help="Train several runs, one after another or one a GPU. A run that fails never holds up the others, and the "
    "queue survives a restart of the machine.",
)


@queue_app.command()
def add(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="RUN.toml…", help="Settings of new runs, or folders of runs that are to go on."),
    ],
    sets: Sets = None,
) -> None:
    """Put runs at the end of the queue. Their settings are kept as they are now, whatever happens to the files."""
    from lorasmith.engine.run_folder import create_run
    from lorasmith.engine.run_queue import RunQueue

    queue, sets = RunQueue(), sets or []
    # Everything is checked before anything is added.
    for folder, resolved in [_checked(path, sets) for path in files]:
        run = folder or create_run(resolved)
        entry = queue.add(run)
        say(f"{entry.number}  {run.path}")
    if queue.work.holder() is None:
        say("Nobody works on the queue: `lorasmith queue run` starts it.")


def _checked(path: Path, sets: list[str]) -> tuple[RunFolder | None, ResolvedConfig]:
    """Return the run of a run folder (None for a run file) and the settings; refuses what cannot start."""
    from lorasmith.engine.preflight import require_ready
    from lorasmith.engine.run_folder import open_run

    if path.expanduser().is_dir():
        if sets:
            raise typer.BadParameter("the settings of an existing run stay as they are", param_hint="--set")
        run = open_run(path)
        resolved = run.load_config()
        require_ready(resolved.config)
        return run, resolved
    resolved = resolve_config([load_run_file(path), parse_assignments(sets)])
    require_ready(resolved.config)
    return None, resolved


@queue_app.command("list")
def list_queue(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Show the queue: each run with its number and what became of it."""
    from lorasmith.engine.run_queue import RunQueue, entry_state

    queue = RunQueue()
    found = [(entry, entry_state(entry)) for entry in queue.entries()]
    holder = queue.work.holder()
    if as_json:
        say_json({"worker": holder, "entries": [_parts(entry, state) for entry, state in found]})
        return
    for line in columns([_row(entry, state) for entry, state in found], indent=""):
        print(line)
    if not found:
        say("The queue is empty: `lorasmith queue add RUN.toml` fills it.")
    elif holder is None and any(state.status == "waiting" for _, state in found):
        say("Nobody works on the queue: `lorasmith queue run` starts it.")


def _row(entry: Entry, state: EntryState) -> list[object]:
    words = f"failed: {state.words}" if state.status == "failed" else state.words
    slot = entry.slot if state.status == "running" else ""
    return [entry.number, entry.folder.name, words, slot]


def _parts(entry: Entry, state: EntryState) -> dict[str, Any]:
    return {
        "number": entry.number,
        "run_folder": entry.run,
        "status": state.status,
        "words": state.words,
        "device": entry.slot,
        "added": entry.added,
        "step": state.summary.step if state.summary else None,
        "total_steps": state.summary.total_steps if state.summary else None,
    }


@queue_app.command()
def remove(number: Number) -> None:
    """Take a run out of the queue. Its run folder stays."""
    from lorasmith.engine.run_queue import RunQueue

    entry = RunQueue().remove(number)
    say(f"{number} is out of the queue; its folder stays: {entry.run}")


@queue_app.command()
def move(
    number: Number,
    place: Annotated[int, typer.Argument(metavar="M", help="The number of the run whose place it takes.")],
) -> None:
    """Put run N into the place of run M; numbers stay with their runs."""
    from lorasmith.engine.run_queue import RunQueue

    RunQueue().move(number, place)
    list_queue()


@queue_app.command()
def clear(
    ended: Annotated[bool, typer.Option("--ended", help="Only runs that are finished, stopped or failed.")] = False,
) -> None:
    """Take all runs out of the queue that nobody trains now. Their run folders stay."""
    from lorasmith.engine.run_queue import RunQueue

    gone = RunQueue().clear(ended_only=ended)
    say(f"{len(gone)} run{'' if len(gone) == 1 else 's'} taken out; the run folders stay.")


@queue_app.command("run")
def run_queue(
    devices: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="UUID",
            help="Train one run at a time on this GPU; may be repeated. `all` takes every GPU. Without it, one run at "
            "a time on the device of its own settings.",
        ),
    ] = None,
) -> None:
    """Train what is in the queue, and end when nothing is left. Ctrl-C saves checkpoints; the next call goes on."""
    from lorasmith.engine.queue_worker import QueueWorker, choose_slots
    from lorasmith.engine.run_queue import RunQueue

    worker = QueueWorker(RunQueue(), choose_slots(devices or []), _tell)
    with _signals(worker):
        code = worker.run()
    raise typer.Exit(code)


def _tell(line: str) -> None:
    # The terminal may be gone: the queue goes on all the same.
    with contextlib.suppress(OSError):
        say(f"{time.strftime('%H:%M:%S')}  {line}")


@contextlib.contextmanager
def _signals(worker: QueueWorker) -> Iterator[None]:
    """Let SIGINT and SIGTERM stop the runs with a checkpoint, and a hang-up nothing."""

    def on_stop(number: int, frame: FrameType | None) -> None:
        worker.stop()

    before = {number: signal.signal(number, on_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
