"""When and how a training writes its checkpoints: save → verify → prune, and what happens where the disk refuses.

Work is never given up in silence, and nobody waits without need. A refused save is tried again at once, since many
errors pass. Then training goes on while an older checkpoint is there, and the save is tried again by itself; once
nothing was ever saved, or two planned saves in a row were refused, going on would only add to what a crash costs:
training pauses with the reason, looks again every few seconds, and goes on when the disk takes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorasmith.engine.checkpoint_proof import step_of
from lorasmith.engine.checkpoints import folder_bytes, prune_checkpoints, save_checkpoint
from lorasmith.engine.commands import Command
from lorasmith.engine.compute import package_versions
from lorasmith.engine.errors import CheckpointError, HardwareError, StorageError
from lorasmith.engine.events import CheckpointPruned, CheckpointSaved, Logged, Paused, Resumed
from lorasmith.engine.memory_ladder import SAVE_FIX, save_rungs, state_to_save
from lorasmith.engine.storage import storage_error
from lorasmith.engine.training_parts import TrainingParts

TRIES = 2
FINAL_TRIES = 3
SECONDS_BEFORE_NEXT_TRY = 0.3
MAX_REFUSED = 1
"""Planned saves in a row that may be refused while training goes on from an older checkpoint."""
BACKGROUND_SECONDS = 30.0
"""How often a refused save is tried again while training goes on."""
WAIT_SECONDS = 5.0
"""How often it is tried again while training waits for the disk."""
POLL_SECONDS = 1.0


@dataclass
class Saver:
    """Writes the checkpoints of one training; `saved_step` is that of the newest one, -1 before the first.

    `refused` counts the planned saves that the disk has refused since then.
    """

    parts: TrainingParts
    saved_step: int = -1
    refused: int = 0
    _next_try: float = 0.0

    def save(self) -> bool:
        """Write, verify and prune; return whether the present step is saved.

        Where the disk refuses, this says so and returns, or pauses until the disk takes it or the user stops the run.
        """
        parts = self.parts
        parts.meter.read(parts.step)
        error = self._attempt(TRIES)
        if error is None:
            return True
        self.refused += 1
        if not parts.controls.paused and (self.saved_step < 0 or self.refused > MAX_REFUSED):
            return wait_for_disk(parts, error, self._write) is None
        self._next_try = time.monotonic() + BACKGROUND_SECONDS
        message = f"No checkpoint at step {parts.step}: {error} {self._newest()} It is tried again by itself."
        parts.emit(Logged(severity="error", message=message))
        return False

    def save_refused(self) -> bool:
        """Try a refused save again while training goes on, every now and then; return whether that took time."""
        if not self.refused or time.monotonic() < self._next_try:
            return False
        self.parts.meter.read(self.parts.step)
        self._attempt(tries=1)
        self._next_try = time.monotonic() + BACKGROUND_SECONDS
        return True

    def save_finally(self) -> None:
        """Save at the user's stop, without waiting for the disk; raises StorageError that says what is lost."""
        parts = self.parts
        parts.meter.read(parts.step)
        error = self._attempt(FINAL_TRIES)
        if error is None:
            return
        since = f"the steps since step {self.saved_step} are" if self.saved_step >= 0 else "they are all"
        raise StorageError(
            f"Stopped at step {parts.step} without a checkpoint of it; {since} lost.",
            why=f"{error.what} {error.why}".strip(),
            fix=f"{error.fix} {self._newest()} Resuming starts from there.".strip(),
        ) from error

    def save_at_end(self) -> StorageError | None:
        """Save the last step, without waiting for the disk; return why the disk refused it, or None."""
        parts = self.parts
        parts.meter.read(parts.step)
        error = self._attempt(FINAL_TRIES)
        if error is not None:
            parts.emit(Logged(severity="error", message=f"No checkpoint at step {parts.step} yet: {error}"))
        return error

    def wait_until_saved(self, error: StorageError) -> StorageError | None:
        """Pause until the disk takes the checkpoint that it refused with `error`; None then, the error after a stop."""
        return wait_for_disk(self.parts, error, self._write)

    def _attempt(self, tries: int) -> StorageError | None:
        """Save the present step in at most `tries` tries; return the last error of the disk."""
        refusal: StorageError | None = None
        for number in range(tries):
            if self.saved_step == self.parts.step:
                return None
            if number:
                time.sleep(SECONDS_BEFORE_NEXT_TRY * number)
            try:
                self._write()
            except CheckpointError:
                raise
            except StorageError as error:
                refusal = error
            else:
                return None
        return refusal

    def _newest(self) -> str:
        if self.saved_step < 0:
            return "There is no checkpoint yet."
        return f"The newest checkpoint is that of step {self.saved_step}."

    def _write(self) -> None:
        """Write the checkpoint; where memory is short, with less, and at last refused as by a disk."""
        try:
            self.parts.rungs.attempt("save", self._write_once, save_rungs(), fix=SAVE_FIX)
        except HardwareError as error:
            raise StorageError(error.what, why=error.why, fix=error.fix) from error

    def _write_once(self) -> None:
        parts = self.parts
        require_finite_weights(parts)
        step, began = parts.step, time.perf_counter()
        tensors, rest = state_to_save(parts)
        state: dict[str, Any] = {
            "config": parts.config.model_dump(mode="json"),
            "dataset": parts.material.plan.fingerprint(),
            "training_adapter": parts.training_adapter.fingerprint if parts.training_adapter else "",
            "learner": rest,
            "not_finite": parts.meter.record,
            "versions": package_versions(),
        }
        folder = parts.run.checkpoints
        try:
            path = save_checkpoint(folder, step, tensors, state)
        except OSError as error:
            raise storage_error(folder, 0, error) from error
        self.saved_step, self.refused = step, 0
        seconds = time.perf_counter() - began
        try:
            parts.emit(CheckpointSaved(step=step, path=str(path), bytes=folder_bytes(path), seconds=seconds))
            for old in prune_checkpoints(folder, parts.config.checkpoints.keep):
                parts.emit(CheckpointPruned(step=step_of(old), path=str(old)))
        except (OSError, StorageError) as error:
            # The new checkpoint is safe; an old one more is no reason to end a run.
            message = f"Old checkpoints could not be removed from {folder}: {error}"
            parts.emit(Logged(severity="warning", message=message))


def wait_for_disk(parts: TrainingParts, error: StorageError, write: Callable[[], None]) -> StorageError | None:
    """Pause until `write`, refused with `error`, succeeds: return None then, or the last error once a stop is asked.

    It is tried again every `WAIT_SECONDS`, and at once when the user asks to go on or to save. The pause names the
    path and the needed and free bytes; it is told again where the user's try is refused as well.
    """
    parts.emit(Paused(step=parts.step, reason=_waiting(error)))
    while True:
        asked = _wait(parts)
        if Command.STOP in parts.controls.wanted:
            return error
        try:
            write()
        except CheckpointError:
            raise
        except StorageError as again:
            if asked:
                parts.emit(Paused(step=parts.step, reason=_waiting(again)))
            error = again
        else:
            parts.emit(Resumed(step=parts.step))
            return None


def _wait(parts: TrainingParts) -> bool:
    """Wait for the next try; return whether the user asked for it, or to stop."""
    controls, end = parts.controls, time.monotonic() + WAIT_SECONDS
    while Command.STOP not in controls.wanted:
        left = end - time.monotonic()
        if left <= 0:
            return False
        command = parts.host.wait_command(min(left, POLL_SECONDS))
        if command is None:
            continue
        controls.take(command)
        if command in (Command.RESUME, Command.SAVE_NOW):
            controls.wanted.discard(Command.SAVE_NOW)
            return True
    return True


def _waiting(error: StorageError) -> str:
    why = "" if "disk is full" in error.what else f" {error.why.rstrip('.')}."
    return f"{error.what}{why} Training goes on by itself once the disk takes it."


def require_finite_weights(parts: TrainingParts) -> None:
    """Raise NotFiniteError where a weight of the adapter is no number: such weights are never written."""
    parts.meter.require_finite_weights(parts.step)
