"""What the denoiser learns: noise is added to latents, and the loss compares the prediction with a target.

DDPM (Ho et al., arXiv:2006.11239): noisy = √ᾱₜ · latents + √(1-ᾱₜ) · noise, and the target is the noise (epsilon) or
the velocity v = √ᾱₜ · noise - √(1-ᾱₜ) · latents (Salimans & Ho, arXiv:2202.00512). Every draw is keyed by the step and
the picture's place in it, so that accumulating 4 batches of 1 sees the same noise as one batch of 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorasmith.engine.config import ObjectiveSettings
from lorasmith.engine.draws import python_rng, torch_rng
from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import Family

MIN_MASK_MEAN = 0.1
"""No pixel under a mask counts more than 1 / 0.1 times as much as one of a picture without a mask."""


@dataclass
class NoisyBatch:
    """One micro-batch ready for the denoiser: `noisy` and `target` (B, C, h, w), `timesteps` (B,), `weights` (B,).

    `pixel_weights` (B, 1, h, w) are those of the pictures' masks, None where no picture has one.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor
    pixel_weights: Tensor | None = None


class DdpmObjective:
    """Noise, targets and weights of the discrete diffusion process with timesteps 0..T-1."""

    def __init__(
        self,
        noise_schedule: Mapping[str, Any],
        prediction: str,
        settings: ObjectiveSettings,
        seed: int,
        device: torch.device,
    ) -> None:
        """Prepare tables of the schedule on `device`; `prediction` is `epsilon` or `v_prediction`."""
        if prediction not in ("epsilon", "v_prediction"):
            raise BaseModelError(
                f"Training on a base model that predicts {prediction} is not possible.",
                fix="Choose a base that predicts epsilon or v_prediction, or set base.prediction.",
            )
        self.seed = seed
        self.noise_offset = settings.noise_offset
        self.velocity = prediction == "v_prediction"
        alphas = alphas_cumprod(noise_schedule)
        self.num_timesteps = len(alphas)
        weights = min_snr_weights(alphas, settings.min_snr_gamma, velocity=self.velocity)
        self._signal = alphas.sqrt().float().to(device)
        self._noise = (1.0 - alphas).sqrt().float().to(device)
        self._weights = weights.float().to(device)

    def prepare(
        self, latents: Tensor, weights: Tensor, step: int, first: int, pixel_weights: Tensor | None = None
    ) -> NoisyBatch:
        """Add noise to `latents` (B, C, h, w) on the device, keeping their dtype.

        `step` counts the steps finished before; `first` is the place of the first picture among those of this step.
        `weights` (B,) are the pictures' own (1, or prior_weight for regularization), `pixel_weights` those of masks.
        """
        timesteps = self._draw_timesteps(len(latents), step, first).to(latents.device, non_blocking=True)
        noise = self._draw_noise(latents, step, first).to(latents.device, non_blocking=True)
        signal = self._signal[timesteps].view(-1, 1, 1, 1)
        amount = self._noise[timesteps].view(-1, 1, 1, 1)
        clean = latents.float()
        target = signal * noise - amount * clean if self.velocity else noise
        noisy = (signal * clean + amount * noise).to(latents.dtype)
        return NoisyBatch(noisy, timesteps, target, weights * self._weights[timesteps], pixel_weights)

    def _draw_timesteps(self, num: int, step: int, first: int) -> Tensor:
        places = range(first, first + num)
        return torch.tensor([python_rng(self.seed, "timestep", step, i).randrange(self.num_timesteps) for i in places])

    def _draw_noise(self, latents: Tensor, step: int, first: int) -> Tensor:
        """Draw noise on the CPU, so that every device sees the same; noise offset as in crosslabs.org's Nov 2022 post.

        The offset is one more normal number for each picture and channel: it teaches the overall brightness, which
        plain noise leaves nearly untouched.
        """
        drawn = []
        for place in range(first, first + len(latents)):
            generator = torch_rng(self.seed, "noise", step, place)
            noise = torch.randn(latents.shape[1:], generator=generator)
            if self.noise_offset:
                noise += self.noise_offset * torch.randn((latents.shape[1], 1, 1), generator=generator)
            drawn.append(noise)
        return torch.stack(drawn)


def build_objective(family: Family, settings: ObjectiveSettings, seed: int) -> DdpmObjective:
    """Return the objective that the loaded base model was trained with; raises BaseModelError for an unknown one."""
    if family.spec.objective != "ddpm":
        raise BaseModelError(
            f"The objective {family.spec.objective} of {family.spec.label} cannot be trained yet.",
            fix="Choose another base model.",
        )
    return DdpmObjective(family.noise_schedule, family.identity.prediction, settings, seed, family.device)


def weighted_loss(prediction: Tensor, batch: NoisyBatch) -> Tensor:
    """Return the mean over pictures of weight · mean of (pixel weight · squared error), in fp32."""
    errors = (prediction.float() - batch.target).square()
    if batch.pixel_weights is not None:
        errors = errors * batch.pixel_weights
    return (errors.flatten(1).mean(dim=1) * batch.weights).mean()


def mask_weights(mask: Tensor, unmasked_weight: float) -> Tensor:
    """Return the loss weight of each latent pixel (1, h, w) from a mask (1, h, w) uint8, 255 where to learn.

    The weight is 1 under the mask and `unmasked_weight` elsewhere, linear in between, then divided by its mean over the
    picture, so that a picture counts as much as others however small its mask is. Trainers differ in that: sd-scripts
    (apply_masked_loss) never divides, OneTrainer (masked_losses) does so by picture if asked to, ai-toolkit (SDTrainer)
    always but by the batch, so that pictures would depend on their neighbors. The divisor is at least `MIN_MASK_MEAN`,
    so that a speck is not blown up without bound. A black mask leaves out all of a picture, which is not made up for.
    """
    outside = 1.0 - mask.float() / 255.0
    weights = 1.0 - (1.0 - unmasked_weight) * outside
    if not mask.any():
        return weights
    return weights / weights.mean().clamp(min=MIN_MASK_MEAN)


def alphas_cumprod(noise_schedule: Mapping[str, Any]) -> Tensor:
    """Return ᾱₜ (T,) in fp64 from a scheduler's configuration.

    Betas as diffusers' schedulers define them; `rescale_betas_zero_snr` ends the schedule in pure noise (Lin et al.,
    arXiv:2305.08891, algorithm 1). Raises BaseModelError for an unknown kind of schedule.
    """
    trained_betas = noise_schedule.get("trained_betas")
    num = int(noise_schedule.get("num_train_timesteps", 1000))
    start, end = noise_schedule.get("beta_start", 0.0001), noise_schedule.get("beta_end", 0.02)
    kind = noise_schedule.get("beta_schedule", "linear")
    if trained_betas is not None:
        betas = torch.tensor(trained_betas, dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(start, end, num, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), num, dtype=torch.float64).square()
    elif kind == "squaredcos_cap_v2":
        # Nichol & Dhariwal, arXiv:2102.09672: betas that make ᾱ a squared cosine, capped at 0.999.
        bar = (torch.linspace(0, 1, num + 1, dtype=torch.float64) + 0.008).div(1.008).mul(math.pi / 2).cos().square()
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise BaseModelError(f"The base model's noise schedule {kind!r} is unknown.", fix="Choose another base model.")
    alphas = (1.0 - betas).cumprod(0)
    if not noise_schedule.get("rescale_betas_zero_snr", False):
        return alphas
    roots = alphas.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()


def min_snr_weights(alphas: Tensor, gamma: float, *, velocity: bool) -> Tensor:
    """Return the loss weight of each timestep (T,); ones where `gamma` is 0.

    Min-SNR-γ (Hang et al., arXiv:2303.09556): min(SNR, γ)/SNR for epsilon and min(SNR, γ)/(SNR + 1) for velocity,
    with SNR = ᾱ/(1-ᾱ). Written without a division by SNR, so that zero terminal SNR is safe: the epsilon weight goes
    to 1 there.
    """
    if gamma == 0:
        return torch.ones_like(alphas)
    snr = alphas / (1.0 - alphas)
    if velocity:
        return snr.clamp(max=gamma) / (snr + 1.0)
    return gamma / snr.clamp(min=gamma)
