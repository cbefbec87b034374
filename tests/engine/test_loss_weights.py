from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.engine.config import ObjectiveSettings
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.families import families
from lorasmith.engine.objectives import (
    DdpmObjective,
    FlowObjective,
    NoisyBatch,
    alphas_cumprod,
    tell_family,
    weighted_loss,
)
from lorasmith.engine.objectives.ddpm import snr_weights
from lorasmith.engine.objectives.losses import huber_limits
from lorasmith.engine.objectives.noise import with_coarser_noise
from tests.engine.test_flow import SPEC

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
ZERO_SNR = SD | {"rescale_betas_zero_snr": True}
LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
ONES = torch.ones(3)
WEIGHTINGS = [{"min_snr_gamma": 5.0}, {"debiased": True}, {"p2_gamma": 1.0}, {"p2_gamma": 0.5}]


def objective(prediction: str = "epsilon", schedule: dict[str, Any] = SD, **settings: Any) -> DdpmObjective:
    return DdpmObjective(schedule, prediction, ObjectiveSettings(**settings), 7, torch.device("cpu"))


def flow(**settings: Any) -> FlowObjective:
    return FlowObjective(SPEC, {}, "velocity", ObjectiveSettings(**settings), 7)


@pytest.mark.parametrize("chosen", WEIGHTINGS)
def test_the_weights_of_epsilon_follow_the_papers(chosen: dict[str, Any]) -> None:
    alphas = alphas_cumprod(SD)
    weights = snr_weights(alphas, ObjectiveSettings(**chosen), velocity=False)
    for t in range(0, 1000, 37):
        snr = float(alphas[t]) / (1 - float(alphas[t]))
        expected = {
            "min_snr_gamma": min(snr, 5.0) / snr,
            "debiased": 1 / math.sqrt(snr),
            "p2_gamma": (1 + snr) ** -chosen.get("p2_gamma", 0.0),
        }[next(iter(chosen))]
        assert float(weights[t]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("chosen", WEIGHTINGS)
def test_models_of_both_kinds_learn_the_same(chosen: dict[str, Any]) -> None:
    """The same guess of the picture, told as noise or as velocity, has the same loss and the same gradient."""
    guess = (LATENTS * 0.8 + 0.1).requires_grad_()
    found = []
    for prediction in ("epsilon", "v_prediction"):
        made = objective(prediction, **chosen)
        batch = made.prepare(LATENTS, ONES, 4, 0)
        signal, noise = made._signal[batch.timesteps].view(-1, 1, 1, 1), made._noise[batch.timesteps].view(-1, 1, 1, 1)
        told = batch.noisy - signal * guess if prediction == "epsilon" else signal * batch.noisy - guess
        loss = made.loss(told / noise, batch)
        found.append((loss.detach(), *torch.autograd.grad(loss, guess)))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-3)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("velocity", [False, True])
@pytest.mark.parametrize("chosen", WEIGHTINGS)
def test_every_weight_is_finite_at_zero_terminal_snr(chosen: dict[str, Any], velocity: bool) -> None:
    weights = snr_weights(alphas_cumprod(ZERO_SNR), ObjectiveSettings(**chosen), velocity=velocity)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert float(weights.max()) < 32


@pytest.mark.parametrize("chosen", WEIGHTINGS)
def test_the_gradient_is_weighted_by_the_table(chosen: dict[str, Any]) -> None:
    made = objective(**chosen)
    batch = made.prepare(LATENTS, torch.tensor([1.0, 0.5, 2.0]), 4, 0)
    prediction = (LATENTS * 0.3).requires_grad_()
    made.loss(prediction, batch).backward()  # type: ignore[no-untyped-call]
    table = snr_weights(alphas_cumprod(SD), ObjectiveSettings(**chosen), velocity=False).float()[batch.timesteps]
    weights = (table * torch.tensor([1.0, 0.5, 2.0])).view(-1, 1, 1, 1)
    expected = 2 * weights * (prediction.detach() - batch.target) / LATENTS.numel()
    assert prediction.grad is not None
    assert torch.allclose(prediction.grad, expected, rtol=1e-4, atol=1e-9)


def test_the_velocity_weights_without_a_setting_are_ones() -> None:
    assert torch.equal(snr_weights(alphas_cumprod(SD), ObjectiveSettings(), velocity=True), torch.ones(1000).double())


@settings(max_examples=200, deadline=None)
@given(
    difference=st.floats(-50, 50).filter(lambda d: abs(d) > 1e-3),
    limit=st.floats(1e-3, 10),
    weight=st.floats(0, 3),
    smooth=st.booleans(),
)
def test_robust_losses_and_their_gradients_follow_the_formula(
    difference: float, limit: float, weight: float, smooth: bool
) -> None:
    prediction = torch.full((1, 1, 2, 2), difference, requires_grad=True)
    batch = NoisyBatch(
        torch.zeros(1, 1, 2, 2),
        torch.zeros(1),
        torch.zeros(1, 1, 2, 2),
        torch.tensor([weight]),
        None,
        torch.tensor([limit]),
    )
    loss = weighted_loss(prediction, batch, smooth_l1=smooth)
    factor = 2.0 if smooth else 2.0 * limit
    root = math.sqrt(difference**2 + limit**2)
    assert float(loss.detach()) == pytest.approx(weight * factor * (root - limit), rel=2e-4, abs=1e-7)
    loss.backward()  # type: ignore[no-untyped-call]
    assert prediction.grad is not None
    assert float(prediction.grad.sum()) == pytest.approx(weight * factor * difference / root, rel=1e-4, abs=1e-7)
    # It never exceeds the squared error, and grows no faster than twice the limit.
    if not smooth:
        assert float(loss.detach()) <= weight * difference**2 * (1 + 1e-5) + 1e-7
        assert abs(float(prediction.grad.sum())) <= 2 * limit * weight * (1 + 1e-5)


def test_small_errors_keep_their_digits() -> None:
    batch = NoisyBatch(LATENTS, torch.zeros(3), LATENTS * 0, ONES, None, torch.full((3,), 0.5))
    tiny = LATENTS * 1e-5
    assert float(weighted_loss(tiny, batch)) == pytest.approx(float(tiny.square().mean()), rel=1e-4)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
@pytest.mark.parametrize("limit", [0.05, 1.0, 3.0])
def test_the_limits_follow_the_schedules_of_the_paper(kind: str, limit: float) -> None:
    alphas = alphas_cumprod(SD)
    for t in (0, 10, 400, 999):
        ratio = math.sqrt((1 - float(alphas[t])) / float(alphas[t]))
        expected = {
            "constant": limit,
            "exponential": math.exp(math.log(limit) * t / 1000),
            "snr": (1 - limit) / (1 + ratio) ** 2 + limit,
        }
        for schedule, value in expected.items():
            made = objective(loss=kind, huber_c=limit, huber_schedule=schedule)
            assert made._limits is not None
            assert float(made._limits[t]) == pytest.approx(value, rel=1e-5)


def test_the_limits_of_a_flow_follow_its_noise() -> None:
    sigmas = torch.tensor([0.0, 0.25, 0.9, 1.0], dtype=torch.float64)
    chosen = ObjectiveSettings(loss="huber", huber_c=0.1, huber_schedule="snr")
    limits = huber_limits(chosen, 1 - sigmas, sigmas, sigmas)
    assert limits is not None
    # The noise is sigma/(1 - sigma) times the picture, so that 1/(1 + ratio) is 1 - sigma.
    assert limits.tolist() == pytest.approx([1.0, 0.9 * 0.5625 + 0.1, 0.9 * 0.01 + 0.1, 0.1])
    batch = flow(loss="huber", huber_c=0.1, huber_schedule="exponential").prepare(LATENTS, ONES, 0, 0)
    assert batch.limits is not None
    assert batch.limits.tolist() == pytest.approx([0.1 ** (t / 1000) for t in batch.timesteps.tolist()], rel=1e-5)


def test_the_limits_are_finite_at_zero_terminal_snr() -> None:
    made = objective("v_prediction", ZERO_SNR, loss="huber", huber_c=0.2, huber_schedule="snr")
    assert made._limits is not None
    assert float(made._limits[-1]) == pytest.approx(0.2)


def test_zero_terminal_snr_can_be_forced_on_velocity_and_not_on_epsilon() -> None:
    forced = objective("v_prediction", zero_terminal_snr=True).at(LATENTS, 1.0, [1, 2, 3])
    said = objective("v_prediction", ZERO_SNR).at(LATENTS, 1.0, [1, 2, 3])
    assert torch.equal(forced.noisy, said.noisy)
    # Velocity's target in pure noise is the picture itself, with the other sign.
    assert torch.allclose(forced.target, -LATENTS, atol=1e-6)
    with pytest.raises(ConfigError, match="zero_terminal_snr"):
        objective(zero_terminal_snr=True)


def test_the_base_model_is_told_its_guidance_and_draws_with_the_trained_schedule() -> None:
    def told(prediction: str, **chosen: Any) -> Any:
        identity, spec = SimpleNamespace(prediction=prediction), families()["sd15"].SPEC
        family: Any = SimpleNamespace(spec=spec, identity=identity, noise_schedule=SD, guidance=1.0)
        tell_family(family, ObjectiveSettings(**chosen))
        return family

    assert told("epsilon", guidance=3.5).guidance == 3.5
    assert told("epsilon").noise_schedule == SD
    assert told("v_prediction", zero_terminal_snr=True).noise_schedule == ZERO_SNR
    with pytest.raises(ConfigError, match="zero_terminal_snr"):
        told("epsilon", zero_terminal_snr=True)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_perturbed_inputs_keep_their_target(kind: str) -> None:
    def build(**settings: Any) -> Any:
        return flow(**settings) if kind == "flow" else objective(kind, **settings)

    plain, made = build(), build(ip_noise=0.1)
    one, two = plain.prepare(LATENTS, ONES, 3, 0), made.prepare(LATENTS, ONES, 3, 0)
    assert torch.equal(one.target, two.target)
    assert torch.equal(one.timesteps, two.timesteps)
    amount = one.timesteps / 1000 if kind == "flow" else plain._noise[one.timesteps]
    other = (two.noisy - one.noisy) / amount.view(-1, 1, 1, 1)
    assert float(other.std()) == pytest.approx(0.1, rel=0.1)
    alone = made.prepare(LATENTS[1:2], ONES[:1], 3, 1)
    assert torch.equal(alone.noisy, two.noisy[1:2])


def test_coarser_noise_moves_whole_areas_and_keeps_the_spread() -> None:
    latents = torch.zeros(32, 4, 32, 32)
    plain = objective().noise.draw(latents, 0, 0)
    made = objective(multires_iterations=6, multires_discount=0.8).noise.draw(latents, 0, 0)
    assert made.std(dim=(1, 2, 3)) == pytest.approx(torch.ones(32), abs=1e-4)

    def area_spread(noise: torch.Tensor) -> float:
        return float(torch.nn.functional.avg_pool2d(noise, 16).std())

    assert area_spread(plain) < 0.08
    assert area_spread(made) > 3 * area_spread(plain)
    alone = objective(multires_iterations=6, multires_discount=0.8).noise.draw(latents[5:6], 0, 5)
    assert torch.equal(alone[0], made[5])


@settings(max_examples=60, deadline=None)
@given(
    side=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    sizes=st.integers(1, 10),
    discount=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**31),
)
def test_coarser_noise_is_finite_for_every_size(side: tuple[int, int], sizes: int, discount: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((4, *side), generator=generator)
    before = noise.clone()
    made = with_coarser_noise(noise, sizes, discount, generator)
    assert made.shape == noise.shape
    assert float(made.std()) == pytest.approx(1.0, abs=1e-3)
    assert torch.equal(noise, before)


@pytest.mark.parametrize("bias", ["balanced", "content", "style"])
def test_the_trained_range_of_a_discrete_schedule(bias: Any) -> None:
    made = objective(min_timestep=600, max_timestep=650, timestep_bias=bias)
    drawn = torch.cat([made.prepare(LATENTS, ONES, step, 0).timesteps for step in range(60)])
    assert set(drawn.tolist()) <= set(range(600, 650))
    assert len(set(drawn.tolist())) > 20
