"""The noise that is added to latents, drawn on the CPU for each picture by itself, so that every device sees the same.

Every draw is keyed by its purpose and its place, never by the batch: accumulating 4 batches of 1 sees the same noise as
one batch of 4, and so does a batch that is taken in pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.engine.config import ObjectiveSettings
from lorasmith.engine.draws import torch_rng


class NoiseSource:
    """Draws noise as the settings of a run ask for it."""

    def __init__(self, settings: ObjectiveSettings, seed: int, *, spread: bool) -> None:
        """Keep what shapes the noise; without `spread` neither noise offset nor coarser sizes are added."""
        self.seed = seed
        self._offset = settings.noise_offset if spread else 0.0
        self._sizes = settings.multires_iterations if spread else 0
        self._discount = settings.multires_discount
        self._perturbation = settings.ip_noise

    def draw(self, latents: Tensor, step: int, first: int) -> Tensor:
        """Return noise for latents (B, C, h, w) of the pictures from place `first` on in the step, fp32 on the CPU."""
        drawn = [self._of_picture(latents.shape[1:], step, place) for place in range(first, first + len(latents))]
        return torch.stack(drawn)

    def perturbed(self, noise: Tensor, step: int, first: int) -> Tensor:
        """Return the noise that is added where the target stays `noise`: with a little more of it, if asked for.

        Input perturbation (Ning et al., arXiv:2301.11706, algorithm 1): noise + γ · other noise. It shows the denoiser
        inputs that are slightly off, as its own errors make them when it draws. `noise` is on the CPU.
        """
        if not self._perturbation:
            return noise
        generators = [torch_rng(self.seed, "input noise", step, place) for place in range(first, first + len(noise))]
        other = torch.stack([torch.randn(noise.shape[1:], generator=generator) for generator in generators])
        return noise + self._perturbation * other

    def _of_picture(self, shape: torch.Size, step: int, place: int) -> Tensor:
        """Draw one picture's noise (C, h, w); offset as in "Diffusion with Offset Noise" (crosslabs.org, 2023).

        The offset is one more normal number for each channel: it teaches the overall brightness, which plain noise
        leaves nearly untouched.
        """
        generator = torch_rng(self.seed, "noise", step, place)
        noise = torch.randn(shape, generator=generator)
        if self._offset:
            noise += self._offset * torch.randn((shape[0], 1, 1), generator=generator)
        if self._sizes:
            noise = with_coarser_noise(noise, self._sizes, self._discount, generator)
        return noise


def fixed_noise(latents: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return plain noise for latents (B, C, h, w) that depends on each picture's seed alone, on the latents' device."""
    generators = [torch_rng(seed, "fixed noise") for seed in seeds]
    drawn = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    return drawn.to(latents.device)


def with_coarser_noise(noise: Tensor, sizes: int, discount: float, generator: torch.Generator) -> Tensor:
    """Return `noise` (C, h, w) plus noise of up to `sizes` coarser sizes, scaled back to a standard deviation of 1.

    Multi-resolution or pyramid noise (J. Whitaker, "Multi-Resolution Noise for Diffusion Model Training", 2023): size
    k = 1, 2 … is the picture's over rᵏ with r drawn anew from [2, 4), made as large as the picture by bilinear
    interpolation and weighted by discountᵏ. It ends at a size of one pixel.
    """
    height, width = noise.shape[1:]
    total = noise
    for power in range(1, sizes + 1):
        ratio = (2.0 + 2.0 * float(torch.rand((), generator=generator))) ** power
        coarse = max(1, math.floor(height / ratio)), max(1, math.floor(width / ratio))
        drawn = torch.randn((1, noise.shape[0], *coarse), generator=generator)
        enlarged = torch.nn.functional.interpolate(drawn, size=(height, width), mode="bilinear", align_corners=False)
        total = total + discount**power * enlarged[0]
        if min(coarse) == 1:
            break
    return total / total.std()
