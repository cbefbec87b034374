"""What the denoiser learns: noise is added to latents, and the loss compares the prediction with a target.

`ddpm` and `flow` are the two processes that base models are made with; `timesteps` says which noise levels are trained
how often, `noise` draws the noise, `losses` weighs the errors. Every draw is keyed by the step and the picture's place
in it, so that accumulating 4 batches of 1 sees the same noise as one batch of 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lorasmith.engine.config import ObjectiveSettings
from lorasmith.engine.families import Family
from lorasmith.engine.objectives.ddpm import DdpmObjective as DdpmObjective
from lorasmith.engine.objectives.ddpm import alphas_cumprod as alphas_cumprod
from lorasmith.engine.objectives.ddpm import min_snr_weights as min_snr_weights
from lorasmith.engine.objectives.ddpm import zero_terminal
from lorasmith.engine.objectives.flow import FlowObjective as FlowObjective
from lorasmith.engine.objectives.losses import MIN_MASK_MEAN as MIN_MASK_MEAN
from lorasmith.engine.objectives.losses import NoisyBatch as NoisyBatch
from lorasmith.engine.objectives.losses import mask_weights as mask_weights
from lorasmith.engine.objectives.losses import weighted_loss as weighted_loss


class Objective(Protocol):
    """What a base model was trained with."""

    def prepare(
        self, latents: Tensor, weights: Tensor, step: int, first: int, pixel_weights: Tensor | None = None
    ) -> NoisyBatch:
        """Add noise to latents (B, C, h, w) on the device as the step and each picture's place in it decide."""
        ...

    def at(self, latents: Tensor, level: float, seeds: Sequence[int]) -> NoisyBatch:
        """Add noise of a level 0..1 that only the level and each picture's seed decide, with all weights 1."""
        ...

    def loss(self, prediction: Tensor, batch: NoisyBatch) -> Tensor:
        """Return the weighted loss () of a prediction (B, C, h, w)."""
        ...


def tell_family(family: Family, settings: ObjectiveSettings) -> None:
    """Let the loaded base model compute as the settings ask: told this guidance, and drawing with the trained schedule.

    Raises ConfigError where that schedule is not for it.
    """
    family.guidance = settings.guidance
    if settings.zero_terminal_snr and family.spec.objective == "ddpm":
        velocity = family.identity.prediction == "v_prediction"
        family.noise_schedule = zero_terminal(family.noise_schedule, velocity=velocity)


def build_objective(family: Family, settings: ObjectiveSettings, seed: int) -> Objective:
    """Return the objective that the loaded base model was trained with; raises BaseModelError where it cannot be."""
    prediction = family.identity.prediction
    if family.spec.objective == "flow":
        return FlowObjective(family.spec, family.noise_schedule, prediction, settings, seed)
    return DdpmObjective(family.noise_schedule, prediction, settings, seed, family.device)
