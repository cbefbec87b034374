from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lorasmith.engine.combinations import _ONLY
from lorasmith.engine.config import ObjectiveSettings
from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import families
from lorasmith.engine.objectives import DdpmObjective, FlowObjective, NoisyBatch, Objective

SPEC = dataclasses.replace(families()["sd15"].SPEC, objective="flow", latent_patch=2)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
ONES = torch.ones(3)


def flow(**settings: Any) -> FlowObjective:
    return FlowObjective(SPEC, {}, "velocity", ObjectiveSettings(**settings), 7)


def ddpm(prediction: str = "v_prediction", **settings: Any) -> DdpmObjective:
    return DdpmObjective(SD, prediction, ObjectiveSettings(**settings), 7, torch.device("cpu"))


BOTH = pytest.mark.parametrize("build", [flow, ddpm])


def same(one: NoisyBatch, two: NoisyBatch) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(two, name)) for name in ("noisy", "timesteps", "target", "weights")
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noisy_latents_are_those_of_diffusers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for place in (0, 250, 500, 999):
        sigma, timestep = scheduler.sigmas[place], scheduler.timesteps[place]
        batch = flow().at(LATENTS, float(sigma), [1, 2, 3])
        noise = batch.target + LATENTS
        assert torch.allclose(batch.noisy, scheduler.scale_noise(LATENTS, timestep[None], noise), atol=1e-6)
        assert torch.allclose(batch.timesteps, timestep.expand(3), atol=1e-3)


def test_the_target_leads_from_the_noise_to_the_picture() -> None:
    batch = flow().prepare(LATENTS, ONES, step=5, first=0)
    sigmas = (batch.timesteps / 1000).view(-1, 1, 1, 1)
    assert batch.timesteps.dtype == torch.float32
    assert torch.allclose(batch.noisy - sigmas * batch.target, LATENTS, atol=1e-5)
    noise = batch.noisy + (1 - sigmas) * batch.target
    assert abs(float(noise.std()) - 1.0) < 0.1
    # The same picture, step and seed have the same noise under either objective.
    assert torch.allclose(noise, ddpm("epsilon").prepare(LATENTS, ONES, 5, 0).target, atol=1e-5)


def test_the_weights_are_the_pictures_own() -> None:
    # diffusers' compute_loss_weighting_for_sd3 gives ones but for two schemes that nobody's defaults use.
    own, pixels = torch.tensor([1.0, 0.5, 0.0]), torch.rand(3, 1, 8, 8)
    batch = flow().prepare(LATENTS, own, 1, 0, pixels)
    assert torch.equal(batch.weights, own)
    assert batch.pixel_weights is pixels
    prediction = LATENTS * 0.3
    errors = ((prediction - batch.target) ** 2 * pixels).mean(dim=(1, 2, 3))
    assert float(flow().loss(prediction, batch)) == pytest.approx(float((errors * own).mean()), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"ip_noise": 0.1, "timestep_sampling": "resolution_shift", "loss": "huber"}])
def test_flow_draws_depend_on_step_and_place_and_on_nothing_else(settings: dict[str, Any]) -> None:
    torch.manual_seed(1)
    whole = flow(**settings).prepare(LATENTS, ONES, step=2, first=0)
    torch.manual_seed(2)
    parts = [flow(**settings).prepare(LATENTS[i : i + 1], ONES[:1], step=2, first=i) for i in range(3)]
    for name in ("noisy", "timesteps", "target", "limits"):
        if getattr(whole, name) is not None:
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert not torch.equal(whole.target, flow(**settings).prepare(LATENTS, ONES, 3, 0).target)


def test_half_precision_latents_stay_so_and_the_target_is_exact() -> None:
    batch = flow().prepare(LATENTS.bfloat16(), ONES, 0, 0)
    assert batch.noisy.dtype == torch.bfloat16
    assert batch.target.dtype == batch.timesteps.dtype == torch.float32


def test_a_base_that_is_said_to_predict_noise_is_refused() -> None:
    with pytest.raises(BaseModelError, match="epsilon"):
        FlowObjective(SPEC, {}, "epsilon", ObjectiveSettings(), 7)


@BOTH
def test_a_measured_level_depends_on_level_and_seeds_alone(build: Any) -> None:
    plain: Objective = build()
    other: Objective = build(loss="huber", ip_noise=0.2, min_timestep=100, min_snr_gamma=5.0, timestep_bias="style")
    batch = plain.at(LATENTS, 0.4, [5, 6, 7])
    assert same(batch, other.at(LATENTS, 0.4, [5, 6, 7]))
    alone = plain.at(LATENTS[1:2], 0.4, [6])
    assert torch.equal(batch.noisy[1:2], alone.noisy)
    assert torch.equal(batch.weights, ONES)
    assert other.at(LATENTS, 0.4, [5, 6, 7]).limits is None
    errors = (LATENTS * 0.5 - batch.target).square().mean()
    assert float(other.loss(LATENTS * 0.5, batch)) == pytest.approx(float(errors), rel=1e-5)


@BOTH
def test_levels_run_from_the_picture_to_noise(build: Any) -> None:
    shares = []
    for level in (0.0, 0.25, 0.5, 0.75, 1.0):
        batch = build().at(LATENTS, level, [5, 6, 7])
        shares.append(float(torch.nn.functional.cosine_similarity(batch.noisy.flatten(), LATENTS.flatten(), dim=0)))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.999
    assert shares[-1] < 0.2


OTHER_VALUES: dict[str, Any] = {
    "timestep_sampling": "mode",
    "shift": 5.0,
    "min_snr_gamma": 5.0,
    "debiased": True,
    "p2_gamma": 1.0,
    "zero_terminal_snr": True,
    "noise_offset": 0.1,
    "multires_iterations": 3,
}


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_settings_of_one_kind_change_nothing_for_the_other(kind: str) -> None:
    # The table that refuses them for the other kind has no setting that it reads, and none that no kind reads.
    reads, reads_not = (ddpm, flow) if kind == "ddpm" else (flow, ddpm)
    for name in _ONLY[kind]:
        changed = {name: OTHER_VALUES[name]}
        usual = {"timestep_sampling": "shift"} if name == "shift" else {}
        assert not same(
            reads(**usual).prepare(LATENTS, ONES, 0, 0), reads(**usual, **changed).prepare(LATENTS, ONES, 0, 0)
        )
        assert same(reads_not().prepare(LATENTS, ONES, 0, 0), reads_not(**changed).prepare(LATENTS, ONES, 0, 0))
