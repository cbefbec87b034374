"""Discrete diffusion: noise by a table of timesteps, the target is the noise or the velocity.

DDPM (Ho et al., arXiv:2006.11239): noisy = √ᾱₜ · latents + √(1-ᾱₜ) · noise, and the target is the noise (epsilon) or
the velocity v = √ᾱₜ · noise - √(1-ᾱₜ) · latents (Salimans & Ho, arXiv:2202.00512).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorasmith.engine.config import ObjectiveSettings
from lorasmith.engine.errors import BaseModelError, ConfigError
from lorasmith.engine.objectives.losses import NoisyBatch, huber_limits, weighted_loss
from lorasmith.engine.objectives.noise import NoiseSource, fixed_noise
from lorasmith.engine.objectives.timesteps import draw_timestep, trained_range

_MIN_SNR = 1e-3
"""Below it the debiased weight of epsilon, 1/√SNR, grows no more: the last timestep of a zero-terminal schedule would
have an infinite one. Stable Diffusion's own schedule ends at 0.0047."""


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
        """Prepare tables of the schedule on `device`; `prediction` is `epsilon` or `v_prediction`.

        Raises BaseModelError for another prediction, ConfigError where zero terminal SNR is forced on epsilon.
        """
        if prediction not in ("epsilon", "v_prediction"):
            raise BaseModelError(
                f"Training on a base model that predicts {prediction} is not possible.",
                fix="Choose a base that predicts epsilon or v_prediction, or set base.prediction.",
            )
        self.seed = seed
        self.velocity = prediction == "v_prediction"
        self.noise = NoiseSource(settings, seed, spread=True)
        if settings.zero_terminal_snr:
            noise_schedule = zero_terminal(noise_schedule, velocity=self.velocity)
        alphas = alphas_cumprod(noise_schedule)
        self.num_timesteps = len(alphas)
        self._range = trained_range(settings, self.num_timesteps)
        self._bias = settings.timestep_bias
        self._smooth_l1 = settings.loss == "smooth_l1"
        signal, noise = alphas.sqrt(), (1.0 - alphas).sqrt()
        time = torch.arange(self.num_timesteps, dtype=torch.float64) / self.num_timesteps
        limits = huber_limits(settings, signal, noise, time)
        self._signal = signal.float().to(device)
        self._noise = noise.float().to(device)
        self._weights = snr_weights(alphas, settings, velocity=self.velocity).float().to(device)
        self._limits = None if limits is None else limits.float().to(device)

    def prepare(
        self, latents: Tensor, weights: Tensor, step: int, first: int, pixel_weights: Tensor | None = None
    ) -> NoisyBatch:
        """Add noise to `latents` (B, C, h, w) on the device, keeping their dtype.

        `step` counts the steps finished before; `first` is the place of the first picture among those of this step.
        `weights` (B,) are the pictures' own (1, or prior_weight for regularization), `pixel_weights` those of masks.
        """
        timesteps = self._draw_timesteps(len(latents), step, first).to(latents.device, non_blocking=True)
        drawn = self.noise.draw(latents, step, first)
        added = self.noise.perturbed(drawn, step, first)
        noise = drawn.to(latents.device, non_blocking=True)
        added = noise if added is drawn else added.to(latents.device, non_blocking=True)
        batch = self._mix(latents, timesteps, (noise, added), weights * self._weights[timesteps])
        batch.pixel_weights = pixel_weights
        if self._limits is not None:
            batch.limits = self._limits[timesteps]
        return batch

    def at(self, latents: Tensor, level: float, seeds: Sequence[int]) -> NoisyBatch:
        """Return `latents` (B, C, h, w) with the noise of level 0..1 of the whole schedule, and noise by picture.

        For measuring: `seeds` (one a picture) and level alone decide; all weights are 1 and errors are squared, so that
        runs with different settings can be compared.
        """
        timestep = round(level * (self.num_timesteps - 1))
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        noise, ones = fixed_noise(latents, seeds), torch.ones(len(latents), device=latents.device)
        return self._mix(latents, timesteps, (noise, noise), ones)

    def loss(self, prediction: Tensor, batch: NoisyBatch) -> Tensor:
        """Return the weighted loss () of a prediction (B, C, h, w)."""
        return weighted_loss(prediction, batch, smooth_l1=self._smooth_l1)

    def _mix(self, latents: Tensor, timesteps: Tensor, noises: tuple[Tensor, Tensor], weights: Tensor) -> NoisyBatch:
        """Return latents at timesteps; of `noises` the first is the target's, the second the one that is added."""
        noise, added = noises
        signal = self._signal[timesteps].view(-1, 1, 1, 1)
        amount = self._noise[timesteps].view(-1, 1, 1, 1)
        clean = latents.float()
        target = signal * noise - amount * clean if self.velocity else noise
        noisy = (signal * clean + amount * added).to(latents.dtype)
        return NoisyBatch(noisy, timesteps, target, weights)

    def _draw_timesteps(self, num: int, step: int, first: int) -> Tensor:
        places = range(first, first + num)
        return torch.tensor([draw_timestep(self.seed, step, place, self._range, self._bias) for place in places])


def zero_terminal(noise_schedule: Mapping[str, Any], *, velocity: bool) -> dict[str, Any]:
    """Return the schedule that ends in pure noise; raises ConfigError for an epsilon model.

    At pure noise epsilon's target is the input itself: nothing about the picture would be learnt.
    """
    if velocity:
        return {**noise_schedule, "rescale_betas_zero_snr": True}
    raise ConfigError(
        "objective.zero_terminal_snr needs a base model that predicts velocity; this one predicts epsilon.",
        why="Asked for the noise in pure noise, it would have nothing to learn about the picture.",
        fix="Set objective.zero_terminal_snr = false, or objective.noise_offset = 0.05 for dark and bright pictures.",
    )


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


def snr_weights(alphas: Tensor, settings: ObjectiveSettings, *, velocity: bool) -> Tensor:
    """Return the loss weight of each timestep (T,), the product of those that are switched on; else ones.

    All are made for the error of epsilon. The same error of velocity is (SNR + 1)/SNR times as large, so its weight is
    that of epsilon times SNR/(SNR + 1) = ᾱ; only then do both kinds of models learn the same at each timestep. With
    SNR = ᾱ/(1-ᾱ): min-SNR as `min_snr_weights` says, debiased estimation 1/√SNR (Yu et al., arXiv:2310.08442), P2
    (1 + SNR)^-γ (Choi et al., arXiv:2204.00227, with k = 1), which is (1-ᾱ)^γ. (For velocity sd-scripts weighs debiased
    estimation by 1/(SNR + 1), which is another distribution than the paper's.)
    """
    weights = min_snr_weights(alphas, settings.min_snr_gamma, velocity=velocity)
    if not (settings.debiased or settings.p2_gamma):
        return weights
    if velocity and settings.min_snr_gamma == 0:
        weights = weights * alphas
    if settings.debiased:
        snr = alphas / (1.0 - alphas)
        weights = weights / snr.clamp(min=_MIN_SNR).sqrt()
    return weights * (1.0 - alphas) ** settings.p2_gamma


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
