"""`lorasmith export`: a shareable LoRA from a checkpoint, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.engine.cli.output import say, say_json
from lorasmith.engine.errors import CheckpointError, ConfigError, LorasmithError
from lorasmith.engine.run_file import Layer, flatten, resolve_config

if TYPE_CHECKING:
    from lorasmith.engine.checkpoints import Checkpoint
    from lorasmith.engine.config import ExportSettings, RunConfig
    from lorasmith.engine.export import DatasetFacts, ExportResult
    from lorasmith.engine.session import RunFolder


def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUNFOLDER", help="A run with a checkpoint.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint of this step; else the newest intact one.")] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(help="kohya, diffusers or comfyui, as the base model has; may be repeated. Else the run's own."),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16. Else the run's own.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write. Else the run's export folder.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="The last step's weights, where the run averages them (train.ema_decay).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write the LoRA of a checkpoint, prove it by loading it, and say where it is."""
    from lorasmith.engine.session import open_run, quiet_libraries

    quiet_libraries()
    run = open_run(run_folder)
    checkpoint = _find(run, step)
    changes = ({"layouts": layout} if layout else {}) | ({"precision": precision} if precision else {})
    stored = Layer("checkpoint", flatten(checkpoint.state["config"]))
    config = resolve_config([stored, Layer("command line", {"export": changes})]).config
    usual = resolve_config([stored]).config.export
    results = _write(run, checkpoint, config, output or run.export, usual, raw=raw)
    if as_json:
        say_json([{"step": checkpoint.step, "path": str(r.path), "layout": r.layout, "keys": r.keys} for r in results])
        return
    for result in results:
        say(f"LoRA of step {checkpoint.step} ({result.layout}, {result.keys} keys proved): {result.path}")


def _find(run: RunFolder, step: int | None) -> Checkpoint:
    """Return the verified checkpoint of `step`, or the newest; damaged ones are named on stderr."""
    from lorasmith.engine.checkpoints import load_checkpoint, newest_checkpoint

    if step is not None:
        return load_checkpoint(run.checkpoints, step)

    def on_unfit(path: Path, reason: str) -> None:
        say(f"The checkpoint {path} is not used: {reason}.", to_stderr=True)

    checkpoint = newest_checkpoint(run.checkpoints, on_unfit)
    if checkpoint is None:
        raise CheckpointError(
            f"{run.path} has no intact checkpoint.",
            fix="Train it until its first checkpoint: lorasmith train --resume RUNFOLDER.",
        )
    return checkpoint


def _write(
    run: RunFolder, checkpoint: Checkpoint, config: RunConfig, folder: Path, usual: ExportSettings, *, raw: bool
) -> list[ExportResult]:
    """Export; the layout that the run itself writes first keeps the plain name, so that no other takes its place."""
    import torch

    from lorasmith.engine.adapters import attach_adapter
    from lorasmith.engine.compatibility import chosen_layouts, require_compatible
    from lorasmith.engine.export import build_metadata, export_lora
    from lorasmith.engine.families import identify_base
    from lorasmith.engine.sources import locate_configured

    files = locate_configured(config.base)
    module, identity = identify_base(files, config.base.family)
    require_compatible(config, module.SPEC)
    family = module.load(files, identity, torch.device("cpu"), torch.float32)
    adapter = attach_adapter(family, config.adapter, config.run.seed)
    averaged = "ema" in checkpoint.groups and not raw
    adapter.load_state_dict(checkpoint.tensors("ema" if averaged else "adapter"))
    adapter.train(False)
    # Neither an earlier step, nor other weights, must take the place of the finished LoRA.
    name = config.run.name
    if checkpoint.step != _planned_steps(run, config):
        name += f"-step-{checkpoint.step:06d}"
    if "ema" in checkpoint.groups and raw:
        name += "-raw"
    metadata = build_metadata(config, identity, _facts(config, module.SPEC.pixel_multiple), step=checkpoint.step)
    plain = chosen_layouts(usual, module.SPEC)[0]
    return export_lora(family, adapter, config, folder, name, metadata, checkpoint.step, plain_layout=plain)


def _planned_steps(run: RunFolder, config: RunConfig) -> int:
    """Return the steps of the whole run, which may have been extended since the checkpoint of `config`."""
    try:
        return run.load_config().config.train.steps
    except ConfigError:
        # Exporting needs no run file: the checkpoint has its own settings.
        return config.train.steps


def _facts(config: RunConfig, pixel_multiple: int) -> DatasetFacts:
    """Return what the file tells about its pictures, or nothing where they are gone by now."""
    from lorasmith.engine.dataset.buckets import plan_buckets
    from lorasmith.engine.dataset.scan import require_captions, scan_dataset
    from lorasmith.engine.export import DatasetFacts
    from lorasmith.engine.lora_metadata import dataset_facts

    try:
        dataset = require_captions(scan_dataset(config.dataset), config.dataset)
    except LorasmithError as error:
        say(f"The file will not tell its pictures: {error}", to_stderr=True)
        return DatasetFacts()
    plan = plan_buckets(dataset.items, config.dataset, pixel_multiple, config.run.seed)
    batches = plan.batches_per_epoch(config.train.batch_size)
    return dataset_facts(dataset, config.captions, plan.counts(), batches)
