"""`lorasmith plan`: what a run will do and need, before it starts."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic.fields import FieldInfo

from lorasmith.engine.cli.output import columns, say, say_json
from lorasmith.engine.cli.plan_all import require_run_file, show_all, show_fit
from lorasmith.engine.cli.plan_measure import count_step, measured_here, show_measure
from lorasmith.engine.cli.train import Sets
from lorasmith.engine.run_file import load_run_file, parse_assignments, resolve_config, setting_fields

if TYPE_CHECKING:
    from lorasmith.engine.config import BaseSettings, DatasetSettings
    from lorasmith.engine.dataset.items import Dataset
    from lorasmith.engine.families import BaseIdentity
    from lorasmith.engine.sources import BaseFiles

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def plan(
    run_file: Annotated[Path | None, typer.Argument(metavar="[RUN.toml]", help="The settings of the run.")] = None,
    sets: Sets = None,
    as_json: AsJson = False,
    tiers: Annotated[
        bool, typer.Option("--all", help="Show what fits of each base model on each size of card.")
    ] = False,
    family: Annotated[str, typer.Option(metavar="NAME", help="With --all: this family alone.")] = "",
    vram: Annotated[int | None, typer.Option(min=1, metavar="GB", help="With --all: this size of card alone.")] = None,
    goal: Annotated[str, typer.Option(metavar="GOAL", help="With --all: what is learnt.")] = "",
    fit: Annotated[bool, typer.Option("--fit", help="Find the memory settings that are fastest here.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Try each stage once on this machine: real memory and time.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="With --fit: put them into RUN.toml.")] = False,
) -> None:
    """Show what a run will do and need before it starts; without a file, every setting with its default and meaning."""
    if tiers:
        show_all(family, vram, goal, as_json=as_json)
        return
    if run_file is None and not sets and not fit and not measure:
        _show_settings(as_json)
        return
    from lorasmith.engine.plan import build_plan

    layers = ([load_run_file(run_file)] if run_file else []) + [parse_assignments(sets or [])]
    resolved = resolve_config(layers)
    if fit:
        show_fit(resolved, require_run_file(run_file), as_json=as_json, write=write)
        return
    if measure:
        show_measure(resolved, as_json=as_json)
        return
    files, identity = local_base(resolved.config.base)
    dataset = _dataset(resolved.config.dataset)
    if files is not None and identity is not None:
        count_step(resolved.config, files, identity)
    forecast = build_plan(resolved, identity, dataset, files, measured_here(resolved.config, identity))
    if as_json:
        say_json(forecast.to_json())
    else:
        for line in columns([("run", forecast.name), *forecast.rows()], indent=""):
            print(line)


def local_base(settings: BaseSettings) -> tuple[BaseFiles | None, BaseIdentity | None]:
    """Locate and recognize the base model, if it is on this machine: nothing is downloaded."""
    from lorasmith.engine.families import identify_base
    from lorasmith.engine.sources import locate_here

    files = locate_here(settings)
    return files, None if files is None else identify_base(files, settings.family)[1]


def _dataset(settings: DatasetSettings) -> Dataset | None:
    if not settings.folder:
        return None
    from lorasmith.engine.dataset.scan import require_captions, scan_dataset

    return require_captions(scan_dataset(settings), settings)


def _show_settings(as_json: bool) -> None:
    if as_json:
        say_json(
            {
                key: {"default": field.default, "help": _help(field), "allowed": allowed(field)}
                for key, field in setting_fields()
            }
        )
        return
    for key, field in setting_fields():
        choices = allowed(field)
        say(f"{key} = {_as_toml(field.default)}{f'   # {choices}' if choices else ''}")
        say(f"    {_help(field)}")


def _help(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def allowed(field: FieldInfo) -> str:
    """Return the choices or bounds of a setting in words, or nothing where any value goes."""
    annotation: Any = field.annotation
    if typing.get_origin(annotation) is list:
        (annotation,) = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(str(value) for value in typing.get_args(annotation))
    words = {"gt": "more than {}", "ge": "at least {}", "lt": "less than {}", "le": "at most {}"}
    words["multiple_of"] = "a multiple of {}"
    parts = [
        text.format(getattr(bound, name))
        for bound in field.metadata
        for name, text in words.items()
        if hasattr(bound, name)
    ]
    return ", ".join(parts)


def _as_toml(value: Any) -> str:
    import tomlkit

    return str(tomlkit.item(value).as_string())
