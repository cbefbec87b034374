"""Rectified flow: straight lines from the picture to noise, the target is the direction of the line.

Liu et al., arXiv:2209.03003, and Esser et al., arXiv:2403.03206: noisy = (1 - σ) · latents + σ · noise, and the target
is noise - latents. σ is drawn as `timesteps.FlowLevels` says; the shifted tables of the model's scheduler play no part.
Pure noise is one of a flow's levels, so it needs neither noise offset nor a changed schedule to learn how dark or
bright a whole picture is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorasmith.engine.config import ObjectiveSettings
from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import FamilySpec
from lorasmith.engine.objectives.losses import NoisyBatch, huber_limits, weighted_loss
from lorasmith.engine.objectives.noise import NoiseSource, fixed_noise
from lorasmith.engine.objectives.timesteps import FlowLevels

TIME_SCALE = 1000.0
"""Timesteps are so many times sigma."""


class FlowObjective:
    """Noise, targets and weights of a flow model with timesteps 1000 · sigma."""

    def __init__(
        self,
        spec: FamilySpec,
        noise_schedule: Mapping[str, Any],
        prediction: str,
        settings: ObjectiveSettings,
        seed: int,
    ) -> None:
        """Keep the distribution of the levels; raises BaseModelError where the model predicts no velocity."""
        if prediction != "velocity":
            raise BaseModelError(
                f"{spec.label} is a flow model, which predicts velocity, not {prediction}.",
                fix="Set base.prediction = auto.",
            )
        self.noise = NoiseSource(settings, seed, spread=False)
        self.levels = FlowLevels(settings, spec, noise_schedule, seed)
        self._settings = settings

    def prepare(
        self, latents: Tensor, weights: Tensor, step: int, first: int, pixel_weights: Tensor | None = None
    ) -> NoisyBatch:
        """Add noise to `latents` (B, C, h, w) on the device, keeping their dtype; see `DdpmObjective.prepare`."""
        device, (height, width) = latents.device, latents.shape[2:]
        sigmas = torch.tensor(self.levels.draw(step, first, len(latents), height * width))
        drawn = self.noise.draw(latents, step, first)
        added = self.noise.perturbed(drawn, step, first)
        noise = drawn.to(device, non_blocking=True)
        added = noise if added is drawn else added.to(device, non_blocking=True)
        batch = mix(latents, sigmas.to(device, non_blocking=True), (noise, added), weights)
        batch.pixel_weights = pixel_weights
        if self._settings.loss != "l2":
            limits = huber_limits(self._settings, 1.0 - sigmas, sigmas, sigmas)
            batch.limits = None if limits is None else limits.to(device, non_blocking=True)
        return batch

    def at(self, latents: Tensor, level: float, seeds: Sequence[int]) -> NoisyBatch:
        """Return `latents` (B, C, h, w) with the noise of sigma = `level`, 0..1; see `DdpmObjective.at`."""
        noise, ones = fixed_noise(latents, seeds), torch.ones(len(latents), device=latents.device)
        return mix(latents, level * ones, (noise, noise), ones)

    def loss(self, prediction: Tensor, batch: NoisyBatch) -> Tensor:
        """Return the weighted loss () of a prediction (B, C, h, w)."""
        return weighted_loss(prediction, batch, smooth_l1=self._settings.loss == "smooth_l1")


def mix(latents: Tensor, sigmas: Tensor, noises: tuple[Tensor, Tensor], weights: Tensor) -> NoisyBatch:
    """Return latents (B, C, h, w) with noise at fp32 `sigmas` (B,).

    Of `noises` the first is the target's, the second the one that is added.
    """
    noise, added = noises
    amount, clean = sigmas.view(-1, 1, 1, 1), latents.float()
    noisy = ((1.0 - amount) * clean + amount * added).to(latents.dtype)
    return NoisyBatch(noisy, sigmas * TIME_SCALE, noise - clean, weights)
