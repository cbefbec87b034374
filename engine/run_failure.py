"""What ended a run that failed, in words."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from lorasmith.engine.errors import EXIT_STOPPED, HardwareError, LorasmithError, StorageError
from lorasmith.engine.events import CheckpointSaved, Event, ExportDone, RunEnded
from lorasmith.engine.out_of_memory import describe_shortage, is_out_of_memory
from lorasmith.engine.run_log import plain_text
from lorasmith.engine.storage import is_disk_full


def describe_failure(error: BaseException, step: int) -> RunEnded:
    """Return the end of a run that failed with `error`, in words and with its exit code; tokens are taken out."""
    known = _known_failure(error)
    why = known.why if known is error else known.why or f"{type(error).__name__}: {error}"
    return RunEnded(
        outcome="failed",
        step=step,
        message=plain_text(known.what),
        why=plain_text(why),
        fix=plain_text(known.fix),
        exit_code=known.exit_code,
    )


def describe_wordless_end(told: Container[type[Event]], step: int, log: Path) -> RunEnded:
    """Return the end of a training that returned without one; only a proved export counts as finished."""
    if ExportDone in told:
        return RunEnded(outcome="finished", step=step, message="Training finished.")
    if CheckpointSaved in told:
        message = "Stopped; the run can be resumed."
        return RunEnded(outcome="stopped", step=step, message=message, exit_code=EXIT_STOPPED)
    return RunEnded(
        outcome="failed",
        step=step,
        message="Training ended without a result.",
        why="It wrote neither a LoRA nor a checkpoint.",
        fix=f"Report it with {log}.",
        exit_code=1,
    )


def _known_failure(error: BaseException) -> LorasmithError:
    if isinstance(error, LorasmithError):
        return error
    if is_out_of_memory(error):
        fix = "Close other programs, or lower train.batch_size or dataset.resolution; then resume the run."
        return HardwareError(describe_shortage(error), fix=fix)
    if isinstance(error, OSError) and is_disk_full(error):
        return StorageError("The disk is full.", fix="Free some space; then resume the run.")
    return LorasmithError(
        "Training failed with an unexpected error.",
        fix="The traceback is in run.log in the run folder; please report it.",
    )
