"""`lorasmith inspect`: what a file is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.engine.cli.output import columns, plain, say_json
from lorasmith.engine.errors import BaseModelError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


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
        ("license", str(own or f"{usual.name}: {usual.consequence}")),
    ]
    notes = {"use": module.SPEC.uses.get(identity.variant), "warning": identity.details.get("warning")}
    rows += [(name, str(words)) for name, words in notes.items() if words]
    return {"type": "base"} | plain(identity), rows
