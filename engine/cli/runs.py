"""`lorasmith runs`: what is on the disk of each run, and going on, extending, renaming and deleting."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lorasmith.engine.cli.output import columns, say, say_json, visible
from lorasmith.engine.cli.train import AsJson, Sets, host_run
from lorasmith.engine.run_file import load_run_file, parse_assignments, resolve_config

if TYPE_CHECKING:
    from lorasmith.engine.run_actions import RunSizes
    from lorasmith.engine.run_folder import RunFolder
    from lorasmith.engine.session import RunSummary

Folder = Annotated[Path, typer.Option("--folder", metavar="DIR", help="The output folder of the runs.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a run's name or a unique beginning of it.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]


class _ListByDefault(TyperGroup):
    """Takes anything that is no action for what is to be listed: `runs`, `runs --json`, `runs FOLDER`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


runs_app = typer.Typer(
    cls=_ListByDefault,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="List the runs of an output folder, and go on with, extend, rename or delete one. `lorasmith runs` is short "
    "for `lorasmith runs list`.",
)


@runs_app.command("list")
def list_all(
    output: Annotated[Path | None, typer.Argument(metavar="[FOLDER]", help="The output folder of the runs.")] = None,
    folder: Folder = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the runs, the last changed first, with what became of each and its size on the disk."""
    from lorasmith.engine.run_actions import measure_run
    from lorasmith.engine.session import list_runs

    output = output or folder
    found = [(summary, measure_run(summary.run)) for summary in list_runs(output)]
    if as_json:
        say_json([_record(summary, sizes) for summary, sizes in found])
        return
    if not found:
        say(f"No runs in {output.absolute()}.")
        return
    for line in columns([_row(summary, sizes) for summary, sizes in found], indent=""):
        print(line)
    _explain([summary for summary, _ in found])


@runs_app.command()
def resume(run: Run, sets: Sets = None, folder: Folder = Path("runs"), as_json: AsJson = False) -> None:
    """Go on with a run from its newest checkpoint. Ctrl-C saves a checkpoint and ends."""
    from lorasmith.engine.run_actions import resolve_run

    found = resolve_run(run, folder)
    config = resolve_config([load_run_file(found.run_file), parse_assignments(sets or [])]).config
    raise typer.Exit(host_run(found, config, as_json=as_json))


@runs_app.command()
def extend(
    run: Run,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Steps in all; default: as many as now.")
    ] = None,
    sets: Sets = None,
    yes: Yes = False,
    folder: Folder = Path("runs"),
) -> None:
    """Plan more steps or another learning rate from a run's newest checkpoint on, and say how the schedule changes."""
    from lorasmith.engine.extension import apply_extension, plan_extension
    from lorasmith.engine.run_actions import resolve_run

    found = resolve_run(run, folder)
    extension = plan_extension(found, steps, parse_assignments(sets) if sets else None)
    for sentence in extension.words:
        say(sentence)
    if not _agreed(f"Extend {found.name} so?", yes):
        return
    apply_extension(found, extension)
    say(f"Extended. Train on: lorasmith runs resume {found.path}")


@runs_app.command()
def rename(
    run: Run,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new name; the time in the folder's name stays.")],
    folder: Folder = Path("runs"),
) -> None:
    """Give a run, its folder and its next LoRA file another name; LoRA files that are written already keep theirs."""
    from lorasmith.engine.run_actions import rename_run, resolve_run

    say(f"Renamed: {rename_run(resolve_run(run, folder), name).path}")


@runs_app.command()
def delete(run: Run, yes: Yes = False, folder: Folder = Path("runs")) -> None:
    """Delete a run with its checkpoints, previews and LoRA files; it cannot be brought back."""
    from lorasmith.engine.run_actions import delete_run, measure_run, require_idle, resolve_run

    found = resolve_run(run, folder)
    require_idle(found)
    sizes = measure_run(found)
    for line in _losses(found, sizes):
        say(line)
    if not _agreed(f"Delete {found.name} for ever?", yes):
        return
    delete_run(found)
    say(f"Deleted: {found.path}")


def _losses(run: RunFolder, sizes: RunSizes) -> list[str]:
    from lorasmith.engine.storage import readable_size

    lines = [f"{run.path}: {readable_size(sizes.total)} ({sizes.describe()})"]
    return lines + [f"It holds the LoRA {path}" for path in _exports(run)]


def _agreed(question: str, yes: bool) -> bool:
    """Ask on the terminal; without one, only `--yes` is an answer."""
    if yes:
        return True
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise typer.BadParameter("nobody can be asked here; give --yes to do it", param_hint="--yes")
    try:
        answer = input(f"{visible(question)} [y/N] ")
    except EOFError:
        answer = ""
    agreed = answer.strip().lower() in ("y", "yes")
    if not agreed:
        say("Nothing was changed.")
    return agreed


def _record(summary: RunSummary, sizes: RunSizes) -> dict[str, Any]:
    return {
        "folder": str(summary.run.path),
        "state": summary.state,
        "step": summary.step,
        "total_steps": summary.total_steps,
        "checkpoint_step": summary.checkpoint_step,
        "changed": summary.changed,
        "message": summary.message,
        "process": summary.process,
        "bytes": {
            "total": sizes.total,
            "checkpoints": sizes.checkpoints,
            "previews": sizes.previews,
            "export": sizes.export,
            "other": sizes.other,
        },
        "exports": [str(path) for path in _exports(summary.run)],
    }


def _row(summary: RunSummary, sizes: RunSizes) -> list[object]:
    from lorasmith.engine.storage import readable_size

    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(summary.changed))
    files = ", ".join(path.name for path in _exports(summary.run))
    if not files and summary.checkpoint_step is not None:
        files = f"checkpoint of step {summary.checkpoint_step}"
    return [changed, summary.run.name, summary.describe(), readable_size(sizes.total), files]


def _explain(found: list[RunSummary]) -> None:
    """Say below the list why runs failed or wait, and how to go on with those that ended early."""
    told = [summary for summary in found if summary.message and summary.state not in ("finished", "stopped")]
    for summary in told:
        say(f"{summary.run.name}: {summary.message}")
    if any(summary.state in ("interrupted", "stopped") for summary in found):
        say("Interrupted and stopped runs go on from their newest checkpoint: lorasmith runs resume RUN")


def _exports(run: RunFolder) -> list[Path]:
    return sorted(run.export.glob("*.safetensors"))
