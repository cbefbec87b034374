"""`lorasmith train` and `lorasmith demo`: a run in this process, without a screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.engine.cli.hosting import Hosting, open_output
from lorasmith.engine.cli.output import error_parts, fail, say_json, visible
from lorasmith.engine.cli.progress import RunPrinter, default_stream, duration
from lorasmith.engine.errors import EXIT_STOPPED, ConfigError, LorasmithError
from lorasmith.engine.run_file import Layer, flatten, load_run_file, parse_assignments, resolve_config
from lorasmith.engine.running_clock import running_seconds

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.events import RunEnded
    from lorasmith.engine.session import RunFolder

NEWEST = "newest"
"""The value of `--resume` that means the newest run of that name."""

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. train.steps=500; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and progress on stderr.")]


def train(
    run_file: Annotated[Path | None, typer.Argument(metavar="RUN.toml", help="The settings of the run.")] = None,
    sets: Sets = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[RUNFOLDER]",
            help="Go on with that run; without a folder, with the newest run of the run file's name.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA. Ctrl-C saves a checkpoint and ends; a second Ctrl-C ends at once.

    Training outlives its terminal; `lorasmith attach` shows it again. SIGUSR1 saves a checkpoint.
    """
    if resume is None:
        folder, config = _new_run(run_file, sets or [])
    else:
        folder, config = _old_run(run_file, sets or [], resume)
    raise typer.Exit(host_run(folder, config, as_json=as_json))


def _new_run(run_file: Path | None, sets: list[str]) -> tuple[RunFolder, RunConfig]:
    from lorasmith.engine.preflight import require_ready, require_usable
    from lorasmith.engine.session import create_run

    if run_file is None:
        raise typer.BadParameter("give the settings to train: lorasmith train RUN.toml", param_hint="RUN.toml")
    resolved = resolve_config([load_run_file(run_file), parse_assignments(sets)])
    require_ready(resolved.config)
    require_usable(resolved.config)
    return create_run(resolved), resolved.config


def _old_run(run_file: Path | None, sets: list[str], resume: str) -> tuple[RunFolder, RunConfig]:
    from lorasmith.engine.preflight import require_usable
    from lorasmith.engine.session import open_run

    if resume != NEWEST:
        folder = open_run(Path(resume))
    elif run_file is None:
        raise typer.BadParameter("give the run folder, or RUN.toml as well", param_hint="--resume")
    else:
        folder = open_run(_newest_run(run_file, sets))
    stored = load_run_file(folder.run_file)
    layers = [stored, *([load_run_file(run_file)] if run_file else []), parse_assignments(sets)]
    config = resolve_config(layers).config
    require_usable(config)
    return folder, config


def _newest_run(run_file: Path, sets: list[str]) -> Path:
    """Return the last changed run folder that a run of these settings has made."""
    from lorasmith.engine.session import list_runs

    settings = resolve_config([load_run_file(run_file), parse_assignments(sets)]).config.run
    for summary in list_runs(Path(settings.output_folder)):
        if _stored_name(summary.run.run_file) == settings.name:
            return summary.run.path
    raise ConfigError(
        f"No run named {settings.name} is in {settings.output_folder}.",
        fix="Leave out --resume to start it, or give the run folder: --resume RUNFOLDER.",
    )


def _stored_name(run_file: Path) -> str:
    try:
        return str(flatten(load_run_file(run_file).values).get("run.name", ""))
    except ConfigError:
        return ""


def host_run(folder: RunFolder, config: RunConfig, *, as_json: bool = False) -> int:
    """Run the training of `folder` to its end, print its events and return the exit code."""
    from lorasmith.engine.session import Session

    started = running_seconds()
    session = Session(folder, config)
    with open_output(folder.log, as_json=as_json) as stream, RunPrinter(stream) as printer:
        Hosting(session, folder, printer, stream).run()
    return _report(folder, printer, running_seconds() - started, as_json)


def _report(folder: RunFolder, printer: RunPrinter, seconds: float, as_json: bool) -> int:
    ended = printer.ended
    if ended is None:
        raise RuntimeError(f"the run in {folder.path} ended without saying how")
    if as_json:
        say_json(_summary(folder, printer, seconds))
    stream = default_stream(as_json)
    if ended.outcome == "failed":
        fail(_failure(ended))
        return ended.exit_code or 1
    print(f"{visible(ended.message)} ({duration(seconds)})", file=stream)
    print(f"Run folder: {visible(folder.path)}", file=stream)
    for export in printer.exports:
        print(f"LoRA: {visible(export.path)}", file=stream)
    if sheet := _preview_sheet(folder, ended):
        print(f"Preview sheet: {visible(sheet)}", file=stream)
    return EXIT_STOPPED if ended.outcome == "stopped" else 0


def _preview_sheet(folder: RunFolder, ended: RunEnded) -> str:
    """Return the sheet of all previews; a run that was not finished, or drew none, has no sheet."""
    from lorasmith.engine.preview_sheet import SHEET_NAME

    path = folder.previews / SHEET_NAME
    return str(path) if ended.outcome == "finished" and path.is_file() else ""


def _failure(ended: RunEnded) -> LorasmithError:
    return LorasmithError(ended.message, why=ended.why, fix=ended.fix)


def _summary(folder: RunFolder, printer: RunPrinter, seconds: float) -> dict[str, Any]:
    assert printer.ended is not None
    ended = printer.ended
    return {
        "run_folder": str(folder.path),
        "outcome": ended.outcome,
        "step": ended.step,
        "total_steps": printer.total_steps,
        "loss": printer.last_loss,
        "seconds": round(seconds, 3),
        "exports": [{"path": e.path, "layout": e.layout, "keys": e.keys, "bytes": e.bytes} for e in printer.exports],
        "preview_sheet": _preview_sheet(folder, ended),
        "message": ended.message,
        "exit_code": ended.exit_code,
        **({"error": error_parts(_failure(ended), ended.exit_code)} if ended.outcome == "failed" else {}),
    }


def demo(
    headless: Annotated[bool, typer.Option("--headless", help="Train without the wizard.")] = False,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder in which the run folder is made.")] = Path("runs"),
    sets: Sets = None,
) -> None:
    """Train the bundled demo in a few minutes and measure whether its trigger word works.

    On a terminal and without --headless the wizard opens instead.
    """
    from lorasmith.engine.demo_run import report_trigger, resolve_demo
    from lorasmith.engine.preflight import require_ready
    from lorasmith.engine.session import create_run

    layer = Layer("--output", {"run": {"output_folder": str(output)}})
    resolved = resolve_demo(layer, parse_assignments(sets or []))
    require_ready(resolved.config)
    folder = create_run(resolved)
    code = host_run(folder, resolved.config)
    if code == 0:
        code = report_trigger(folder, resolved.config, lambda line: print(visible(line), flush=True))
    raise typer.Exit(code)
