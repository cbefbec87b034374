from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.engine.config import ObjectiveSettings
from lorasmith.engine.families import FamilySpec, families
from lorasmith.engine.objectives.timesteps import (
    FlowLevels,
    biased,
    draw_timestep,
    resolution_factor,
    trained_range,
    uniform,
)

SPEC = dataclasses.replace(
    families()["sd15"].SPEC, objective="flow", timestep_sampling="shift", shift=3.0, latent_patch=2
)
NUMBERS = (np.arange(20_000) + 0.5) / 20_000
"""Uniform numbers without chance: one in the middle of each of 20,000 equal parts."""
SAMPLINGS = ("uniform", "sigmoid", "logit_normal", "mode", "shift", "resolution_shift")
SQUARE_1024 = 128 * 128


def levels(spec: FamilySpec = SPEC, schedule: dict[str, Any] | None = None, **settings: Any) -> FlowLevels:
    return FlowLevels(ObjectiveSettings(**settings), spec, schedule or {}, 7)


def stratified(latents: int = SQUARE_1024, **settings: Any) -> np.ndarray[Any, Any]:
    quantile = levels(**settings).quantile(latents)
    return np.array([quantile(number) for number in NUMBERS])


def logit_normal_density(level: np.ndarray[Any, Any], mean: float, std: float) -> np.ndarray[Any, Any]:
    """Esser et al., arXiv:2403.03206, equation 19."""
    logit = np.log(level / (1 - level))
    bell = np.exp(-((logit - mean) ** 2) / (2 * std**2))
    return np.asarray(bell / (std * math.sqrt(2 * math.pi) * level * (1 - level)))


def shares(density: Any, edges: np.ndarray[Any, Any]) -> list[float]:
    """Integrate a density over the bins by the midpoint rule."""
    found = []
    for low, high in itertools.pairwise(edges):
        points = low + (high - low) * (np.arange(4000) + 0.5) / 4000
        found.append(float(density(points).mean() * (high - low)))
    return found


@pytest.mark.parametrize(
    ("chosen", "mean", "std"),
    [
        ({"timestep_sampling": "sigmoid"}, 0.0, 1.0),
        ({"timestep_sampling": "sigmoid", "logit_std": 1.7}, 0.0, 1.7),
        ({"timestep_sampling": "logit_normal", "logit_mean": -0.6, "logit_std": 0.5}, -0.6, 0.5),
        ({"timestep_sampling": "shift", "shift": 2.2, "logit_std": 1.3}, math.log(2.2), 1.3),
        # 1024 x 1024 pixels are 64 x 64 tokens, where the shift is e^1.15.
        ({"timestep_sampling": "resolution_shift"}, 1.15, 1.0),
    ],
)
def test_levels_have_the_density_of_the_paper(chosen: dict[str, Any], mean: float, std: float) -> None:
    edges = np.linspace(0.0, 1.0, 21)
    counted, _ = np.histogram(stratified(**chosen), edges)
    expected = shares(lambda points: logit_normal_density(points, mean, std), edges)
    assert counted / len(NUMBERS) == pytest.approx(expected, abs=2e-4)


def test_uniform_levels_are_even() -> None:
    counted, _ = np.histogram(stratified(timestep_sampling="uniform"), np.linspace(0.0, 1.0, 21))
    assert counted.tolist() == [1000] * 20


@pytest.mark.parametrize("scale", [-1.0, -0.3, 0.0, 1.29, 1.75])
def test_mode_levels_are_those_of_the_paper(scale: float) -> None:
    # Esser et al., arXiv:2403.03206, equation 20, as diffusers' compute_density_for_timestep_sampling writes it.
    theirs = 1 - NUMBERS - scale * (np.cos(math.pi * NUMBERS / 2) ** 2 - 1 + NUMBERS)
    ours = stratified(timestep_sampling="mode", mode_scale=scale)
    assert ours == pytest.approx(np.sort(theirs), abs=1e-9)


def test_the_normal_levels_are_those_of_diffusers() -> None:
    # Its "logit_normal" is the sigmoid of a normal number, here of the same quantiles.
    normal = 0.4 + 0.8 * torch.special.ndtri(torch.tensor(NUMBERS))
    ours = stratified(timestep_sampling="logit_normal", logit_mean=0.4, logit_std=0.8)
    assert ours == pytest.approx(torch.sigmoid(normal).numpy(), abs=1e-9)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 6400])
def test_the_resolution_shift_is_the_schedulers(kind: str, tokens: int) -> None:
    config = {"base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, **config)
    mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    plain = stratified(timestep_sampling="sigmoid")[::500]
    theirs = scheduler.time_shift(mu, 1.0, torch.tensor(plain)).numpy()
    quantile = levels(schedule=dict(scheduler.config), timestep_sampling="resolution_shift").quantile(4 * tokens)
    assert [quantile(number) for number in NUMBERS[::500]] == pytest.approx(theirs, abs=1e-9)


def test_a_scheduler_that_does_not_say_its_shift_has_diffusers_own() -> None:
    assert resolution_factor(4096, {}) == resolution_factor(4096, dict(FlowMatchEulerDiscreteScheduler().config))


def test_auto_and_no_shift_are_the_base_models_own() -> None:
    assert stratified(timestep_sampling="auto") == pytest.approx(stratified(timestep_sampling="shift", shift=3.0))
    uniform_spec = dataclasses.replace(SPEC, timestep_sampling="uniform")
    assert levels(uniform_spec).quantile(64)(0.3) == pytest.approx(0.3)
    assert levels(uniform_spec, timestep_sampling="shift", shift=1.0).quantile(64)(0.5) == pytest.approx(0.5)
    # The shift of the scheduler's own table is another matter and is not trained.
    assert levels(SPEC, {"shift": 50.0}).quantile(64)(0.5) == pytest.approx(0.75)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_least_and_most_noise_squeeze_the_levels(sampling: Any) -> None:
    whole = stratified(timestep_sampling=sampling)
    part = stratified(timestep_sampling=sampling, min_timestep=200, max_timestep=700)
    assert part == pytest.approx(0.2 + 0.5 * whole)
    assert part.min() > 0.2 - 1e-12
    assert part.max() < 0.7 + 1e-12


def test_the_bias_is_cubic() -> None:
    content = stratified(timestep_sampling="uniform", timestep_bias="content")
    style = stratified(timestep_sampling="uniform", timestep_bias="style")
    # ai-toolkit: the cube of a uniform number is the place in a list that begins with the most noise.
    assert content == pytest.approx(np.sort(1 - NUMBERS**3), abs=1e-9)
    assert style == pytest.approx(np.sort(NUMBERS**3), abs=1e-9)
    assert content.mean() == pytest.approx(0.75, abs=1e-4)
    middle = stratified(timestep_sampling="sigmoid")
    assert stratified(timestep_sampling="sigmoid", timestep_bias="content").mean() > middle.mean() + 0.1
    assert stratified(timestep_sampling="sigmoid", timestep_bias="style").mean() < middle.mean() - 0.1


@settings(max_examples=150, deadline=None)
@given(
    sampling=st.sampled_from(SAMPLINGS),
    bias=st.sampled_from(["balanced", "content", "style"]),
    mean=st.floats(-5, 5),
    std=st.floats(0.01, 5),
    mode=st.floats(-1, 1.75),
    shift=st.floats(0.01, 100),
    latents=st.integers(1, 300_000),
    ends=st.tuples(st.integers(0, 999), st.integers(1, 1000)).filter(lambda ends: ends[0] < ends[1]),
)
def test_every_distribution_rises_inside_its_range(
    sampling: Any, bias: Any, mean: float, std: float, mode: float, shift: float, latents: int, ends: tuple[int, int]
) -> None:
    chosen = levels(
        timestep_sampling=sampling,
        timestep_bias=bias,
        logit_mean=mean,
        logit_std=std,
        mode_scale=mode,
        shift=shift,
        min_timestep=ends[0],
        max_timestep=ends[1],
    )
    quantile = chosen.quantile(latents)
    found = [quantile(number) for number in (2.0**-40, 0.01, 0.3, 0.5, 0.7, 0.99, 1 - 2.0**-40)]
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(found))
    assert ends[0] / 1000 - 1e-12 <= found[0] <= found[-1] <= ends[1] / 1000 + 1e-12


def test_draws_are_keyed_by_step_and_place() -> None:
    drawn = levels().draw(step=3, first=0, num=4, latents_of_picture=64)
    assert drawn == [levels().draw(3, place, 1, 64)[0] for place in range(4)]
    assert len({*drawn, *levels().draw(4, 0, 4, 64)}) == 8
    assert all(0.0 < uniform(7, step, 0) < 1.0 for step in range(100))


@pytest.mark.parametrize(
    ("ends", "num", "expected"),
    [
        ((0, 1000), 1000, range(1000)),
        ((200, 700), 1000, range(200, 700)),
        ((999, 1000), 1000, range(999, 1000)),
        ((0, 1), 1000, range(1)),
        ((500, 1000), 50, range(25, 50)),
        ((0, 1), 3, range(1)),
        ((999, 1000), 3, range(2, 3)),
        ((900, 910), 3, range(2, 3)),
    ],
)
def test_the_discrete_range_is_never_empty(ends: tuple[int, int], num: int, expected: range) -> None:
    assert trained_range(ObjectiveSettings(min_timestep=ends[0], max_timestep=ends[1]), num) == expected


@pytest.mark.parametrize("bias", ["balanced", "content", "style"])
def test_discrete_timesteps_stay_in_their_range_and_follow_the_bias(bias: Any) -> None:
    drawn = [draw_timestep(7, step, 0, range(100, 300), bias) for step in range(3000)]
    assert min(drawn) >= 100
    assert max(drawn) <= 299
    upper = sum(timestep >= 200 for timestep in drawn) / 3000
    # A cube is over a half where the number is over 0.794. The seed is fixed; 3000 draws spread by 0.9 %.
    expected = {"balanced": 0.5, "content": 0.5 ** (1 / 3), "style": 1 - 0.5 ** (1 / 3)}
    assert upper == pytest.approx(expected[bias], abs=0.03)


def test_the_bias_keeps_the_ends() -> None:
    for bias in ("balanced", "content", "style"):
        assert biased(0.0, bias) == 0.0  # type: ignore[arg-type]
        assert biased(1.0, bias) == 1.0  # type: ignore[arg-type]
