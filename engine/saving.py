"""When and how a training writes its checkpoints: save → verify → prune, and what happens where the disk refuses."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.engine.checkpoints import folder_bytes, prune_checkpoints, save_checkpoint
from lorasmith.engine.compute import package_versions
from lorasmith.engine.errors import CheckpointError, StorageError, TrainingError
from lorasmith.engine.events import CheckpointPruned, CheckpointSaved, Logged
from lorasmith.engine.training_parts import TrainingParts

FINAL_SAVE_TRIES = 3


@dataclass
class Saver:
    """Writes the checkpoints of one training; `saved_step` is that of the newest one, -1 before the first."""

    parts: TrainingParts
    saved_step: int = -1

    def save(self) -> bool:
        """Write, verify and prune; a disk that refuses is an error in the log, and training goes on."""
        parts = self.parts
        parts.meter.read(parts.step)
        if self.saved_step == parts.step:
            return True
        try:
            self._write()
        except CheckpointError:
            raise
        except StorageError as error:
            parts.emit(Logged(severity="error", message=f"No checkpoint at step {parts.step}: {error}"))
            return False
        return True

    def save_finally(self) -> None:
        """Save at the end of the work: tried several times, then StorageError."""
        parts = self.parts
        parts.meter.read(parts.step)
        for attempt in range(FINAL_SAVE_TRIES):
            if self.saved_step == parts.step:
                return
            try:
                self._write()
            except StorageError as error:
                if attempt == FINAL_SAVE_TRIES - 1:
                    raise
                parts.emit(Logged(severity="warning", message=f"Saving failed and is tried again: {error}"))
                time.sleep(0.5 * (attempt + 1))

    def _write(self) -> None:
        parts = self.parts
        require_finite_weights(parts)
        step, began = parts.step, time.perf_counter()
        tensors, rest = parts.learner.state()
        state: dict[str, Any] = {
            "config": parts.config.model_dump(mode="json"),
            "dataset": parts.material.plan.fingerprint(),
            "learner": rest,
            "versions": package_versions(),
        }
        path = save_checkpoint(parts.run.checkpoints, step, tensors, state)
        self.saved_step = step
        seconds = time.perf_counter() - began
        parts.emit(CheckpointSaved(step=step, path=str(path), bytes=folder_bytes(path), seconds=seconds))
        for old in prune_checkpoints(parts.run.checkpoints, parts.config.checkpoints.keep):
            parts.emit(CheckpointPruned(step=_step_of(old), path=str(old)))


def require_finite_weights(parts: TrainingParts) -> None:
    """Raise TrainingError where a weight of the adapter is no number: such weights are never written."""
    if not parts.learner.adapter.all_finite():
        raise TrainingError(
            f"The LoRA's weights are no longer numbers at step {parts.step}.",
            why="They are not saved; earlier checkpoints are intact.",
            fix="Lower optimizer.learning_rate, or set train.precision to bf16 or fp32; then start a new run.",
        )


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
