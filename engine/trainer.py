"""A training from the first file to the last: scan → load → cache → train → finish.

`train` is the whole story; each stage is one call. The loop never asks the device for a number except once every
`train.log_every` steps, and looks for commands only between steps. What is written is always written in the same order:
save → verify → prune → validate → preview.
"""

from __future__ import annotations

import contextlib
import time

from lorasmith.engine.checkpoints import Checkpoint
from lorasmith.engine.commands import Command
from lorasmith.engine.compute import choose_compute, deterministic_kernels, engine_threads, freeze_garbage
from lorasmith.engine.config import RunConfig
from lorasmith.engine.controls import Controls, Host, RunPaths
from lorasmith.engine.dataset.captions import require_trigger
from lorasmith.engine.disk_plan import reserved_beside_cache
from lorasmith.engine.doctor.set_aside import set_aside_broken_packages
from lorasmith.engine.errors import EXIT_STOPPED, CheckpointError
from lorasmith.engine.events import RunEnded, StageChanged
from lorasmith.engine.finishing import draw, finish
from lorasmith.engine.memory_ladder import MemoryLadder
from lorasmith.engine.not_finite import give_up, take_over
from lorasmith.engine.out_of_memory import Rungs
from lorasmith.engine.resume import find_checkpoint
from lorasmith.engine.run_setup import (
    adapt,
    announce,
    build_training,
    find_base,
    load_base,
    read_dataset,
    remove_leftovers,
    require_space,
    tell_disk_plan,
    warn_of_foot_guns,
)
from lorasmith.engine.saving import Saver
from lorasmith.engine.step_calibration import StepCalibration
from lorasmith.engine.step_meter import NotFiniteError
from lorasmith.engine.training_adapter import require_same
from lorasmith.engine.training_parts import TrainingParts
from lorasmith.engine.validation import validate
from lorasmith.engine.waiting import wait

YIELD_SECONDS = 50e-6


def train(run: RunPaths, config: RunConfig, host: Host) -> None:
    """Train the LoRA of `config` in the run folder, or go on from its newest checkpoint.

    Ends with RunEnded (finished or stopped); every failure is raised as a LorasmithError, for the host to tell.
    """
    warnings: list[str] = []
    with engine_threads(), deterministic_kernels(config.train.deterministic, warnings.append):
        require_trigger(config.captions)
        set_aside_broken_packages()
        compute = choose_compute(config.train)
        checkpoint = find_checkpoint(run.checkpoints, config, warnings.append)
        announce(run, config, host, compute, checkpoint, warnings)
        controls = Controls(host, checkpoint.step if checkpoint else 0)
        rungs = Rungs(
            host.emit, lambda: controls.step, checkpoint.state["learner"].get("memory") if checkpoint else None
        )
        remove_leftovers(run)
        require_space(config, run, 0, controls.step)

        # Everything that is wrong with the base or the pictures is told before minutes of loading.
        base = find_base(config, host.emit)
        material = read_dataset(config, base.module.SPEC.pixel_multiple, host.emit)
        warn_of_foot_guns(config, base, material.dataset, host.emit)
        family = load_base(base, compute, host.emit, rungs, config.memory)
        adapter, training_adapter = adapt(config, base, family, checkpoint, host.emit)
        disk = require_space(config, run, adapter.num_parameters(), controls.step)
        tell_disk_plan(run, disk, host.emit)
        stop = controls.stop_wanted
        reserved = reserved_beside_cache(run.path, disk)
        learner = build_training(config, base.files, family, material, adapter, host.emit, stop, rungs, reserved)
        if learner is None:
            host.emit(_stopped(controls.step, "Stopped before the first step; nothing is lost."))
            return

        with contextlib.closing(learner):
            training = Training(
                TrainingParts(run, config, host, controls, learner, material, rungs, training_adapter=training_adapter)
            )
            training.resume(checkpoint)
            freeze_garbage()
            training.run()


class Training:
    """The loop of one run and what happens between its steps."""

    def __init__(self, parts: TrainingParts) -> None:
        self.parts = parts
        self.ladder = MemoryLadder(parts)
        self.saver = Saver(parts)
        self.calibration = StepCalibration(parts)

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Take over the weights and optimizer of a checkpoint; raises CheckpointError where the dataset changed."""
        if checkpoint is None:
            return
        if checkpoint.state["dataset"] != self.parts.material.plan.fingerprint():
            raise CheckpointError(
                f"The run cannot be resumed at step {checkpoint.step}: the dataset has changed since.",
                why="A picture, caption or mask was added, removed or edited.",
                fix="Put the dataset back as it was, or start a new run.",
            )
        require_same(self.parts.training_adapter, checkpoint.state.get("training_adapter", ""), checkpoint.step)
        take_over(self.parts, checkpoint)
        self.saver.saved_step = checkpoint.step

    def run(self) -> None:
        """Train and finish, or end at the user's stop; raises TrainingError where numbers are none any more."""
        try:
            if self.run_steps():
                finish(self.parts, self.saver)
        except NotFiniteError as error:
            give_up(self.parts, self.saver, error)

    def run_steps(self) -> bool:
        """Train to the last step and return True, or False after the user's stop with a checkpoint saved."""
        parts, controls, meter = self.parts, self.parts.controls, self.parts.meter
        total, log_every = parts.config.train.steps, parts.config.train.log_every
        parts.emit(StageChanged(stage="train", label="Training"))
        if self._validation_due():
            # The base model alone at the beginning; in a resumed run, what a stop or crash may have left out.
            validate(parts)
        meter.start()
        while controls.step < total:
            meter.add(*self.ladder.run_step(controls.step))
            controls.step += 1
            # Lets the screen's thread run: short releases of the interpreter lock alone can starve it for seconds.
            time.sleep(YIELD_SECONDS)
            if controls.step % log_every == 0:
                meter.read(controls.step)
                self.calibration.read()
            elif meter.is_due:
                meter.look(controls.step)
            self.between_steps()
            if Command.STOP in controls.wanted and controls.step < total:
                self.saver.save_finally()
                parts.emit(_stopped(controls.step, f"Stopped at step {controls.step}; the run can be resumed."))
                return False
        return True

    def between_steps(self) -> None:
        """Save, validate, draw and wait as planned and as asked."""
        parts, controls = self.parts, self.parts.controls
        controls.poll()
        last = controls.step == parts.config.train.steps
        save = self._due(parts.config.checkpoints.every, Command.SAVE_NOW) and not last
        preview = self._due(parts.config.previews.every, Command.PREVIEW_NOW) and not last
        validation = self._validation_due() and not last
        if not (save or validation or preview or controls.paused or Command.PARK in controls.wanted):
            if self.saver.save_refused():
                parts.meter.start()
            return
        self.calibration.disturb()
        if save:
            self.saver.save()
        if validation:
            validate(parts)
        if preview and Command.STOP not in controls.wanted:
            draw(parts)
        wait(parts, self.saver)
        parts.meter.start()

    def _validation_due(self) -> bool:
        every = self.parts.config.validation.every
        return every > 0 and self.parts.step % every == 0

    def _due(self, every: int, command: Command) -> bool:
        controls = self.parts.controls
        asked = command in controls.wanted
        controls.wanted.discard(command)
        return asked or (every > 0 and controls.step % every == 0)


def _stopped(step: int, message: str) -> RunEnded:
    fix = "Resume it whenever you like."
    return RunEnded(outcome="stopped", step=step, message=message, fix=fix, exit_code=EXIT_STOPPED)
