from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from lorasmith.engine.adapters import DOWN, UP, Adapter, AdapterModule
from lorasmith.engine.config import AdapterSettings, OptimizerSettings
from lorasmith.engine.errors import CheckpointError
from lorasmith.engine.optimizers import (
    ONE_RATE,
    build_optimizer,
    effective_rate,
    load_optimizer,
    optimizer_tensors,
    set_learning_rates,
)

NAMES = list(get_args(OptimizerSettings.model_fields["name"].annotation))


def small_adapter() -> Adapter:
    """Two layers; one is large enough for 8-bit state."""
    modules = []
    for component, path, rank, width in (("denoiser", "a", 8, 600), ("text_encoder", "b", 4, 16)):
        down = torch.randn(rank, width, generator=torch.Generator().manual_seed(rank))
        tensors = {DOWN: nn.Parameter(down), UP: nn.Parameter(torch.zeros(32, rank))}
        modules.append(AdapterModule(component, path, "lora", tensors, rank, 8.0, 8.0 / rank))
    return Adapter(modules)


def settings(name: str, **values: Any) -> OptimizerSettings:
    return OptimizerSettings(name=name, learning_rate=1.0 if name in ONE_RATE else 1e-3, **values)  # type: ignore[arg-type]


def build(adapter: Adapter, name: str, **values: Any) -> Optimizer:
    return build_optimizer(adapter, settings(name, **values), AdapterSettings(text_encoder_learning_rate=1e-4))


def advance(adapter: Adapter, optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        set_learning_rates(optimizer, 1.0 / (step + 1))
        generator = torch.Generator().manual_seed(step)
        for parameter in adapter.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_optimizer_goes_on_bit_for_bit_through_files(name: str, tmp_path: Path) -> None:
    whole = small_adapter()
    advance(whole, build(whole, name), 0, 12)
    first = small_adapter()
    optimizer = build(first, name)
    advance(first, optimizer, 0, 5)
    tensors, rest = optimizer_tensors(optimizer)
    save_file(tensors, tmp_path / "state.safetensors")
    (tmp_path / "rest.json").write_text(json.dumps(rest))

    second = small_adapter()
    second.load_state_dict(first.state_dict())
    optimizer = build(second, name)
    load_optimizer(
        optimizer, load_file(tmp_path / "state.safetensors"), json.loads((tmp_path / "rest.json").read_text())
    )
    advance(second, optimizer, 5, 12)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in whole.state_dict().items())
    assert not torch.equal(
        first.state_dict()["denoiser.a.lora_B.weight"], second.state_dict()["denoiser.a.lora_B.weight"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_finds_the_bottom_of_a_bowl(name: str) -> None:
    adapter = small_adapter()
    optimizer = build(adapter, name, weight_decay=0.0)
    target = torch.full_like(adapter.modules[0].up, 0.05)
    errors = []
    for _ in range(150):
        optimizer.zero_grad()
        error = (adapter.modules[0].up - target).square().mean()
        errors.append(error.item())
        error.backward()
        optimizer.step()
    assert errors[-1] < 0.2 * errors[0]


def test_eight_bit_state_is_stored_as_bytes() -> None:
    adapter = small_adapter()
    optimizer = build(adapter, "adamw8bit")
    advance(adapter, optimizer, 0, 1)
    assert torch.uint8 in {tensor.dtype for tensor in optimizer_tensors(optimizer)[0].values()}


def test_lora_plus_and_the_text_encoder_have_rates_of_their_own() -> None:
    optimizer = build(small_adapter(), "adamw", lora_plus_ratio=16.0)
    set_learning_rates(optimizer, 0.5)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx(
        {"denoiser.down": 5e-4, "denoiser.up": 8e-3, "text_encoder.down": 5e-5, "text_encoder.up": 8e-4}
    )


def test_prodigy_finds_one_rate_for_all_groups() -> None:
    adapter = small_adapter()
    optimizer = build(adapter, "prodigy")
    assert {group["base_lr"] for group in optimizer.param_groups} == {1.0}
    before = effective_rate(optimizer)
    advance(adapter, optimizer, 0, 30)
    assert effective_rate(optimizer) != before


def test_weight_decay_pulls_weights_to_zero() -> None:
    adapter = small_adapter()
    optimizer = build(adapter, "adamw", weight_decay=1.0)
    before = adapter.modules[0].down.detach().clone()
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(adapter.modules[0].down, before * (1 - 1e-3))


@pytest.mark.parametrize("name", NAMES)
def test_settings_count_and_not_what_the_checkpoint_had(name: str) -> None:
    adapter = small_adapter()
    optimizer = build(adapter, name, weight_decay=0.01)
    advance(adapter, optimizer, 0, 2)
    other = build_optimizer(
        small_adapter(),
        OptimizerSettings(name=name, learning_rate=0.5, weight_decay=0.2),  # type: ignore[arg-type]
        AdapterSettings(text_encoder_learning_rate=0.25),
    )
    load_optimizer(other, *optimizer_tensors(optimizer))
    # Some have one rate for all.
    assert {group["base_lr"] for group in other.param_groups} == ({0.5} if name in ONE_RATE else {0.5, 0.25})
    assert {group["weight_decay"] for group in other.param_groups} == {0.2}


def test_a_state_with_other_groups_is_refused() -> None:
    tensors, rest = optimizer_tensors(build(small_adapter(), "adamw"))
    alone = small_adapter()
    del alone.modules[1]
    with pytest.raises(CheckpointError, match="does not fit"):
        load_optimizer(build(alone, "adamw"), tensors, rest)


def test_a_state_without_one_of_its_tensors_is_refused() -> None:
    adapter = small_adapter()
    optimizer = build(adapter, "adamw")
    advance(adapter, optimizer, 0, 1)
    tensors, rest = optimizer_tensors(optimizer)
    tensors.pop("state.0.exp_avg")
    with pytest.raises(CheckpointError, match="exp_avg"):
        load_optimizer(build(small_adapter(), "adamw"), tensors, rest)
