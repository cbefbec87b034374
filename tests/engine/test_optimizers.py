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
    SCHEDULE_FREE,
    ScheduleFreeAverage,
    build_optimizer,
    effective_rate,
    load_optimizer,
    optimizer_tensors,
    set_learning_rates,
)
from lorasmith.engine.storage import OPTIMIZER_BYTES, checkpoint_bytes

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


def large_adapter() -> Adapter:
    """One layer as large as many are, with rank 16."""
    tensors = {DOWN: nn.Parameter(torch.randn(16, 640)), UP: nn.Parameter(torch.zeros(640, 16))}
    return Adapter([AdapterModule("denoiser", "a", "lora", tensors, 16, 16.0, 1.0)])


@pytest.mark.parametrize("name", NAMES)
def test_the_state_takes_no_more_bytes_than_the_disk_and_memory_plans_say(name: str) -> None:
    adapter = large_adapter()
    optimizer = build(adapter, name)
    advance(adapter, optimizer, 0, 2)
    state = [value for known in optimizer.state.values() for value in known.values() if isinstance(value, torch.Tensor)]
    # Tables that all weights share, and single numbers.
    measured = sum(value.numel() * value.element_size() for value in state if value.numel() > 256)
    number = adapter.num_parameters()
    planned = OPTIMIZER_BYTES[name]
    assert measured / number <= planned
    with_few = ("8bit" in name) or name in ("adafactor", "came")
    assert with_few or measured / number == planned
    saved = sum(value.numel() * value.element_size() for value in optimizer_tensors(optimizer)[0].values())
    assert saved < checkpoint_bytes(number, name) - 4 * number


def test_only_up_matrices_get_the_ratio_of_lora_plus_and_text_encoders_may_have_another() -> None:
    adapter = small_adapter()
    magnitude = nn.Parameter(torch.ones(32))
    adapter.modules[0].tensors["lora_magnitude_vector.weight"] = magnitude
    adapter.modules[1].kind = "loha"
    adapter.modules[1].tensors = {"hada_w1_a": nn.Parameter(torch.ones(4, 2))}
    optimizer = build(adapter, "adamw", lora_plus_ratio=16.0, text_encoder_lora_plus_ratio=4.0)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"denoiser.down": 1e-3, "denoiser.up": 1.6e-2, "text_encoder.all": 1e-4}
    )
    assert any(p is magnitude for p in groups["denoiser.down"]["params"])
    rates = {g["name"]: g["lr"] for g in build(small_adapter(), "lion", text_encoder_lora_plus_ratio=4.0).param_groups}
    assert rates["denoiser.up"] == pytest.approx(1e-3)
    assert rates["text_encoder.up"] == pytest.approx(4e-4)


@pytest.mark.parametrize(("name", "factor"), [("adamw", 0.5), ("dadaptation", 1.0)])
def test_blocks_have_rates_of_their_own_unless_one_rate_is_found_for_all(name: str, factor: float) -> None:
    adapter = small_adapter()
    adapter.modules[0].rate = 0.5
    top = 1.0 if name in ONE_RATE else 1e-3
    [down, *_] = build(adapter, name).param_groups
    assert down["lr"] == pytest.approx(top * factor)
    assert down["name"] == ("denoiser.down" if factor == 1.0 else "denoiser.down x0.5")


@pytest.mark.parametrize("name", ONE_RATE)
def test_the_chart_shows_the_rate_that_was_found(name: str) -> None:
    adapter = small_adapter()
    optimizer = build(adapter, name)
    set_learning_rates(optimizer, 1.0)
    assert effective_rate(optimizer) == pytest.approx(1e-6)
    for _ in range(20):
        for parameter in adapter.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    set_learning_rates(optimizer, 0.5)
    assert effective_rate(optimizer) == 0.5 * optimizer.param_groups[0]["d"] > 0.6e-6


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_the_average_is_the_librarys_and_training_weights_come_back_to_the_bit(name: str) -> None:
    adapter, twin = small_adapter(), small_adapter()
    optimizer, librarys = build(adapter, name), build(twin, name)
    average = ScheduleFreeAverage(optimizer, adapter.parameters())
    with average.in_place():
        assert torch.equal(adapter.modules[0].down, twin.modules[0].down)
    advance(adapter, optimizer, 0, 5)
    advance(twin, librarys, 0, 5)
    trained = [parameter.detach().clone() for parameter in adapter.parameters()]
    # The library's own switch, whose way back is not exact.
    librarys.eval()  # type: ignore[attr-defined]
    with average.in_place():
        for one, other in zip(adapter.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one, other)
    assert all(torch.equal(one, other) for one, other in zip(trained, adapter.parameters(), strict=True))
    assert not torch.equal(trained[0], twin.parameters()[0])


def test_a_group_tensor_of_a_checkpoint_goes_to_the_device_of_its_weights() -> None:
    adapter = small_adapter()
    optimizer = build(adapter, "dadaptation")
    advance(adapter, optimizer, 0, 2)
    tensors, rest = optimizer_tensors(optimizer)
    elsewhere = small_adapter()
    for module in elsewhere.modules:
        module.tensors = {name: nn.Parameter(p.detach().to("meta")) for name, p in module.tensors.items()}
    optimizer = build(elsewhere, "dadaptation")
    load_optimizer(optimizer, tensors, rest)
    assert {group["numerator_weighted"].device.type for group in optimizer.param_groups} == {"meta"}
