"""Batches of cached latents as a pure function of their number, so that a resumed run continues exactly.

Which samples and prompts a micro-batch has is told by `engine.dataset.epochs`; here they become tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.buckets import BucketPlan
from lorasmith.engine.dataset.epochs import Epochs
from lorasmith.engine.objectives import mask_weights


@dataclass
class Batch:
    """One micro-batch, on the CPU.

    latents (B, C, h, w) float32 · one prompt each · sample indices in the plan · loss weights (B,) float32
    (`objective.prior_weight` for regularization pictures, else 1) · pixel weights (B, 1, h, w) float32 where a picture
    of the batch has a mask, else None · the prompts whose effect is preserved (`Epochs.preserved`), none if off.
    """

    latents: torch.Tensor
    captions: list[str]
    indices: tuple[int, ...]
    weights: torch.Tensor
    pixel_weights: torch.Tensor | None = None
    preserved: list[str | None] = field(default_factory=list)

    def pictures(self, start: int, end: int) -> Batch:
        """Return the part of the batch from picture `start` up to `end`; nothing is copied."""
        pixels = self.pixel_weights
        return Batch(
            latents=self.latents[start:end],
            captions=self.captions[start:end],
            indices=self.indices[start:end],
            weights=self.weights[start:end],
            pixel_weights=None if pixels is None else pixels[start:end],
            preserved=self.preserved[start:end],
        )


class Loader:
    """The batches of a run."""

    def __init__(
        self,
        plan: BucketPlan,
        latents: Mapping[int, torch.Tensor],
        config: RunConfig,
        masks: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        """Keep the plan and the settings that order and caption it.

        `latents` (C, h, w) and `masks` (1, h, w) uint8, 255 where to learn, are by sample index; most have no mask.
        """
        self._samples = plan.samples
        self._latents = latents
        self._config = config
        unmasked = config.objective.unmasked_weight
        self._pixel_weights = {index: mask_weights(mask, unmasked) for index, mask in (masks or {}).items()}
        self.epochs = Epochs(plan, config)
        self.batches_per_epoch = plan.batches_per_epoch(config.train.batch_size)
        """Micro-batches in the first epoch; others differ where repeats are fractional."""
        self.steps_per_epoch = plan.steps_per_epoch(config.train.batch_size, config.train.gradient_accumulation)
        """Optimizer steps in the first epoch, rounded up."""

    def epoch_of(self, micro: int) -> int:
        """Return the epoch, from 0, that micro-batch `micro`, from 0, belongs to."""
        return self.epochs.epoch_of(micro)

    def batch(self, micro: int) -> Batch:
        """Return micro-batch `micro`, counted from 0 over the whole run."""
        indices = self.epochs.micro_batch(micro).indices
        prior = self._config.objective.prior_weight
        weights = [prior if self._samples[index].item.regularization else 1.0 for index in indices]
        captions = self.epochs.captions(micro)
        return Batch(
            latents=torch.stack([self._latents[index] for index in indices]).float(),
            captions=captions,
            indices=indices,
            weights=torch.tensor(weights),
            pixel_weights=self._weigh_pixels(indices),
            preserved=self.epochs.preserved(micro, captions),
        )

    def captions(self, micro: int) -> list[str]:
        """Return the prompts of micro-batch `micro`, without touching its latents."""
        return self.epochs.captions(micro)

    def _weigh_pixels(self, indices: tuple[int, ...]) -> torch.Tensor | None:
        found = [self._pixel_weights.get(index) for index in indices] if self._pixel_weights else []
        masked = next((weights for weights in found if weights is not None), None)
        if masked is None:
            return None
        ones = torch.ones_like(masked)
        return torch.stack([ones if weights is None else weights for weights in found])
