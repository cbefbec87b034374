"""`lorasmith check`: what a training would make of a folder of pictures, without a run file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.engine.cli.output import columns, say, say_json
from lorasmith.engine.run_file import Layer, resolve_config

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.dataset.buckets import BucketPlan
    from lorasmith.engine.dataset.items import Dataset, ImageItem
    from lorasmith.engine.families import BaseIdentity, FamilyModule
    from lorasmith.engine.sources import BaseFiles

_SAMPLE_CAPTIONS = 3


def check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder with the pictures; only read.")],
    base: Annotated[str, typer.Option(help="Also count tokens with this base model's tokenizer.")] = "",
    trigger: Annotated[str, typer.Option(help="The trigger word, to show the captions as they are trained.")] = "",
    resolution: Annotated[int | None, typer.Option(help="Training resolution in pixels.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Read every picture and caption of a folder and show buckets, captions and what is refused and why."""
    from lorasmith.engine.dataset.buckets import plan_buckets
    from lorasmith.engine.dataset.scan import scan_dataset
    from lorasmith.engine.families import identify_base
    from lorasmith.engine.sources import locate_base

    files = locate_base(base) if base else None
    module, identity = identify_base(files) if files else (None, None)
    config = _settings(folder, trigger, resolution, identity)
    dataset = scan_dataset(config.dataset)
    plan = plan_buckets(dataset.items, config.dataset, module.SPEC.pixel_multiple if module else 8)
    report = _report(config, dataset, plan)
    if files and module and identity:
        report["base"] = identity.label
        report["tokens"] = _count_tokens(module, files, config, dataset)
    if as_json:
        say_json(report)
    else:
        _show(report)


def _settings(folder: Path, trigger: str, resolution: int | None, identity: BaseIdentity | None) -> RunConfig:
    side = resolution or (identity.native_resolution if identity else None)
    dataset: dict[str, Any] = {"folder": str(folder)} | ({"resolution": side} if side else {})
    return resolve_config([Layer("command line", {"dataset": dataset, "captions": {"trigger": trigger}})]).config


def _report(config: RunConfig, dataset: Dataset, plan: BucketPlan) -> dict[str, Any]:
    missing = [item.relative for item in dataset.items if item.caption is None]
    return {
        "folder": str(dataset.folder),
        "found": dataset.found,
        "accepted": len(dataset.items),
        "refused": [{"file": refusal.relative, "reason": refusal.reason} for refusal in dataset.refused],
        "captions_missing": missing,
        "notes": [{"file": item.relative, "note": note} for item in dataset.items for note in item.notes],
        "resolution": config.dataset.resolution,
        "buckets": plan.counts(),
        "largest_crop": max((sample.crop_loss for sample in plan.samples), default=0.0),
        "enlarged": sum(sample.scale > 1.0 for sample in plan.samples),
        "captions": [
            {"file": item.relative, "caption": _as_trained(item, config)} for item in dataset.items[:_SAMPLE_CAPTIONS]
        ],
    }


def _as_trained(item: ImageItem, config: RunConfig) -> str:
    from lorasmith.engine.dataset.captions import compose

    return compose(item.caption, config.captions.trigger, item.regularization)


def _count_tokens(module: FamilyModule, files: BaseFiles, config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """Return the longest caption in tokens, and the captions that the text encoder would cut off."""
    tokenizers = module.load_tokenizers(files)
    counts = {
        item.relative: max(len(tokenizer(_as_trained(item, config)).input_ids) for tokenizer in tokenizers)
        for item in dataset.items
    }
    limit = module.SPEC.token_limit
    return {
        "limit": limit,
        "longest": max(counts.values(), default=0),
        "too_long": [name for name, count in counts.items() if count > limit],
    }


def _show(report: dict[str, Any]) -> None:
    say(f"{report['folder']}: {report['found']} files, {report['accepted']} accepted, {len(report['refused'])} refused")
    if "base" in report:
        say(f"Base model: {report['base']}")
    say(f"Buckets at {report['resolution']} px:")
    for line in columns([[name, f"{count} pictures"] for name, count in report["buckets"].items()]):
        print(line)
    if report["largest_crop"] > 0:
        say(f"Largest crop: {report['largest_crop']:.0%} of a picture")
    if report["enlarged"]:
        say(f"{report['enlarged']} pictures are smaller than their bucket and get enlarged")
    _show_list("Captions as trained:", [[entry["file"], entry["caption"]] for entry in report["captions"]])
    if tokens := report.get("tokens"):
        say(f"Longest caption: {tokens['longest']} of {tokens['limit']} tokens")
        _show_list("Cut off at the end:", [[name] for name in tokens["too_long"]])
    if missing := report["captions_missing"]:
        say(
            f"{len(missing)} pictures have no caption: write it, or set dataset.missing_captions to trigger or exclude:"
        )
        _show_list("", [[name] for name in missing])
    _show_list("Notes:", [[entry["file"], entry["note"]] for entry in report["notes"]])
    _show_list("Refused:", [[entry["file"], entry["reason"]] for entry in report["refused"]])


def _show_list(title: str, rows: list[list[str]]) -> None:
    if rows and title:
        say(title)
    for line in columns(rows):
        print(line)
