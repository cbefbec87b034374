"""Which noise levels are trained how often: each draw is one uniform number, made a level by a quantile function.

So a distribution is one monotone function of (0, 1), the same number gives the same level in every run, and the least
and the most noise squeeze the levels between them, so that no draw is lost.

What the tables of the model's own scheduler hold is not trained: for some models they are shifted already and for
others not, so that the same setting would mean two things. The levels here are the sigmas of the training itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any, Literal

from lorasmith.engine.config import ObjectiveSettings
from lorasmith.engine.draws import python_rng
from lorasmith.engine.families import FamilySpec

Bias = Literal["balanced", "content", "style"]
LEVELS = 1000
"""Least and most noise are given in this many parts, as all trainers do."""
_EDGE = 2.0**-40
"""Uniform numbers keep this far from 0 and 1, where a normal quantile is infinite."""
_NORMAL = NormalDist()


class FlowLevels:
    """Draws the noise levels (sigmas) of a flow model: 0 is the picture, 1 is pure noise."""

    def __init__(
        self, settings: ObjectiveSettings, spec: FamilySpec, noise_schedule: Mapping[str, Any], seed: int
    ) -> None:
        """Keep the distribution of `settings`, with what `auto` and 0 leave to the base model taken from `spec`.

        `noise_schedule` is the model's scheduler configuration: `resolution_shift` takes its two ends from it.
        """
        self.seed = seed
        self.sampling = spec.timestep_sampling if settings.timestep_sampling == "auto" else settings.timestep_sampling
        self._settings = settings
        self._shift = settings.shift or spec.shift
        self._patch = spec.latent_patch
        self._schedule = noise_schedule

    def draw(self, step: int, first: int, num: int, latents_of_picture: int) -> list[float]:
        """Return the levels of `num` pictures, from place `first` on in the step.

        `latents_of_picture` is h · w of the batch's latents, whose number of tokens `resolution_shift` goes by.
        """
        quantile = self.quantile(latents_of_picture)
        return [quantile(uniform(self.seed, step, place)) for place in range(first, first + num)]

    def quantile(self, latents_of_picture: int) -> Callable[[float], float]:
        """Return the quantile function of the levels: rising, from numbers in (0, 1) to levels."""
        settings = self._settings
        base = self._unbiased(latents_of_picture / self._patch**2)
        low, high = settings.min_timestep / LEVELS, settings.max_timestep / LEVELS

        def level(number: float) -> float:
            return low + (high - low) * base(_inside(biased(number, settings.timestep_bias)))

        return level

    def _unbiased(self, tokens: float) -> Callable[[float], float]:
        settings, width = self._settings, self._settings.logit_std
        if self.sampling == "uniform":
            return _same
        if self.sampling == "mode":
            return lambda number: mode_level(number, settings.mode_scale)
        if self.sampling == "logit_normal":
            return lambda number: logit_normal_level(number, settings.logit_mean, width)
        if self.sampling == "shift":
            return lambda number: shifted(logit_normal_level(number, 0.0, width), self._shift)
        if self.sampling == "resolution_shift":
            factor = resolution_factor(tokens, self._schedule)
            return lambda number: shifted(logit_normal_level(number, 0.0, width), factor)
        return lambda number: logit_normal_level(number, 0.0, width)


def uniform(seed: int, step: int, place: int) -> float:
    """Return the uniform number in (0, 1) of a picture's place in a step."""
    return _inside(python_rng(seed, "timestep", step, place).random())


def biased(number: float, bias: Bias) -> float:
    """Return the uniform `number` in (0, 1) moved towards 1 (`content`: high noise) or towards 0 (`style`).

    Cubic, as ai-toolkit does it (`content_or_style`, after T2I-Adapter, arXiv:2302.08453, section 3.4): composition is
    decided at high noise, texture at low noise. Still one number for each, so that every distribution can have it.
    """
    if bias == "content":
        return float(1.0 - (1.0 - number) ** 3)
    return number**3 if bias == "style" else number


def logit_normal_level(number: float, mean: float, std: float) -> float:
    """Return the level whose logit is normal (Esser et al., arXiv:2403.03206, section 3.1): sigmoid(mean + std · z)."""
    return 1.0 / (1.0 + math.exp(-(mean + std * _NORMAL.inv_cdf(number))))


def mode_level(number: float, scale: float) -> float:
    """Return the level of mode sampling with heavy tails (Esser et al., arXiv:2403.03206, section 3.1).

    Their f(u) = 1 - u - scale · (cos²(πu/2) - 1 + u) falls with u; of 1 - u it rises, with the same distribution.
    """
    falling = 1.0 - number
    return 1.0 - falling - scale * (math.cos(math.pi * falling / 2.0) ** 2 - 1.0 + falling)


def shifted(level: float, factor: float) -> float:
    """Return the level moved towards more noise: factor · σ / (1 + (factor - 1) · σ); arXiv:2403.03206, section 5.3.2.

    `shift` and `resolution_shift` move sigmoid(`logit_std` · z), as sd-scripts' `shift` and `flux_shift` do. That adds
    the logarithm of the factor to the logit.
    """
    return factor * level / (1.0 + (factor - 1.0) * level)


def resolution_factor(tokens: float, noise_schedule: Mapping[str, Any]) -> float:
    """Return the shift factor of pictures of so many tokens: more of them need more noise to lose their composition.

    μ is linear in the tokens between `base_image_seq_len` → `base_shift` and `max_image_seq_len` → `max_shift` of the
    scheduler's configuration, and the factor is e^μ, or μ with `time_shift_type = linear`: diffusers'
    `calculate_shift` and `FlowMatchEulerDiscreteScheduler.time_shift`, whose defaults stand in for what is missing.
    """
    first, last = noise_schedule.get("base_image_seq_len", 256), noise_schedule.get("max_image_seq_len", 4096)
    low, high = noise_schedule.get("base_shift", 0.5), noise_schedule.get("max_shift", 1.15)
    mu = float(low + (high - low) * (tokens - first) / (last - first))
    return mu if noise_schedule.get("time_shift_type", "exponential") == "linear" else math.exp(mu)


def trained_range(settings: ObjectiveSettings, num_timesteps: int) -> range:
    """Return the timesteps of a discrete schedule between the least and the most noise; at least one."""
    low = settings.min_timestep * num_timesteps // LEVELS
    high = -(-settings.max_timestep * num_timesteps // LEVELS)
    return range(min(low, num_timesteps - 1), max(high, low + 1))


def draw_timestep(seed: int, step: int, place: int, among: range, bias: Bias) -> int:
    """Return one of the timesteps `among`, all alike or more of the noisier or the clearer ones."""
    if bias == "balanced":
        return among.start + python_rng(seed, "timestep", step, place).randrange(len(among))
    return among.start + min(int(biased(uniform(seed, step, place), bias) * len(among)), len(among) - 1)


def _inside(number: float) -> float:
    return min(max(number, _EDGE), 1.0 - _EDGE)


def _same(number: float) -> float:
    return number
