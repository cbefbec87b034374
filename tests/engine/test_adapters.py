from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lorasmith.engine.adapters import Adapter, attach_adapter, selected_layers
from lorasmith.engine.config import AdapterSettings
from lorasmith.engine.errors import BaseModelError, CheckpointError
from lorasmith.engine.families import Family
from tests.engine.running import load_tiny

LOCON = AdapterSettings(kind="locon", rank=4, alpha=2.0, conv_rank=3, conv_alpha=1.5)


def predict(family: Family) -> torch.Tensor:
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(family.dtype)
    conditioning = family.collate(family.encode_prompts(["a red circle"]))
    return family.predict(noisy, torch.tensor([500]), conditioning)


def fill(adapter: Adapter) -> None:
    with torch.no_grad():
        for number, module in enumerate(adapter.modules):
            module.up.normal_(generator=torch.Generator().manual_seed(number))


def test_lora_adapts_every_wanted_linear_layer_and_nothing_else_is_trained(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    wanted = selected_layers(family.denoiser, family.spec, AdapterSettings(), "denoiser")
    assert len(wanted) == 32
    adapter = attach_adapter(family, AdapterSettings(rank=4), seed=1)
    assert [module.path for module in adapter.modules] == sorted(wanted)
    trained = {id(p) for p in family.denoiser.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter.parameters()}
    assert not any(p.requires_grad for p in family.text_encoders["text_encoder"].parameters())


def test_a_fresh_adapter_changes_nothing(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    before = predict(family)
    attach_adapter(family, AdapterSettings(), seed=1)
    assert torch.equal(predict(family), before)


def test_first_weights_follow_from_seed_and_layer_name_alone(tiny_sd15: Path) -> None:
    torch.manual_seed(0)
    one = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(), seed=5).state_dict()
    torch.manual_seed(99)
    # Other layers beside them draw nothing from a shared stream.
    more = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(targets="attention-mlp"), seed=5).state_dict()
    other = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(), seed=6).state_dict()
    assert all(torch.equal(more[key], value) for key, value in one.items())
    assert not any(torch.equal(other[key], value) for key, value in one.items() if "lora_A" in key)


def test_down_matrices_start_as_linear_layers_do(tiny_sd15: Path) -> None:
    adapter = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(rank=64), seed=1)
    for module in adapter.modules:
        bound = module.down.shape[1] ** -0.5
        assert module.down.detach().abs().max() <= bound
        assert module.down.detach().std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not module.up.any()


@pytest.mark.parametrize("base", ["tiny_sd15", "tiny_sd15_v"])
def test_locon_gives_convolutions_their_own_rank_and_alpha(base: str, request: pytest.FixtureRequest) -> None:
    family = load_tiny(request.getfixturevalue(base))
    adapter = attach_adapter(family, LOCON, seed=1)
    kinds = {module.path: family.denoiser.get_submodule(module.path) for module in adapter.modules}
    ranks = {True: set(), False: set()}
    for module in adapter.modules:
        layer = kinds[module.path].base_layer
        # A 1x1 convolution is a linear layer in all but name.
        wide = isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1
        ranks[wide].add((module.rank, module.alpha))
        assert module.down.dim() == layer.weight.dim()
    assert ranks == {True: {(3, 1.5)}, False: {(4, 2.0)}}


def test_delta_is_what_the_adapter_adds_to_each_weight(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, LOCON, seed=1)
    fill(adapter)
    adapted = predict(family)
    adapter.set_enabled(False)
    assert not torch.allclose(predict(family), adapted, atol=1e-3)
    with torch.no_grad():
        for module in adapter.modules:
            weight = family.denoiser.get_submodule(module.path).base_layer.weight
            assert adapter.delta(module).shape == weight.shape
            weight += adapter.delta(module)
    assert torch.allclose(predict(family), adapted, atol=1e-4, rtol=1e-4)


def test_weights_stay_fp32_beside_a_bf16_base(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15, torch.bfloat16)
    adapter = attach_adapter(family, LOCON, seed=1)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    loss = predict(family).float().square().mean()
    loss.backward()
    assert {p.grad.dtype for p in adapter.parameters() if p.grad is not None} == {torch.float32}
    assert len([p for p in adapter.parameters() if p.grad is not None]) == len(adapter.parameters())


def test_the_text_encoder_gets_an_adapter_only_where_asked(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, AdapterSettings(text_encoder=True), seed=1)
    assert {module.component for module in adapter.modules} == {"denoiser", "text_encoder"}
    predict(family).mean().backward()
    ups = [m.up for m in adapter.modules if m.component == "text_encoder"]
    assert any(up.grad is not None and up.grad.any() for up in ups)


def test_state_goes_round_and_its_names_tell_component_and_layer(tiny_sd15: Path) -> None:
    adapter = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(text_encoder=True), seed=1)
    fill(adapter)
    saved = adapter.state_dict()
    assert "text_encoder" in {key.split(".")[0] for key in saved}
    other = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(text_encoder=True), seed=2)
    other.load_state_dict(saved)
    assert all(torch.equal(value, saved[key]) for key, value in other.state_dict().items())


def test_an_adapter_of_another_rank_is_refused(tiny_sd15: Path) -> None:
    saved = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(rank=2), seed=1).state_dict()
    adapter = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(rank=4), seed=1)
    with pytest.raises(CheckpointError, match="does not fit"):
        adapter.load_state_dict(saved)


def test_a_base_without_the_wanted_layers_is_refused(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    family.denoiser = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(BaseModelError, match="no layer to adapt"):
        attach_adapter(family, AdapterSettings(), seed=1)


def test_one_broken_weight_is_noticed(tiny_sd15: Path) -> None:
    adapter = attach_adapter(load_tiny(tiny_sd15), AdapterSettings(), seed=1)
    assert adapter.all_finite()
    with torch.no_grad():
        adapter.modules[-1].up[0, 0] = float("nan")
    assert not adapter.all_finite()


def test_dropout_is_off_outside_training(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, AdapterSettings(dropout=0.5), seed=1)
    fill(adapter)
    adapter.train(False)
    assert torch.equal(predict(family), predict(family))
    adapter.train()
    assert not torch.equal(predict(family), predict(family))
