"""The end of a training: the last checkpoint, the last previews, the sheet of them all, and the proved export."""

from __future__ import annotations

import time

from lorasmith.engine.errors import StorageError
from lorasmith.engine.events import ExportDone, Logged, RunEnded, StageChanged
from lorasmith.engine.export import build_metadata, export_lora
from lorasmith.engine.lora_metadata import dataset_facts
from lorasmith.engine.preview_sheet import build_run_sheet
from lorasmith.engine.previews import draw_previews
from lorasmith.engine.run_setup import preview_conditionings
from lorasmith.engine.saving import Saver, require_finite_weights
from lorasmith.engine.training_parts import TrainingParts


def draw(parts: TrainingParts) -> None:
    """Draw the previews of the present step; whatever goes wrong there is a warning."""
    parts.meter.read(parts.step)
    family, adapter = parts.learner.family, parts.learner.adapter
    adapter.train(False)
    try:
        prompts = preview_conditionings(parts.learner, parts.material)
        stop = parts.controls.stop_wanted
        draw_previews(family, adapter, parts.config, prompts, parts.run.previews, parts.step, parts.emit, stop)
    except Exception as error:
        parts.emit(Logged(severity="warning", message=f"No previews at step {parts.step}: {error}"))
    finally:
        adapter.train()


def finish(parts: TrainingParts, saver: Saver) -> None:
    """Save, draw and export the finished LoRA; the export is tried even where the save failed."""
    parts.emit(StageChanged(stage="finish", label="Saving and exporting"))
    failed: StorageError | None = None
    try:
        saver.save_finally()
    except StorageError as error:
        failed = error
        parts.emit(Logged(severity="error", message=str(error)))
    if parts.config.previews.every:
        draw(parts)
    _build_sheet(parts)
    _export(parts)
    if failed:
        raise failed
    message = f"Training finished after {parts.step} steps."
    parts.emit(RunEnded(outcome="finished", step=parts.step, message=message))


def _build_sheet(parts: TrainingParts) -> None:
    """Put all previews of the run on one sheet; whatever goes wrong there is a warning."""
    try:
        build_run_sheet(parts.run.previews)
    except Exception as error:
        parts.emit(Logged(severity="warning", message=f"No sheet of all previews: {error}"))


def _export(parts: TrainingParts) -> None:
    require_finite_weights(parts)
    material, config, step, learner = parts.material, parts.config, parts.step, parts.learner
    facts = dataset_facts(material.dataset, config.captions, material.plan.counts(), learner.loader.batches_per_epoch)
    metadata = build_metadata(
        config,
        learner.family.identity,
        facts,
        step=step,
        epoch=learner.loader.epoch_of(step * config.train.gradient_accumulation - 1) + 1,
        started=parts.started,
        finished=time.time(),
    )
    family, adapter = learner.family, learner.adapter
    adapter.train(False)
    results = export_lora(family, adapter, config, parts.run.export, config.run.name, metadata, step)
    for result in results:
        parts.emit(
            ExportDone(step=step, path=str(result.path), layout=result.layout, keys=result.keys, bytes=result.bytes)
        )
    # The same in every layout.
    if unchanged := len(results[0].unchanged):
        were = "was" if unchanged == 1 else "were"
        message = f"{unchanged} of {len(adapter.modules)} adapted layers {were} left unchanged by training."
        parts.emit(Logged(severity="info", message=message))
