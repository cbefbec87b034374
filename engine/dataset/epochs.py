"""The order of a run: which samples and prompts each micro-batch has, as a pure function of its number. Torch-free.

Micro-batch m belongs to optimizer step m // accumulation. Epochs follow one another without a gap: accumulation runs on
over the end of an epoch, so that no picture is left out there. Epochs differ in length where repeats are fractional.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.buckets import Bucket, BucketPlan
from lorasmith.engine.dataset.captions import caption_for, is_drawn, with_class
from lorasmith.engine.dataset.items import ImageItem
from lorasmith.engine.draws import python_rng

_EPOCHS_AT_ONCE = 256
_KEPT_ORDERS = 2
"""Threads that prepare batches ahead work on both sides of an epoch's end."""


@dataclass(frozen=True)
class MicroBatch:
    """The sample indices of a micro-batch, and the how-manieth use of its picture in the epoch each one is, from 0."""

    indices: tuple[int, ...]
    uses: tuple[int, ...]


def epoch_batches(plan: BucketPlan, batch_size: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """Return an epoch as batches of sample indices, each batch of one bucket, in an order drawn for (seed, epoch).

    Every view of a picture is in it as often as its repeats ask in this epoch, with its parts in turn.
    """
    groups: dict[Bucket, list[int]] = defaultdict(list)
    for view in plan.views:
        parts = view.samples
        groups[parts[0].bucket].extend(parts[use % len(parts)].index for use in view.uses(epoch))
    rng = python_rng(seed, "order", epoch)
    batches: list[tuple[int, ...]] = []
    for bucket in sorted(groups):
        indices = groups[bucket]
        rng.shuffle(indices)
        batches.extend(tuple(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size))
    rng.shuffle(batches)
    return batches


class Epochs:
    """All micro-batches of a run by number; safe to use from several threads."""

    def __init__(self, plan: BucketPlan, config: RunConfig) -> None:
        """Keep the plan and the settings that order and caption it."""
        self._plan = plan
        self._config = config
        self._ends = [0]
        """`_ends[e]` is the first micro-batch of epoch e, as far as it is known."""
        self._fractional = any(view.repeats % 1 for view in plan.views)
        self._per_epoch = plan.batches_per_epoch(config.train.batch_size)
        self._orders: dict[int, list[MicroBatch]] = {}
        self._lock = threading.Lock()

    def epoch_of(self, micro: int) -> int:
        """Return the epoch, from 0, that micro-batch `micro`, from 0, belongs to."""
        with self._lock:
            return self._place(micro)[0]

    def micro_batch(self, micro: int) -> MicroBatch:
        """Return micro-batch `micro`, counted from 0 over the whole run."""
        with self._lock:
            epoch, position = self._place(micro)
            if epoch not in self._orders:
                self._orders[epoch] = self._order(epoch)
                for old in list(self._orders)[:-_KEPT_ORDERS]:
                    del self._orders[old]
            return self._orders[epoch][position]

    def captions(self, micro: int) -> list[str]:
        """Return the prompts of micro-batch `micro`."""
        epoch, batch, config = self.epoch_of(micro), self.micro_batch(micro), self._config
        return [
            caption_for(self._plan.samples[index].item, config.captions, config.run.seed, epoch, use)
            for index, use in zip(batch.indices, batch.uses, strict=True)
        ]

    def preserved(self, micro: int, captions: Sequence[str]) -> list[str | None]:
        """Return the prompts of micro-batch `micro` whose effect is to stay the base model's (`objective.preserve`).

        `captions` are its prompts. None for a regularization picture, which does that by itself; no prompts at all
        where nothing is preserved.
        """
        if self._config.objective.preserve == "off":
            return []
        items = [self._plan.samples[index].item for index in self.micro_batch(micro).indices]
        return [self._preserved(item, caption) for item, caption in zip(items, captions, strict=True)]

    def all_captions(self, num_micro: int, limit: int | None = None) -> set[str] | None:
        """Return every prompt of the first `num_micro` micro-batches; None where they are more than `limit`.

        Those whose effect is preserved are among them.
        """
        settings, whole = self._config.captions, num_micro >= self._per_epoch
        found: set[str] = set()
        if whole and not any(is_drawn(view.samples[0].item, settings) for view in self._plan.views):
            items, seed = [view.samples[0].item for view in self._plan.views], self._config.run.seed
            pairs = [(item, caption_for(item, settings, seed, 0, 0)) for item in items]
            preserved = {self._preserved(item, caption) for item, caption in pairs}
            found = {caption for _, caption in pairs} | {prompt for prompt in preserved if prompt is not None}
            return found if limit is None or len(found) <= limit else None
        for micro in range(num_micro):
            captions = self.captions(micro)
            found.update(captions)
            found.update(prompt for prompt in self.preserved(micro, captions) if prompt is not None)
            if limit is not None and len(found) > limit:
                return None
        return found

    def _preserved(self, item: ImageItem, caption: str) -> str | None:
        """Return the prompt to preserve for a use of a picture with that prompt; None where there is none."""
        objective = self._config.objective
        if objective.preserve == "off" or item.regularization:
            return None
        if objective.preserve == "blank":
            return ""
        return with_class(caption, self._config.captions.trigger, objective.preserve_class)

    def _place(self, micro: int) -> tuple[int, int]:
        """Return (epoch, position in it)."""
        if not self._fractional:
            return divmod(micro, self._per_epoch)
        while self._ends[-1] <= micro:
            self._count_epochs()
        epoch = bisect_right(self._ends, micro) - 1
        return epoch, micro - self._ends[epoch]

    def _count_epochs(self) -> None:
        """Extend `_ends` by the lengths of the next epochs."""
        first = len(self._ends) - 1
        numbers = np.arange(first, first + _EPOCHS_AT_ONCE + 1)
        uses: dict[Bucket, npt.NDArray[np.int64]] = defaultdict(lambda: np.zeros(_EPOCHS_AT_ONCE, np.int64))
        for view in self._plan.views:
            # The same double arithmetic as View.uses_before.
            before = np.floor(numbers * view.repeats + view.phase).astype(np.int64)
            uses[view.samples[0].bucket] += np.diff(before)
        size = self._config.train.batch_size
        lengths = np.sum([-(-counts // size) for counts in uses.values()], axis=0)
        self._ends += (self._ends[-1] + np.cumsum(lengths)).tolist()

    def _order(self, epoch: int) -> list[MicroBatch]:
        config, samples = self._config, self._plan.samples
        seen: Counter[tuple[str, str]] = Counter()
        batches = []
        for indices in epoch_batches(self._plan, config.train.batch_size, config.run.seed, epoch):
            uses = []
            for index in indices:
                key = samples[index].item.relative, samples[index].item.sha256
                uses.append(seen[key])
                seen[key] += 1
            batches.append(MicroBatch(indices, tuple(uses)))
        return batches
