"""What ended a run that failed, in words."""

from __future__ import annotations

from lorasmith.engine.errors import HardwareError, LorasmithError, StorageError
from lorasmith.engine.events import RunEnded
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


def _known_failure(error: BaseException) -> LorasmithError:
    if isinstance(error, LorasmithError):
        return error
    # torch's class is known by name only: this module must not import torch.
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        fix = "Lower train.batch_size or dataset.resolution, or turn on train.gradient_checkpointing; then resume."
        return HardwareError("The GPU ran out of memory.", fix=fix)
    if isinstance(error, MemoryError):
        return HardwareError("This machine ran out of memory.", fix="Close other programs; then resume the run.")
    if isinstance(error, OSError) and is_disk_full(error):
        return StorageError("The disk is full.", fix="Free some space; then resume the run.")
    return LorasmithError(
        "Training failed with an unexpected error.",
        fix="The traceback is in run.log in the run folder; please report it.",
    )
