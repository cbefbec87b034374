from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from lorasmith.engine.config import ObjectiveSettings
from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.objectives import (
    MIN_MASK_MEAN,
    DdpmObjective,
    NoisyBatch,
    alphas_cumprod,
    mask_weights,
    min_snr_weights,
    weighted_loss,
)

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
    plain = objective().noise.draw(latents, 0, 0)
    assert plain.mean().abs() < 0.01
    assert plain.std() == pytest.approx(1.0, abs=0.01)
    offset = objective(noise_offset=0.5).noise.draw(latents, 0, 0) - plain
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


def masks(*shares: float) -> torch.Tensor:
    """Return masks (N, 1, 8, 8) whose upper rows are white: that share of each."""
    rows = torch.arange(8).view(1, 1, 8, 1)
    white = rows < (torch.tensor(shares) * 8).round().view(-1, 1, 1, 1)
    return (white.expand(len(shares), 1, 8, 8) * 255).to(torch.uint8)


def masked_batch(weights: torch.Tensor | None) -> NoisyBatch:
    return NoisyBatch(
        LATENTS, torch.zeros(3, dtype=torch.long), LATENTS.flip(0), torch.tensor([1.0, 0.5, 2.0]), weights
    )


@pytest.mark.parametrize("unmasked", [0.0, 0.1, 0.7])
def test_the_masked_loss_is_the_mean_error_weighted_by_pixel_and_picture(unmasked: float) -> None:
    mask = torch.cat([masks(0.25, 1.0), torch.full((1, 1, 8, 8), 128, dtype=torch.uint8)])
    batch = masked_batch(torch.stack([mask_weights(each, unmasked) for each in mask]))
    expected = 0.0
    for picture, weight in enumerate((1.0, 0.5, 2.0)):
        of_pixel = [[unmasked + (1 - unmasked) * int(v) / 255 for v in row] for row in mask[picture, 0].tolist()]
        whole = sum(map(sum, of_pixel))
        error = (LATENTS[picture].double() - LATENTS.flip(0)[picture].double()) ** 2
        total = sum(of_pixel[y][x] * float(error[:, y, x].sum()) for y in range(8) for x in range(8))
        expected += weight * total / (4 * whole) / 3
    assert float(weighted_loss(LATENTS, batch)) == pytest.approx(expected, rel=1e-5)


def test_a_white_mask_changes_not_one_bit() -> None:
    white = torch.stack([mask_weights(each, 0.1) for each in masks(1.0, 1.0, 1.0)])
    assert torch.equal(
        weighted_loss(LATENTS * 1.7, masked_batch(white)), weighted_loss(LATENTS * 1.7, masked_batch(None))
    )


def test_what_has_no_weight_has_no_gradient() -> None:
    prediction = (LATENTS * 1.3).requires_grad_()
    weights = torch.stack([mask_weights(each, 0.0) for each in masks(0.5, 0.25, 1.0)])
    weighted_loss(prediction, masked_batch(weights)).backward()
    assert prediction.grad is not None
    assert (prediction.grad[weights.expand_as(prediction) == 0] == 0).all()
    assert (prediction.grad[weights.expand_as(prediction) > 0] != 0).all()


def test_pictures_count_alike_however_small_their_masks_are() -> None:
    for share in (0.125, 0.5, 1.0):
        assert float(mask_weights(masks(share)[0], 0.0).mean()) == pytest.approx(1.0)
        assert float(mask_weights(masks(share)[0], 0.3).mean()) == pytest.approx(1.0)


def test_a_speck_is_bounded_and_a_black_mask_keeps_the_weight_of_what_is_left_out() -> None:
    speck = torch.zeros(1, 8, 8, dtype=torch.uint8)
    speck[0, 0, 0] = 255
    assert float(mask_weights(speck, 0.0).max()) == pytest.approx(1 / MIN_MASK_MEAN)
    for unmasked in (0.0, 0.1, 0.5):
        assert torch.allclose(mask_weights(masks(0.0)[0], unmasked), torch.full((1, 8, 8), unmasked))


def test_the_objective_passes_pixel_weights_on() -> None:
    weights = torch.rand(3, 1, 8, 8)
    assert objective().prepare(LATENTS, ONES, 1, 0, weights).pixel_weights is weights
    assert objective().prepare(LATENTS, ONES, 1, 0).pixel_weights is None
