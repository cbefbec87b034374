"""Whether a dataset as a whole fits its goal: how many pictures, how different, how evenly they are used."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import numpy as np

from lorasmith.engine.dataset.buckets import BucketPlan
from lorasmith.engine.dataset.check_duplicates import MIN_CONTRAST, MIN_SIDE, near_groups
from lorasmith.engine.dataset.check_goals import aim_of
from lorasmith.engine.dataset.findings import Action, CheckContext, Finding
from lorasmith.engine.dataset.items import Dataset, ImageItem

VERY_FEW = 5
"""With fewer pictures a LoRA learns the pictures themselves, whatever the goal; a judgement."""
UNIFORM_SHARE = 0.5
"""Where more than half of the pictures nearly equal another one, there is little to learn from; a judgement."""
UNIFORM_BITS = 16
"""Hashes of unrelated pictures differ in about 30 of 64 bits, of one scene in about 10; measured (tests/engine)."""
UNIFORM_FROM = 6
"""With fewer pictures the middle difference says little."""
COMPARED = 500
"""So many pictures, evenly taken, are enough to estimate how different they are."""
UNBALANCED = 3.0
"""One class used this many times as often as another is learnt at its cost; a judgement."""
RARE, FREQUENT = 0.5, 2.0
"""Regularization uses for each use of a training picture: one for one is what Kohya's scripts aim at."""
MAX_WEIGHT = 100.0
"""The largest weight that dataset.weights takes."""


def check_amount(dataset: Dataset, plan: BucketPlan, context: CheckContext) -> list[Finding]:
    """Return what is to be said of the dataset as a whole."""
    learnt = [item for item in dataset.items if not item.regularization]
    checks: tuple[Callable[[], Finding | None], ...] = (
        lambda: _few(learnt, context),
        lambda: _many(learnt, context),
        lambda: _uniform(learnt, context),
        lambda: _unbalanced(learnt, context),
        lambda: _regularization(dataset),
    )
    return [finding for check in checks if (finding := check()) is not None]


def _few(learnt: list[ImageItem], context: CheckContext) -> Finding | None:
    aim, count = aim_of(context.goal), len({item.sha256 for item in learnt})
    if not 0 < count < aim.few:
        return None
    lowest, highest = aim.usual
    only = f"There {'is only 1 different picture' if count == 1 else f'are only {count} different pictures'}"
    return Finding(
        "few-pictures",
        "warning" if count < VERY_FEW else "note",
        f"{only} for {aim.what}.",
        f"With so few the LoRA learns the pictures themselves: {aim.uniform}.",
        f"{lowest} to {highest} good, different pictures are usual for {aim.what}; {aim.few} can do.",
    )


def _many(learnt: list[ImageItem], context: CheckContext) -> Finding | None:
    aim, count = aim_of(context.goal), len(learnt)
    if count <= aim.many:
        return None
    lowest, highest = aim.usual
    return Finding(
        "many-pictures",
        "note",
        f"{count:,} pictures are many for {aim.what}.",
        "Twenty sharp and different pictures teach more than hundreds of mixed quality, and each is seen less often in "
        "the same number of steps.",
        f"Keep the best {lowest} to {highest}, or train more steps at a higher adapter.rank.",
    )


def _uniform(learnt: list[ImageItem], context: CheckContext) -> Finding | None:
    measures = [
        item.measures
        for item in learnt
        if item.measures is not None
        and item.measures.contrast >= MIN_CONTRAST
        and min(item.width, item.height) >= MIN_SIDE
    ]
    if len(measures) < UNIFORM_FROM:
        return None
    taken = measures[:: -(-len(measures) // COMPARED)]
    hashes = np.array([measure.perceptual_hash for measure in taken], dtype=np.uint64)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    middle = float(np.median(apart[np.triu_indices(len(taken), k=1)]))
    alike = sum(len(group) for group in near_groups(taken)) / len(taken)
    if middle >= UNIFORM_BITS and alike <= UNIFORM_SHARE:
        return None
    return Finding(
        "uniform",
        "warning",
        f"The {len(measures):,} pictures look much alike.",
        f"What differs between pictures is not learnt and what stays the same is: {aim_of(context.goal).uniform}.",
        "Add pictures with other poses, angles, light and backgrounds.",
    )


def _unbalanced(learnt: list[ImageItem], context: CheckContext) -> Finding | None:
    classes: dict[tuple[int, str], list[ImageItem]] = defaultdict(list)
    for item in learnt:
        classes[item.dataset, item.class_name].append(item)
    uses = {key: sum(item.repeats for item in items) for key, items in classes.items()}
    if len(uses) < 2 or max(uses.values()) <= UNBALANCED * min(uses.values()):
        return None
    ordered = sorted(uses, key=lambda key: (uses[key], key))
    rarest, commonest = ordered[0], ordered[-1]
    told = "; ".join(f"{_class_label(key)}: {len(classes[key])} pictures, {uses[key]:g} uses" for key in ordered)
    return Finding(
        "class-imbalance",
        # Whoever set weights wants one dataset to count more.
        "note" if context.config.dataset.weights else "warning",
        f"{_class_label(commonest)} is used {uses[commonest] / uses[rarest]:.1f} times as often as "
        f"{_class_label(rarest)}.",
        f"The rarer class is learnt later and worse, and takes on looks of the other. In an epoch: {told}.",
        "Change the number in front of the folders' names, or dataset.weights, until all classes are used about alike.",
        files=tuple(item.relative for item in classes[rarest]),
        groups=tuple(tuple(item.relative for item in classes[key]) for key in ordered),
        action=_balance(uses, context),
    )


def _balance(uses: Mapping[tuple[int, str], float], context: CheckContext) -> Action | None:
    """Return weights that make all datasets count alike, where the imbalance is one between datasets."""
    settings = context.config.dataset
    count = 1 + len(settings.more_folders)
    if count < 2 or {dataset for dataset, _ in uses} != set(range(count)) or len(uses) != count:
        return None
    by_dataset = {dataset: amount for (dataset, _), amount in uses.items()}
    most = max(by_dataset.values())
    old = settings.weights or [1.0] * count
    weights = [round(old[index] * most / by_dataset[index], 2) for index in range(count)]
    if max(weights) > MAX_WEIGHT or min(weights) <= 0:
        return None
    return Action("Use all datasets equally often", settings={"dataset.weights": weights})


def _class_label(key: tuple[int, str]) -> str:
    dataset, name = key
    if name:
        return f"“{name}”" if dataset == 0 else f"“{name}” of dataset {dataset + 1}"
    return "the pictures outside of class folders" if dataset == 0 else f"dataset {dataset + 1}"


def _regularization(dataset: Dataset) -> Finding | None:
    uses: Counter[bool] = Counter()
    for item in dataset.items:
        uses[item.regularization] += item.repeats  # type: ignore[assignment]
    learnt, regular = uses[False], uses[True]
    if not learnt or not regular or RARE * learnt <= regular <= FREQUENT * learnt:
        return None
    more = regular > learnt
    return Finding(
        "regularization-balance",
        "warning" if more else "note",
        f"In an epoch regularization pictures are used {regular:g} times, training pictures {learnt:g} times.",
        "Most steps go to what the base can do already, so the concept is learnt slowly."
        if more
        else "So few hardly keep prompts without the trigger as they were.",
        "About as many uses of one as of the other are usual: change the number in front of the folders' names "
        "(10_name), or the number of regularization pictures.",
    )
