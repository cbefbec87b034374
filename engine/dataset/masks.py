"""Which part of a picture is learnt: its mask file, or its own transparency, as `dataset.masks` says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.folders import printable
from lorasmith.engine.dataset.items import ImageItem, PictureFacts, Refusal
from lorasmith.engine.dataset.layouts import Candidate, Layout

SAME_SHAPE = 0.02
"""Relative difference of aspect ratios up to which a mask has the shape of its picture: rounding when it was scaled."""

Facts = Mapping[Path, PictureFacts | str]


@dataclass(frozen=True)
class FoundMask:
    """The mask file of a picture, its hash and how white it is (0..1), and remarks; `path` None: there is none."""

    path: Path | None = None
    sha256: str = ""
    notes: tuple[str, ...] = ()
    share: float | None = None


def find_mask(candidate: Candidate, picture: PictureFacts, settings: DatasetSettings, facts: Facts) -> FoundMask:
    """Return the first mask of a picture that can be read, and what its transparency is used for."""
    notes = []
    found = FoundMask()
    for path in () if settings.masks == "off" else candidate.masks:
        mask = facts[path]
        if isinstance(mask, str):
            notes.append(f"mask {printable(path.name)} cannot be used: {mask}")
            continue
        # Measures are those on white; of a mask the transparent parts count as black.
        found = FoundMask(path, mask.sha256, share=None if mask.transparent else mask.measures.brightness)
        if abs(math.log(mask.width / mask.height * picture.height / picture.width)) > SAME_SHAPE:
            notes.append(
                f"mask {printable(path.name)} has another shape ({mask.width}x{mask.height}): stretched to the picture"
            )
        break
    if picture.transparent:
        also = " and used as its mask" if settings.masks == "alpha" else ""
        notes.append(f"what is transparent is laid on {settings.alpha_background}{also}")
    return FoundMask(found.path, found.sha256, tuple(notes), found.share)


def unused_masks(
    layout: Layout, settings: DatasetSettings, accepted: Mapping[Path, ImageItem], facts: Facts
) -> Iterator[Refusal]:
    """Yield a refusal for each mask file that no accepted picture (by its path) uses."""
    in_use = {item.mask_path for item in accepted.values()}
    owners: dict[Path, list[Candidate]] = {}
    for candidate in layout.candidates:
        for path in candidate.masks:
            owners.setdefault(path, []).append(candidate)
    for path, relative in layout.masks:
        if path not in in_use:
            yield Refusal(relative, _why_unused(path, layout, settings, owners.get(path, []), accepted, facts))


def _why_unused(
    path: Path,
    layout: Layout,
    settings: DatasetSettings,
    owners: list[Candidate],
    accepted: Mapping[Path, ImageItem],
    facts: Facts,
) -> str:
    if settings.masks == "off":
        return "mask, and dataset.masks is off"
    reason = facts.get(path)
    if isinstance(reason, str):
        return f"mask that cannot be used: {reason}"
    items = [accepted[owner.path] for owner in owners if owner.path in accepted]
    if items and items[0].mask_path is not None:
        return f"mask, not used: {printable(items[0].mask_path.name)} is"
    if owners:
        return "mask of a picture that is not used"
    if path in layout.disputed:
        return "mask with the name of pictures in several folders: put it into a mask folder inside one of them"
    return "mask without a picture of the same name; if it is a picture, rename it or its folder"
