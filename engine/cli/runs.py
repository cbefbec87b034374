"""`lorasmith runs` and `lorasmith inspect`: what is on the disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.engine.cli.output import columns, plain, say, say_json
from lorasmith.engine.errors import BaseModelError

if TYPE_CHECKING:
    from lorasmith.engine.session import RunSummary

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="The output folder of the runs.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs of an output folder, the last changed first, with what became of each."""
    from lorasmith.engine.session import list_runs

    found = list_runs(folder)
    if as_json:
        say_json([_summary(summary) for summary in found])
    elif not found:
        say(f"No runs in {folder.absolute()}.")
    else:
        for line in columns([_row(summary) for summary in found], indent=""):
            print(line)


def _summary(summary: RunSummary) -> dict[str, Any]:
    return {
        "folder": str(summary.run.path),
        "state": summary.state,
        "step": summary.step,
        "total_steps": summary.total_steps,
        "checkpoint_step": summary.checkpoint_step,
        "changed": summary.changed,
        "message": summary.message,
        "process": summary.process,
        "exports": [str(path) for path in sorted(summary.run.export.glob("*.safetensors"))],
    }


def _row(summary: RunSummary) -> list[object]:
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(summary.changed))
    files = ", ".join(path.name for path in sorted(summary.run.export.glob("*.safetensors")))
    if not files and summary.checkpoint_step is not None:
        files = f"checkpoint of step {summary.checkpoint_step}"
    return [changed, summary.run.name, summary.describe(), files]


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA file, a base model file or a diffusers folder.")],
    norms: Annotated[bool, typer.Option("--norms", help="Also measure how large the LoRA's change is.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a file is: a LoRA with its layout, rank, alpha and trigger, or a base model."""
    report, rows = _inspect_base(file) if file.is_dir() else _inspect_file(file, norms)
    if as_json:
        say_json(report)
    else:
        for line in columns(rows, indent=""):
            print(line)


def _inspect_file(file: Path, norms: bool) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    from lorasmith.engine.inspect_file import inspect_lora

    try:
        report = inspect_lora(file, with_norms=norms)
    except BaseModelError as no_lora:
        try:
            return _inspect_base(file)
        except BaseModelError:
            raise no_lora from None
    return {"type": "lora"} | report.to_json(), report.rows()


def _inspect_base(path: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    from lorasmith.engine.families import identify_base
    from lorasmith.engine.sources import locate_base

    files = locate_base(str(path))
    module, identity = identify_base(files)
    own, usual = identity.details.get("license"), module.SPEC.license
    rows = [
        ("base model", identity.label),
        ("files", files.describe()),
        ("family", f"{identity.family}, {identity.variant}"),
        ("predicts", identity.prediction),
        ("native resolution", f"{identity.native_resolution} px"),
        ("parameters", f"{identity.parameters / 1e6:.1f} M, {identity.precision}"),
        ("missing", ", ".join(identity.parts_missing) or "nothing"),
        ("license", f"{own}, as its card says" if own else f"{usual.name}: {usual.consequence}"),
    ]
    return {"type": "base"} | plain(identity), rows
