"""Pictures that are in a dataset twice: the same file, or nearly the same picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lorasmith.engine.dataset.buckets import BucketPlan
from lorasmith.engine.dataset.check_pictures import MIN_JPEG_QUALITY
from lorasmith.engine.dataset.findings import Action, CheckContext, Finding, counted
from lorasmith.engine.dataset.items import Dataset, ImageItem, Measures

NEAR_BITS = 6
"""Hashes of 64 bits that differ in at most this many belong to nearly the same picture; measured on pictures that were
recompressed, resized, brightened and cropped by a few pixels, and on different ones (tests/engine)."""
MIN_SIDE = 128
"""Icons and sprites with a shorter side have too little in them for a hash of 8 x 8 frequencies to tell shapes apart; a
judgement."""
MIN_CONTRAST = 0.04
"""Flatter pictures have hashes of noise, and say nothing about one another; a judgement."""
MAX_TONE = 0.08
"""Pictures further apart in brightness or contrast are different ones with the same layout; a judgement."""


def check_duplicates(dataset: Dataset, plan: BucketPlan, context: CheckContext) -> list[Finding]:
    """Return the findings about pictures that are there more than once."""
    items = [item for item in dataset.items if not item.regularization]
    scales = {sample.item.relative: sample.scale for sample in plan.samples}
    found = (_exact(items, scales), _near(items, scales), _in_regularization(dataset.items))
    return [finding for finding in found if finding is not None]


def near_groups(measures: Sequence[Measures]) -> list[list[int]]:
    """Return the places of pictures that nearly equal another one, in groups of two or more, by flood filling.

    Two pictures are in one group where a chain of near-duplicates connects them. Takes 10,000 pictures in about a
    second: each is compared once with those that have no group yet.
    """
    useful = [place for place, measure in enumerate(measures) if measure.contrast >= MIN_CONTRAST]
    hashes = np.array([measures[place].perceptual_hash for place in useful], dtype=np.uint64)
    tones = np.array([(measures[place].brightness, measures[place].contrast) for place in useful]).reshape(-1, 2)
    left = np.arange(len(useful))
    groups = []
    while left.size:
        group, left = [int(left[0])], left[1:]
        for member in group:  # grows while it is walked
            near = _is_near(hashes, tones, member, left)
            if near.any():
                group.extend(left[near].tolist())
                left = left[~near]
        if len(group) > 1:
            groups.append([useful[member] for member in sorted(group)])
    return groups


def _is_near(
    hashes: npt.NDArray[np.uint64], tones: npt.NDArray[np.float64], member: int, others: npt.NDArray[np.intp]
) -> npt.NDArray[np.bool_]:
    close: npt.NDArray[np.bool_] = np.bitwise_count(hashes[others] ^ hashes[member]) <= NEAR_BITS
    candidates = others[close]
    close[close] = (np.abs(tones[candidates] - tones[member]) <= MAX_TONE).all(axis=1)
    return close


def _exact(items: Sequence[ImageItem], scales: Mapping[str, float]) -> Finding | None:
    same: dict[str, list[ImageItem]] = defaultdict(list)
    for item in items:
        same[item.sha256].append(item)
    groups = [_best_first(group, scales) for group in same.values() if len(group) > 1]
    if not groups:
        return None
    spare = _spare(groups)
    return Finding(
        "exact-duplicates",
        "warning",
        f"{counted(len(spare), 'picture is an exact copy', 'pictures are exact copies')} of another.",
        "A copy counts as one more repeat: the LoRA learns that picture by heart before it has learnt the others.",
        "Keep one of each. If you want a picture to count more, put it into a folder such as 2_name instead.",
        files=(*spare, *(group[0].relative for group in groups)),
        groups=_names(groups),
        details=_details(groups, "the same file as"),
        action=Action("Leave out all but one of each", exclude=spare),
    )


def _near(items: Sequence[ImageItem], scales: Mapping[str, float]) -> Finding | None:
    known: dict[str, tuple[ImageItem, Measures]] = {}
    for item in _best_first(items, scales):
        if item.measures is not None and min(item.width, item.height) >= MIN_SIDE:
            known.setdefault(item.sha256, (item, item.measures))
    pictures = sorted(known.values(), key=lambda picture: picture[0].relative)
    places = near_groups([measures for _, measures in pictures])
    groups = [_best_first([pictures[place][0] for place in group], scales) for group in places]
    if not groups:
        return None
    spare = _spare(groups)
    return Finding(
        "near-duplicates",
        "warning",
        f"{counted(len(spare), 'picture is', 'pictures are')} nearly the same as another "
        f"({counted(len(groups), 'group', 'groups')}).",
        "What near-duplicates have in common, such as one pose or one background, is learnt as part of the concept.",
        "Keep the best of each group: the first one is large enough, little compressed and the sharpest.",
        files=(*spare, *(group[0].relative for group in groups)),
        groups=_names(groups),
        details=_details(groups, "nearly the same as"),
        action=Action("Leave out all but the best of each group", exclude=spare),
    )


def _in_regularization(items: Sequence[ImageItem]) -> Finding | None:
    learnt = {item.sha256: item.relative for item in items if not item.regularization}
    both = [item for item in items if item.regularization and item.sha256 in learnt]
    if not both:
        return None
    names = tuple(item.relative for item in both)
    return Finding(
        "trained-regularization",
        "warning",
        f"{counted(len(both), 'regularization picture is', 'regularization pictures are')} in the training set too.",
        "The same picture is taught with the trigger and without it, so the trigger comes to mean nothing.",
        "Use other pictures of the same class for regularization, without what you want to teach.",
        files=names,
        details={item.relative: f"the same file as {learnt[item.sha256]}" for item in both},
        action=Action("Leave them out of the regularization pictures", exclude=names),
    )


def _best_first(group: Iterable[ImageItem], scales: Mapping[str, float]) -> list[ImageItem]:
    """Sort by what is worth keeping: a caption, enough pixels for training, light compression, sharpness, size.

    Compression comes before sharpness, since its blocks count as sharp edges.
    """

    def worth(item: ImageItem) -> tuple[bool, float, bool, float, int]:
        enough = round(min(1.0, 1.0 / max(scales.get(item.relative, 1.0), 0.01)), 1)
        quality = item.measures.jpeg_quality if item.measures is not None else None
        intact = quality is None or quality >= MIN_JPEG_QUALITY
        sharpness = item.measures.sharpness if item.measures is not None else 0.0
        return bool((item.caption or "").strip()), enough, intact, sharpness, item.width * item.height

    return sorted(group, key=worth, reverse=True)


def _spare(groups: Sequence[Sequence[ImageItem]]) -> tuple[str, ...]:
    return tuple(item.relative for group in groups for item in group[1:])


def _names(groups: Sequence[Sequence[ImageItem]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(item.relative for item in group) for group in groups)


def _details(groups: Sequence[Sequence[ImageItem]], words: str) -> dict[str, str]:
    kept = {group[0].relative: f"the best of {len(group)}" for group in groups}
    return kept | {item.relative: f"{words} {group[0].relative}" for group in groups for item in group[1:]}
