"""Which pictures are held out of the training to validate on. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.engine.dataset.buckets import Sample, plan_buckets
from lorasmith.engine.dataset.captions import full_prompt
from lorasmith.engine.draws import draw_key
from lorasmith.engine.errors import DatasetError

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.dataset.items import Dataset, ImageItem


@dataclass(frozen=True)
class HeldOut:
    """The pictures to validate on, one part of each at one size, and their prompts, in the same order.

    `latents` (C, h, w) and `masks` (1, h, w) uint8 are by sample index and empty until they are encoded.
    """

    samples: tuple[Sample, ...] = ()
    prompts: tuple[str, ...] = ()
    latents: Mapping[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    masks: Mapping[int, torch.Tensor] = dataclasses.field(default_factory=dict)


def split(dataset: Dataset, config: RunConfig) -> tuple[Dataset, tuple[ImageItem, ...]]:
    """Return the dataset without the pictures that are held out, and those; none where `validation.every` is 0.

    Each picture has its place in a line that only the seed and its content decide, and the first are held out: as many
    as `validation.share` says, at least one and at most `validation.max_pictures`. So each picture that is added can
    move at most one of them. All copies of a picture leave the training with it, but regularization pictures are never
    measured, and one picture of its own always stays to train on.
    """
    settings = config.validation
    contents = {item.sha256 for item in dataset.items if not item.regularization}
    if not settings.every or len(contents) < 2:
        return dataset, ()
    line = sorted(contents, key=lambda content: draw_key(config.run.seed, f"held out {content}"))
    number = min(max(1, round(settings.share * len(line))), settings.max_pictures, len(line) - 1)
    chosen = set(line[:number])
    training = tuple(item for item in dataset.items if item.sha256 not in chosen)
    held_out: dict[str, ImageItem] = {}
    for item in dataset.items:
        if item.sha256 in chosen and not item.regularization:
            held_out.setdefault(item.sha256, item)
    return dataclasses.replace(dataset, items=training), tuple(held_out.values())


def require_pictures(held_out: tuple[ImageItem, ...], config: RunConfig) -> None:
    """Raise DatasetError where the run validates but has no picture to spare for it."""
    if config.validation.every and not held_out:
        raise DatasetError(
            "There is no picture to validate on.",
            why="The dataset has a single picture of its own, which is trained.",
            fix="Set validation.every = 0, or add pictures.",
        )


def plan_held_out(items: tuple[ImageItem, ...], config: RunConfig, pixel_multiple: int, first_index: int) -> HeldOut:
    """Return the held-out pictures as they are measured: whole middle, not mirrored, at the training resolution.

    Their samples are counted from `first_index`, behind those of the training; prompts are drawn from nothing.
    """
    fixed = config.dataset.model_copy(update={"flip": False, "crop": "center", "more_resolutions": []})
    plan = plan_buckets(items, fixed, pixel_multiple, config.run.seed)
    samples = tuple(dataclasses.replace(s, index=first_index + s.index) for s in plan.samples)
    prompts = tuple(full_prompt(sample.item.caption, config.captions) for sample in samples)
    return HeldOut(samples, prompts)
