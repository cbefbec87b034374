from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from lorasmith.engine.config import ObjectiveSettings
from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.objectives import DdpmObjective, NoisyBatch, alphas_cumprod, min_snr_weights, weighted_loss

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
ZERO_SNR = SD | {"rescale_betas_zero_snr": True}
CPU = torch.device("cpu")
LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
ONES = torch.ones(3)


def objective(prediction: str = "epsilon", schedule: dict[str, Any] = SD, **settings: float) -> DdpmObjective:
    return DdpmObjective(schedule, prediction, ObjectiveSettings(**settings), 7, CPU)


@pytest.mark.parametrize(
    "schedule",
    [
        SD,
        ZERO_SNR,
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        SD | {"num_train_timesteps": 50},
        {"trained_betas": [0.1, 0.2, 0.3]},
    ],
)
def test_alphas_are_those_of_diffusers(schedule: dict[str, Any]) -> None:
    theirs = DDPMScheduler.from_config(schedule).alphas_cumprod
    assert torch.allclose(alphas_cumprod(schedule).float(), theirs, rtol=2e-4, atol=1e-6)


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    assert alphas_cumprod(ZERO_SNR)[-1] == 0.0
    assert alphas_cumprod(SD)[-1] > 0.004


def test_an_unknown_schedule_or_prediction_is_refused() -> None:
    with pytest.raises(BaseModelError, match="sigmoid"):
        alphas_cumprod({"beta_schedule": "sigmoid"})
    with pytest.raises(BaseModelError, match="velocity"):
        objective("velocity")


@pytest.mark.parametrize("schedule", [SD, ZERO_SNR])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noisy_latents_and_targets_are_those_of_diffusers(prediction: str, schedule: dict[str, Any]) -> None:
    batch = objective(prediction, schedule).prepare(LATENTS, ONES, step=5, first=0)
    scheduler = DDPMScheduler.from_config(schedule)
    # The noise itself, from what was prepared: by epsilon's target under the same key.
    noise = objective("epsilon", schedule).prepare(LATENTS, ONES, step=5, first=0).target
    assert torch.allclose(batch.noisy, scheduler.add_noise(LATENTS, noise, batch.timesteps), atol=1e-4)
    target = noise if prediction == "epsilon" else scheduler.get_velocity(LATENTS, noise, batch.timesteps)
    assert torch.allclose(batch.target, target, atol=1e-4)


def test_draws_depend_on_step_and_place_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    whole = objective().prepare(LATENTS, ONES, step=2, first=0)
    torch.manual_seed(2)
    parts = [objective().prepare(LATENTS[i : i + 1], ONES[:1], step=2, first=i) for i in range(3)]
    assert torch.equal(whole.noisy, torch.cat([part.noisy for part in parts]))
    assert torch.equal(whole.timesteps, torch.cat([part.timesteps for part in parts]))
    later = objective().prepare(LATENTS, ONES, step=3, first=0)
    assert not torch.equal(whole.target, later.target)


def test_timesteps_are_uniform_over_the_whole_schedule() -> None:
    prepared = objective()
    drawn = torch.cat([prepared._draw_timesteps(10, step, 0) for step in range(400)])
    assert (drawn.min(), drawn.max()) >= (0, 990)
    assert drawn.max() <= 999
    counts = torch.bincount(drawn // 250, minlength=4)
    assert counts.sum() == 4000
    # Four quarters of 1000 with a standard deviation of 27.
    assert ((counts - 1000).abs() < 120).all()


def test_noise_is_standard_normal_and_the_offset_adds_one_number_a_channel() -> None:
    latents = torch.zeros(64, 4, 16, 16)
    plain = objective()._draw_noise(latents, 0, 0)
    assert plain.mean().abs() < 0.01
    assert plain.std() == pytest.approx(1.0, abs=0.01)
    offset = objective(noise_offset=0.5)._draw_noise(latents, 0, 0) - plain
    assert torch.allclose(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-5)
    assert offset[:, :, 0, 0].std() == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_follow_the_paper_at_every_timestep(gamma: float) -> None:
    alphas = alphas_cumprod(SD)
    for velocity in (False, True):
        weights = min_snr_weights(alphas, gamma, velocity=velocity)
        for t in range(0, 1000, 37):
            signal, noise = math.sqrt(float(alphas[t])), math.sqrt(1 - float(alphas[t]))
            snr = (signal / noise) ** 2
            expected = min(snr, gamma) / (snr + 1 if velocity else snr)
            assert float(weights[t]) == pytest.approx(expected, rel=1e-6)


def test_min_snr_is_finite_at_zero_terminal_snr() -> None:
    alphas = alphas_cumprod(ZERO_SNR)
    assert float(min_snr_weights(alphas, 5.0, velocity=False)[-1]) == 1.0
    assert float(min_snr_weights(alphas, 5.0, velocity=True)[-1]) == 0.0
    assert torch.equal(min_snr_weights(alphas, 0.0, velocity=True), torch.ones(1000, dtype=torch.float64))


def test_the_loss_is_the_weighted_mean_of_each_pictures_squared_error() -> None:
    weights = torch.tensor([1.0, 0.25, 2.0])
    batch = NoisyBatch(LATENTS, torch.zeros(3, dtype=torch.long), LATENTS * 0, weights)
    expected = sum(float(w) * float((x.double() ** 2).mean()) for w, x in zip(weights, LATENTS, strict=True)) / 3
    assert float(weighted_loss(LATENTS, batch)) == pytest.approx(expected, rel=1e-5)


def test_a_pictures_own_weight_and_min_snr_multiply() -> None:
    prior = torch.tensor([1.0, 0.5, 0.0])
    batch = objective(min_snr_gamma=5.0).prepare(LATENTS, prior, 1, 0)
    table = min_snr_weights(alphas_cumprod(SD), 5.0, velocity=False).float()
    assert torch.allclose(batch.weights, prior * table[batch.timesteps])
