"""The end of a training: the last checkpoint, validation and previews, the sheet of them all, and the proved export."""

from __future__ import annotations

import time

from lorasmith.engine.compatibility import loads_in
from lorasmith.engine.errors import ExportError, StorageError
from lorasmith.engine.events import ExportDone, Logged, RunEnded, StageChanged
from lorasmith.engine.export import build_metadata, export_lora
from lorasmith.engine.lora_metadata import dataset_facts
from lorasmith.engine.preview_sheet import build_run_sheet
from lorasmith.engine.previews import draw_previews
from lorasmith.engine.run_setup import preview_conditionings
from lorasmith.engine.saving import Saver, require_finite_weights, wait_for_disk
from lorasmith.engine.training_adapter import without
from lorasmith.engine.training_parts import TrainingParts
from lorasmith.engine.validation import validate

EXPORT_TRIES = 2


def draw(parts: TrainingParts) -> None:
    """Draw the previews of the present step; whatever goes wrong there is a warning."""
    parts.meter.read(parts.step)
    family, adapter = parts.learner.family, parts.learner.adapter
    adapter.train(False)
    try:
        with parts.learner.averaged(), without(parts.training_adapter):
            prompts = preview_conditionings(parts.learner, parts.material)
            stop = parts.controls.stop_wanted
            draw_previews(
                family, adapter, parts.config, prompts, parts.run.previews, parts.step, parts.emit, stop, parts.rungs
            )
    except Exception as error:
        parts.emit(Logged(severity="warning", message=f"No previews at step {parts.step}: {error}"))
    finally:
        adapter.train()


def finish(parts: TrainingParts, saver: Saver) -> None:
    """Save, draw and export the finished LoRA; where the disk refuses, wait for it, so that nothing trained is lost.

    The export, which is smaller, is tried even while the save is refused. Raises StorageError where the user stops the
    run before the disk took both.
    """
    parts.emit(StageChanged(stage="finish", label="Saving and exporting"))
    unsaved = saver.save_at_end()
    validate(parts)
    if parts.config.previews.every:
        draw(parts)
    _build_sheet(parts)
    unexported = _export_or_wait(parts)
    if unsaved and not unexported:
        unsaved = saver.wait_until_saved(unsaved)
    if unsaved or unexported:
        raise _unfinished(parts.step, unsaved, unexported)
    message = f"Training finished after {parts.step} steps."
    parts.emit(RunEnded(outcome="finished", step=parts.step, message=message))


def _export_or_wait(parts: TrainingParts) -> StorageError | None:
    """Export; where the disk refuses, pause until it takes the file. Return the error where the user stopped that."""
    for attempt in range(EXPORT_TRIES):
        try:
            _export(parts)
        except (StorageError, ExportError) as error:
            refused = error
            if attempt + 1 < EXPORT_TRIES:
                # A disk that errs once, or reads back what was not written, mostly does better the next time.
                parts.emit(Logged(severity="warning", message=f"The export is tried again: {error}"))
        else:
            return None
    if isinstance(refused, ExportError):
        raise refused
    return wait_for_disk(parts, refused, lambda: _export(parts))


def _unfinished(step: int, unsaved: StorageError | None, unexported: StorageError | None) -> StorageError:
    """Return the error of a finished training of which the disk did not take everything."""
    error = unexported or unsaved
    assert error is not None
    why = f"{error.what} {error.why}".strip()
    if unexported and unsaved:
        what = f"The training of {step} steps is done, but neither its checkpoint nor its LoRA file could be written."
        fix = f"{error.fix} Then resume the run: it trains the steps since its newest checkpoint again."
    elif unexported:
        what = f"The training of {step} steps is done and saved, but its LoRA file could not be written."
        fix = f"{error.fix} Then resume the run, or use `lorasmith export`: nothing is trained again."
    else:
        what = f"The LoRA of {step} steps is written, but the checkpoint of the last step could not be saved."
        fix = f"{error.fix} The file can be used; only training it further starts from an older checkpoint."
    return StorageError(what, why=why, fix=fix)


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
    with learner.averaged():
        results = export_lora(family, adapter, config, parts.run.export, config.run.name, metadata, step)
    for result in results:
        programs = list(loads_in(family.spec, config.adapter, result.layout))
        path, layout = str(result.path), result.layout
        parts.emit(
            ExportDone(step=step, path=path, layout=layout, keys=result.keys, bytes=result.bytes, programs=programs)
        )
    for result in results:
        message = f"{result.path.name} was read back by {result.readers} and holds what was trained."
        parts.emit(Logged(severity="info", message=message))
    # The same in every layout.
    if unchanged := len(results[0].unchanged):
        were = "was" if unchanged == 1 else "were"
        message = f"{unchanged} of {len(adapter.modules)} adapted layers {were} left unchanged by training."
        parts.emit(Logged(severity="info", message=message))
