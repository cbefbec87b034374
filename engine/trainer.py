"""A training from the first file to the last: scan → load → cache → train → finish.

`train` is the whole story; each stage is one call. The loop never asks the device for a number except once every
`train.log_every` steps, and looks for commands only between steps. What is written is always written in the same order:
save → verify → prune → preview.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.engine.adapters import attach_adapter
from lorasmith.engine.checkpoints import Checkpoint, folder_bytes, prune_checkpoints, save_checkpoint
from lorasmith.engine.commands import Command
from lorasmith.engine.compute import choose_compute, engine_threads, freeze_garbage, package_versions
from lorasmith.engine.config import RunConfig
from lorasmith.engine.controls import Controls, Host, RunPaths
from lorasmith.engine.dataset.captions import require_trigger
from lorasmith.engine.errors import EXIT_STOPPED, CheckpointError, StorageError, TrainingError
from lorasmith.engine.events import (
    CheckpointPruned,
    CheckpointSaved,
    ExportDone,
    Logged,
    Paused,
    Resumed,
    RunEnded,
    StageChanged,
)
from lorasmith.engine.export import build_metadata, export_lora
from lorasmith.engine.learner import Learner
from lorasmith.engine.lora_metadata import dataset_facts
from lorasmith.engine.preview_sheet import build_run_sheet
from lorasmith.engine.previews import draw_previews
from lorasmith.engine.resume import find_checkpoint
from lorasmith.engine.run_setup import (
    Material,
    announce,
    build_training,
    find_base,
    load_base,
    preview_conditionings,
    read_dataset,
    require_space,
)
from lorasmith.engine.step_meter import StepMeter

YIELD_SECONDS = 50e-6
FINAL_SAVE_TRIES = 3
PAUSE_POLL_SECONDS = 0.1


def train(run: RunPaths, config: RunConfig, host: Host) -> None:
    """Train the LoRA of `config` in the run folder, or go on from its newest checkpoint.

    Ends with RunEnded (finished or stopped); every failure is raised as a LorasmithError, for the host to tell.
    """
    with engine_threads():
        require_trigger(config.captions)
        compute = choose_compute(config.train)
        warnings: list[str] = []
        checkpoint = find_checkpoint(run.checkpoints, config, warnings.append)
        announce(run, config, host, compute, checkpoint, warnings)
        require_space(config, run, 0)

        controls = Controls(host, checkpoint.step if checkpoint else 0)
        # Everything that is wrong with the base or the pictures is told before minutes of loading.
        base = find_base(config, host.emit)
        material = read_dataset(config, base.module.SPEC.pixel_multiple, host.emit)
        family = load_base(base, compute, host.emit)
        adapter = attach_adapter(family, config.adapter, config.run.seed)
        require_space(config, run, adapter.num_parameters())
        learner = build_training(config, base.files, family, material, adapter, host.emit, controls.stop_wanted)
        if learner is None:
            host.emit(_stopped(controls.step, "Stopped before the first step; nothing is lost."))
            return

        training = Training(run, config, host, controls, learner, material)
        training.resume(checkpoint)
        freeze_garbage()
        if training.run_steps():
            training.finish()


@dataclass
class Training:
    """The loop of one run and everything that happens between its steps."""

    run: RunPaths
    config: RunConfig
    host: Host
    controls: Controls
    learner: Learner
    material: Material
    saved_step: int = -1
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.meter = StepMeter(self.learner, self.host.emit)

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Take over the weights and optimizer of a checkpoint; raises CheckpointError where the dataset changed."""
        if checkpoint is None:
            return
        if checkpoint.state["dataset"] != self.material.plan.fingerprint():
            raise CheckpointError(
                f"The run cannot be resumed at step {checkpoint.step}: the dataset has changed since.",
                why="A picture, caption or mask was added, removed or edited.",
                fix="Put the dataset back as it was, or start a new run.",
            )
        tensors = {name: checkpoint.tensors(name) for name in ("adapter", "optimizer")}
        self.learner.load_state(tensors, checkpoint.state["learner"])
        self.saved_step = checkpoint.step

    def run_steps(self) -> bool:
        """Train to the last step and return True, or False after the user's stop with a checkpoint saved."""
        total, log_every = self.config.train.steps, self.config.train.log_every
        controls, meter = self.controls, self.meter
        self.host.emit(StageChanged(stage="train", label="Training"))
        meter.start()
        while controls.step < total:
            meter.add(*self.learner.run_step(controls.step))
            controls.step += 1
            # Lets the screen's thread run: short releases of the interpreter lock alone can starve it for seconds.
            time.sleep(YIELD_SECONDS)
            if controls.step % log_every == 0:
                meter.read(controls.step)
            self.between_steps()
            if Command.STOP in controls.wanted and controls.step < total:
                self.save_finally()
                self.host.emit(_stopped(controls.step, f"Stopped at step {controls.step}; the run can be resumed."))
                return False
        return True

    def between_steps(self) -> None:
        """Save, draw and wait as planned and as asked."""
        controls, step = self.controls, self.controls.step
        controls.poll()
        last = step == self.config.train.steps
        save = self._due(self.config.checkpoints.every, Command.SAVE_NOW) and not last
        preview = self._due(self.config.previews.every, Command.PREVIEW_NOW) and not last
        if not (save or preview or controls.paused):
            return
        if save:
            self.save()
        if preview and Command.STOP not in controls.wanted:
            self.preview()
        self._wait_while_paused()
        self.meter.start()

    def save(self) -> bool:
        """Write, verify and prune; a disk that refuses is an error in the log, and training goes on."""
        self.meter.read(self.controls.step)
        if self.saved_step == self.controls.step:
            return True
        try:
            self._write_checkpoint()
        except CheckpointError:
            raise
        except StorageError as error:
            self.host.emit(Logged(severity="error", message=f"No checkpoint at step {self.controls.step}: {error}"))
            return False
        return True

    def save_finally(self) -> None:
        """Save at the end of the work: tried several times, then StorageError."""
        self.meter.read(self.controls.step)
        for attempt in range(FINAL_SAVE_TRIES):
            if self.saved_step == self.controls.step:
                return
            try:
                self._write_checkpoint()
            except StorageError as error:
                if attempt == FINAL_SAVE_TRIES - 1:
                    raise
                self.host.emit(Logged(severity="warning", message=f"Saving failed and is tried again: {error}"))
                time.sleep(0.5 * (attempt + 1))

    def preview(self) -> None:
        """Draw the previews; whatever goes wrong there is a warning."""
        self.meter.read(self.controls.step)
        family, adapter, emit = self.learner.family, self.learner.adapter, self.host.emit
        adapter.train(False)
        try:
            prompts = preview_conditionings(self.learner, self.material)
            step, stop = self.controls.step, self.controls.stop_wanted
            draw_previews(family, adapter, self.config, prompts, self.run.previews, step, emit, stop)
        except Exception as error:
            emit(Logged(severity="warning", message=f"No previews at step {self.controls.step}: {error}"))
        finally:
            adapter.train()

    def finish(self) -> None:
        """Save, draw and export the finished LoRA; the export is tried even where the save failed."""
        self.host.emit(StageChanged(stage="finish", label="Saving and exporting"))
        failed: StorageError | None = None
        try:
            self.save_finally()
        except StorageError as error:
            failed = error
            self.host.emit(Logged(severity="error", message=str(error)))
        if self.config.previews.every:
            self.preview()
        self._build_sheet()
        self._export()
        if failed:
            raise failed
        message = f"Training finished after {self.controls.step} steps."
        self.host.emit(RunEnded(outcome="finished", step=self.controls.step, message=message))

    def _build_sheet(self) -> None:
        """Put all previews of the run on one sheet; whatever goes wrong there is a warning."""
        try:
            build_run_sheet(self.run.previews)
        except Exception as error:
            self.host.emit(Logged(severity="warning", message=f"No sheet of all previews: {error}"))

    def _export(self) -> None:
        self._require_finite_weights()
        material, config, step = self.material, self.config, self.controls.step
        batches = self.learner.loader.batches_per_epoch
        facts = dataset_facts(material.dataset, config.captions, material.plan.counts(), batches)
        metadata = build_metadata(
            config,
            self.learner.family.identity,
            facts,
            step=step,
            epoch=self.learner.loader.epoch_of(step * config.train.gradient_accumulation - 1) + 1,
            started=self.started,
            finished=time.time(),
        )
        family, adapter = self.learner.family, self.learner.adapter
        adapter.train(False)
        results = export_lora(family, adapter, config, self.run.export, config.run.name, metadata, step)
        for result in results:
            self.host.emit(
                ExportDone(step=step, path=str(result.path), layout=result.layout, keys=result.keys, bytes=result.bytes)
            )
        # The same in every layout.
        if unchanged := len(results[0].unchanged):
            were = "was" if unchanged == 1 else "were"
            message = f"{unchanged} of {len(adapter.modules)} adapted layers {were} left unchanged by training."
            self.host.emit(Logged(severity="info", message=message))

    def _write_checkpoint(self) -> None:
        self._require_finite_weights()
        step, began = self.controls.step, time.perf_counter()
        tensors, rest = self.learner.state()
        state: dict[str, Any] = {
            "config": self.config.model_dump(mode="json"),
            "dataset": self.material.plan.fingerprint(),
            "learner": rest,
            "versions": package_versions(),
        }
        path = save_checkpoint(self.run.checkpoints, step, tensors, state)
        self.saved_step = step
        seconds = time.perf_counter() - began
        emit = self.host.emit
        emit(CheckpointSaved(step=step, path=str(path), bytes=folder_bytes(path), seconds=seconds))
        for old in prune_checkpoints(self.run.checkpoints, self.config.checkpoints.keep):
            emit(CheckpointPruned(step=_step_of(old), path=str(old)))

    def _require_finite_weights(self) -> None:
        if not self.learner.adapter.all_finite():
            raise TrainingError(
                f"The LoRA's weights are no longer numbers at step {self.controls.step}.",
                why="They are not saved; earlier checkpoints are intact.",
                fix="Lower optimizer.learning_rate, or set train.precision to bf16 or fp32; then start a new run.",
            )

    def _due(self, every: int, command: Command) -> bool:
        asked = command in self.controls.wanted
        self.controls.wanted.discard(command)
        return asked or (every > 0 and self.controls.step % every == 0)

    def _wait_while_paused(self) -> None:
        controls, step = self.controls, self.controls.step
        if not controls.paused:
            return
        self.meter.read(step)
        self.host.emit(Paused(step=step))
        while controls.paused and Command.STOP not in controls.wanted:
            command = self.host.wait_command(PAUSE_POLL_SECONDS)
            if command is None:
                continue
            controls.take(command)
            if Command.SAVE_NOW in controls.wanted:
                controls.wanted.discard(Command.SAVE_NOW)
                self.save()
            if Command.PREVIEW_NOW in controls.wanted:
                controls.wanted.discard(Command.PREVIEW_NOW)
                self.preview()
        if not controls.paused:
            self.host.emit(Resumed(step=step))


def _stopped(step: int, message: str) -> RunEnded:
    fix = "Resume it whenever you like."
    return RunEnded(outcome="stopped", step=step, message=message, fix=fix, exit_code=EXIT_STOPPED)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
