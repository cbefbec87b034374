"""`lorasmith check`: everything that a training would make of a folder of pictures, before it starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.engine.cli.check_report import CheckReport, print_report
from lorasmith.engine.cli.output import say_json
from lorasmith.engine.cli.progress import FileProgress
from lorasmith.engine.cli.train import Sets
from lorasmith.engine.errors import ConfigError, DatasetError, StorageError
from lorasmith.engine.run_file import Layer, load_run_file, parse_assignments, resolve_config

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.dataset.items import Dataset
    from lorasmith.engine.families import BaseIdentity, FamilyModule
    from lorasmith.engine.sources import BaseFiles

NUM_SAMPLES = 3


@dataclass(frozen=True)
class _Base:
    """A located base model and what it is."""

    files: BaseFiles
    module: FamilyModule
    identity: BaseIdentity


def check(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="The folder with the pictures, a ZIP or a Kohya .toml; only read."),
    ] = None,
    run: Annotated[Path | None, typer.Option(metavar="RUN.toml", help="Take the settings of a run file.")] = None,
    base: Annotated[str, typer.Option(help="Check for this base model, and count tokens with its tokenizers.")] = "",
    goal: Annotated[str, typer.Option(help="What is to be learnt, e.g. character or style.")] = "",
    trigger: Annotated[str, typer.Option(help="The trigger word; it is checked too.")] = "",
    resolution: Annotated[int | None, typer.Option(help="Training resolution in pixels.")] = None,
    sets: Sets = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also write all pictures with their findings as PNG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Read every picture and caption of a folder and report what is wrong, why, and what to do.

    Ends with 0, or with 5 where something keeps a training from starting (findings marked error).
    """
    if folder is None and run is None:
        raise typer.BadParameter("give the folder with the pictures, or --run RUN.toml", param_hint="FOLDER")
    given = _given(folder, base, trigger, resolution)
    config, found_base = _resolve([load_run_file(run)] if run else [], [given, parse_assignments(sets or [])], goal)
    if sheet is not None:
        _require_sheet_place(sheet, [config.dataset.folder, *config.dataset.more_folders])
    report = _examine(config, found_base, goal, sheet)
    if as_json:
        say_json(report.to_json())
    else:
        print_report(report)
    if report.num_errors:
        raise typer.Exit(DatasetError.exit_code)


def _given(folder: Path | None, base: str, trigger: str, resolution: int | None) -> Layer:
    values: dict[str, dict[str, Any]] = {"dataset": {}, "captions": {}, "base": {}}
    if folder is not None:
        values["dataset"]["folder"] = str(folder)
    if resolution is not None:
        values["dataset"]["resolution"] = resolution
    if trigger:
        values["captions"]["trigger"] = trigger
    if base:
        values["base"]["model"] = base
    return Layer("command line", {section: settings for section, settings in values.items() if settings})


def _resolve(run_file: Sequence[Layer], given: Sequence[Layer], goal: str) -> tuple[RunConfig, _Base | None]:
    """Return the settings; those that nobody gave are as the wizard would recommend them for the base and goal."""
    from lorasmith.engine import advisor

    config = resolve_config([*run_file, *given]).config
    asked_for = any("model" in layer.values.get("base", {}) for layer in given)
    base = _find_base(config, asked_for)
    family = base.identity.family if base else ""
    _require_goal(goal, family)
    if base is None or run_file:
        return config, base
    advice = advisor.recommend(
        family, goal or next(iter(advisor.goals(family))), 1, base.identity.native_resolution, None
    )
    return resolve_config([*advisor.as_layers(advice), *given]).config, base


def _find_base(config: RunConfig, asked_for: bool) -> _Base | None:
    """Return the base model; one that only the run file names is not downloaded for a check."""
    from lorasmith.engine.cli.plan import local_base
    from lorasmith.engine.families import families, identify_base
    from lorasmith.engine.sources import locate_configured

    if not asked_for:
        files, identity = local_base(config.base)
        return _Base(files, families()[identity.family], identity) if files and identity else None
    files = locate_configured(config.base)
    module, identity = identify_base(files, config.base.family)
    return _Base(files, module, identity)


def _require_goal(goal: str, family: str) -> None:
    from lorasmith.engine import advisor
    from lorasmith.engine.families import families

    known = dict.fromkeys(name for each in ([family] if family else sorted(families())) for name in advisor.goals(each))
    if goal and goal not in known:
        raise ConfigError(f"Unknown goal {goal}.", fix=f"Known goals: {', '.join(known)}.")


def _examine(config: RunConfig, base: _Base | None, goal: str, sheet: Path | None) -> CheckReport:
    from lorasmith.engine.dataset.buckets import plan_buckets
    from lorasmith.engine.dataset.captions import sample_prompts
    from lorasmith.engine.dataset.check import build_context, caption_statistics, check_dataset
    from lorasmith.engine.dataset.scan import scan_dataset
    from lorasmith.engine.dataset.triggers import read_word

    with FileProgress("reading pictures") as progress:
        dataset = _with_overlay_note(scan_dataset(config.dataset, progress.update), config)
    used = _used(dataset, config)
    spec = base.module.SPEC if base else None
    tokenizers = base.module.load_tokenizers(base.files) if base else []
    plan = plan_buckets(used.items, config.dataset, spec.pixel_multiple if spec else 8, config.run.seed)
    label = base.identity.label if base else ""
    context = build_context(config, spec=spec, label=label, tokenizers=tokenizers, goal=goal)
    findings = tuple(check_dataset(dataset, plan, context))
    prompts = sample_prompts(used.items, config.captions, config.run.seed, NUM_SAMPLES)
    trigger = config.captions.trigger.strip()
    return CheckReport(
        config,
        context,
        dataset,
        plan,
        findings,
        caption_statistics(dataset, context),
        prompts=tuple((item.relative, text) for item, text in prompts),
        words=tuple(read_word(tokenizer, trigger) for tokenizer in tokenizers) if trigger else (),
        sheets=_write_sheets(dataset, findings, sheet) if sheet else (),
    )


def _with_overlay_note(dataset: Dataset, config: RunConfig) -> Dataset:
    """Say that there are edited captions where no setting names them."""
    from lorasmith.engine.dataset.overlay import default_overlay

    edits = default_overlay(Path(config.dataset.folder))
    if config.dataset.overlay or not edits.is_file():
        return dataset
    note = f"{edits} has edited captions, which do not count here: add --set dataset.overlay={edits}"
    return replace(dataset, notes=(*dataset.notes, note))


def _used(dataset: Dataset, config: RunConfig) -> Dataset:
    """Return the pictures with the captions that they would be trained with; where a question is open, all of them."""
    from lorasmith.engine.dataset.scan import require_captions

    try:
        return require_captions(dataset, config.dataset)
    except DatasetError:
        return dataset  # the findings say what is open


def _write_sheets(dataset: Dataset, findings: Sequence[Any], sheet: Path) -> tuple[Path, ...]:
    from lorasmith.engine.dataset.contact_sheet import write_contact_sheets

    # Once more: a Kohya file names its folders only inside.
    _require_sheet_place(sheet, {str(item.path.parent) for item in dataset.items})
    with FileProgress("drawing the contact sheet") as progress:
        return tuple(write_contact_sheets(dataset, findings, sheet, progress.update))


def _require_sheet_place(sheet: Path, folders: Sequence[str] | set[str]) -> None:
    """Refuse a place that cannot be written to, or that belongs to the dataset, before pictures are read for it."""
    place = sheet.expanduser().resolve()
    for folder in filter(None, folders):
        if place.is_relative_to(Path(folder).expanduser().resolve()):
            raise ConfigError(
                f"The contact sheet {sheet} would be inside the dataset.",
                why="A dataset is only read: the sheet would become one of its pictures.",
                fix="Choose a place outside of it.",
            )
    if place.suffix.lower() != ".png" or place.is_dir():
        raise ConfigError(f"The contact sheet {sheet} is no PNG file.", fix="Give it a name such as sheet.png.")
    if not place.parent.is_dir() or not os.access(place.parent, os.W_OK | os.X_OK):
        raise StorageError(
            f"The contact sheet {sheet} cannot be written.",
            why=f"{place.parent} is no folder that may be written to.",
            fix="Choose another place.",
        )
