"""What a run will write below its folder, part by part: told before its first step. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorasmith.engine.adapter_combinations import OF_WEIGHTS
from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import StorageError
from lorasmith.engine.preview_sheet import MAX_SHEET_PIXELS
from lorasmith.engine.storage import (
    EXPORT_BYTES,
    cache_folder,
    checkpoint_bytes,
    free_bytes,
    nearest_existing,
    readable_size,
)

PNG_BYTES_PER_PIXEL = 2.0
"""Of drawn pictures; a photo of three bytes a pixel shrinks to some 60 %."""
JOURNAL_BYTES_PER_STEP = 600
"""A line of losses, and at a step a second one of gauges; rounded up from some 500."""
_SLACK_BYTES = 1_000_000
"""A part's header, names and blocks that are not full."""


@dataclass(frozen=True)
class DiskPlan:
    """Bytes that are still to be written, at most, and the numbers of checkpoints and previews that they hold."""

    checkpoints: int
    num_checkpoints: int
    previews: int
    num_previews: int
    export: int
    num_exports: int
    journal: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.checkpoints + self.previews + self.export + self.journal

    def describe(self) -> str:
        """Return the parts in words, such as "3 checkpoints 1.2 GiB, 40 previews 12.0 MiB, …"."""
        parts = [
            (_count(self.num_checkpoints, "checkpoint"), self.checkpoints),
            (_count(self.num_previews, "preview") + " and their sheet", self.previews),
            (_count(self.num_exports, "LoRA file"), self.export),
            ("journal and log", self.journal),
        ]
        return ", ".join(f"{name} {readable_size(size)}" for name, size in parts if size)


def plan_disk(
    config: RunConfig, num_parameters: int, *, done_steps: int = 0, existing: tuple[int, ...] = ()
) -> DiskPlan:
    """Return what the steps after `done_steps` of an adapter of `num_parameters` numbers will write.

    `existing` are the bytes of each checkpoint that is there already: those make room as newer ones come.
    """
    steps, every = config.train.steps - done_steps, config.checkpoints.every
    # One more than is planned: the user may ask for a save at any time.
    saves = (steps // every if every else 0) + 2 if steps > 0 else 0
    at_once = max(0, min(config.checkpoints.keep + 1, len(existing) + saves) - len(existing))
    averaged, starts = config.train.ema_decay > 0, config.adapter.init in OF_WEIGHTS
    grown = at_once * checkpoint_bytes(num_parameters, config.optimizer.name, averaged=averaged, starts=starts)
    pictures = _num_previews(config, steps)
    pixels = (config.previews.side or config.dataset.resolution) ** 2
    sheet = min(pictures * pixels, MAX_SHEET_PIXELS)
    layouts = len(set(config.export.layouts))
    return DiskPlan(
        checkpoints=grown,
        num_checkpoints=at_once,
        previews=int((pictures * pixels + sheet) * PNG_BYTES_PER_PIXEL),
        num_previews=pictures,
        export=layouts * (num_parameters * (1 + starts) * EXPORT_BYTES[config.export.precision] + _SLACK_BYTES),
        num_exports=layouts,
        journal=steps * JOURNAL_BYTES_PER_STEP + _SLACK_BYTES,
    )


def existing_checkpoints(folder: Path) -> tuple[int, ...]:
    """Return the bytes of each checkpoint below `folder`; what cannot be read does not count."""
    sizes = []
    try:
        for path in folder.glob("step-*"):
            sizes.append(sum(file.stat().st_size for file in path.iterdir()))
    except OSError:
        pass
    return tuple(sizes)


def require_room(folder: Path, plan: DiskPlan) -> None:
    """Raise StorageError with the size of each part where the disk of `folder` has too little room for them."""
    free = free_bytes(folder)
    if free >= plan.total:
        return
    raise StorageError(
        f"Not enough disk space in {folder}: about {readable_size(plan.total)} are needed, "
        f"{readable_size(free)} are free.",
        why=f"The run will write {plan.describe()}.",
        fix="Free some space, choose another run.output_folder, or lower checkpoints.keep.",
    )


def reserved_beside_cache(folder: Path, plan: DiskPlan) -> int:
    """Return how much of the cache's disk a run in `folder` needs for itself: nothing where it is another disk."""
    try:
        same = nearest_existing(cache_folder()).stat().st_dev == folder.stat().st_dev
    except OSError:
        same = True
    return plan.total if same else 0


def _num_previews(config: RunConfig, steps: int) -> int:
    previews = config.previews
    if not previews.every or steps < 0:
        return 0
    # Without prompts of the user's there are two: see `previews.preview_prompts`.
    each = (len(previews.prompts) or 2) * len(set(previews.seeds))
    return each * (max(0, steps - 1) // previews.every + 1)


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
