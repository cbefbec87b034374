"""Batches of cached latents as a pure function of their number, so that a resumed run continues exactly.

Micro-batch m belongs to optimizer step m // accumulation and to epoch m // batches_per_epoch: accumulation runs on over
the end of an epoch, so that no picture is left out there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.buckets import BucketPlan, epoch_batches
from lorasmith.engine.dataset.captions import caption_for, compose


@dataclass
class Batch:
    """One micro-batch, on the CPU.

    latents (B, C, h, w) float32 · one prompt each · sample indices in the plan · loss weights (B,) float32
    (`objective.prior_weight` for regularization pictures, else 1).
    """

    latents: torch.Tensor
    captions: list[str]
    indices: tuple[int, ...]
    weights: torch.Tensor


class Loader:
    """The batches of a run."""

    def __init__(self, plan: BucketPlan, latents: Mapping[int, torch.Tensor], config: RunConfig) -> None:
        """Keep the plan, its latents by sample index (C, h, w), and the settings that order and caption them."""
        self._samples = plan.samples
        self._plan = plan
        self._latents = latents
        self._config = config
        self._epoch: tuple[int, list[tuple[int, ...]]] = (-1, [])
        self.batches_per_epoch = plan.batches_per_epoch(config.train.batch_size)
        """Micro-batches in an epoch."""
        self.steps_per_epoch = plan.steps_per_epoch(config.train.batch_size, config.train.gradient_accumulation)
        """Optimizer steps in an epoch, rounded up."""

    def epoch_of(self, micro: int) -> int:
        """Return the epoch, from 0, that micro-batch `micro`, from 0, belongs to."""
        return micro // self.batches_per_epoch

    def batch(self, micro: int) -> Batch:
        """Return micro-batch `micro`, counted from 0 over the whole run."""
        indices = self._indices(micro)
        prior = self._config.objective.prior_weight
        weights = [prior if self._samples[index].item.regularization else 1.0 for index in indices]
        return Batch(
            latents=torch.stack([self._latents[index] for index in indices]).float(),
            captions=self.captions(micro),
            indices=indices,
            weights=torch.tensor(weights),
        )

    def captions(self, micro: int) -> list[str]:
        """Return the prompts of micro-batch `micro`, without touching its latents."""
        epoch, position = divmod(micro, self.batches_per_epoch)
        # Repeats put a picture into an epoch several times: each use has a number of its own to draw by.
        first_use = position * self._config.train.batch_size
        return [
            caption_for(
                self._samples[index].item, self._config.captions, self._config.run.seed, epoch, first_use + offset
            )
            for offset, index in enumerate(self._indices(micro))
        ]

    def all_captions(self, num_micro: int) -> set[str]:
        """Return every prompt of the first `num_micro` micro-batches, for encoding ahead."""
        settings = self._config.captions
        if settings.shuffle or settings.dropout > 0:
            return {caption for micro in range(num_micro) for caption in self.captions(micro)}
        seen = range(min(num_micro, self.batches_per_epoch))
        if len(seen) < self.batches_per_epoch:
            return {caption for micro in seen for caption in self.captions(micro)}
        return {compose(s.item.caption, settings.trigger, s.item.regularization) for s in self._samples}

    def _indices(self, micro: int) -> tuple[int, ...]:
        epoch, position = divmod(micro, self.batches_per_epoch)
        if self._epoch[0] != epoch:
            config = self._config
            self._epoch = (epoch, epoch_batches(self._plan, config.train.batch_size, config.run.seed, epoch))
        return self._epoch[1][position]
