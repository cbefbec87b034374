"""One body over kinds of adapters: nothing changes at first, what `delta` says is what is added, off is the base.

`make test` runs every kind on one family and a sample on the others, `make test-all` all of them on all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.engine.adapter_layers import plan_layers, tensor_shapes
from lorasmith.engine.adapters import Adapter, attach_adapter
from lorasmith.engine.adapters.injection import weight_shapes
from lorasmith.engine.config import AdapterSettings
from lorasmith.engine.families import Family
from lorasmith.engine.memory import adapted_layers, num_parameters
from lorasmith.engine.sources import locate_base
from tests.engine.running import load_tiny
from tests.tiny import TINY_BUILDERS, TINY_SIDE

MLP = {"rank": 4, "alpha": 2.0, "targets": "attention-mlp"}
CONVOLUTIONS = {"rank": 4, "alpha": 2.0, "conv_rank": 2, "conv_alpha": 6.0, "convolutions": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": MLP,
    "locon": {"kind": "locon", **CONVOLUTIONS},
    "dora": {"kind": "dora", **CONVOLUTIONS},
    "loha": {"kind": "loha", **CONVOLUTIONS},
    "lokr": {"kind": "lokr", "lokr_factor": 4, **CONVOLUTIONS},
    "whole lokr": {"kind": "lokr", "lokr_full": True, **CONVOLUTIONS},
    "oft": {"kind": "oft", "block_size": 6, **CONVOLUTIONS},
    "boft": {"kind": "boft", "block_size": 4, **CONVOLUTIONS},
    "gaussian": {"init": "gaussian", "rslora": True, **MLP},
    "orthogonal": {"init": "orthogonal", **MLP},
    "pissa": {"init": "pissa", "kind": "locon", **CONVOLUTIONS},
    "olora": {"init": "olora", "rank": 64},
    "blocks": {"block_ranks": ["to_q=8", "to_v=0"], "block_learning_rates": ["to_k=0.5"], "exclude": ["to_out"]},
}
SAMPLE = ("dora", "lokr", "oft", "boft", "pissa")
USUAL = "sd15"


def cells() -> list[Any]:
    chosen = []
    for place, family in enumerate(sorted(TINY_BUILDERS)):
        for name in SETTINGS:
            sampled = family == USUAL or name == SAMPLE[place % len(SAMPLE)]
            chosen.append(
                pytest.param(family, name, id=f"{family}-{name}", marks=() if sampled else pytest.mark.campaign)
            )
    return chosen


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    class Built(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = TINY_BUILDERS[name](tmp_path_factory.mktemp("adapters") / name)
            return self[name]

    return Built()


def answer(family: Family) -> torch.Tensor:
    spec = family.spec
    side = TINY_SIDE // spec.latent_downscale
    noisy = torch.randn((1, spec.latent_channels, side, side), generator=torch.Generator().manual_seed(7))
    timesteps = torch.tensor([400]) if spec.objective == "ddpm" else torch.tensor([400.0])
    conditioning = family.collate(family.encode_prompts(["a red circle"]))
    return family.predict(noisy.to(family.dtype), timesteps, conditioning)


def disturb(adapter: Adapter, size: float = 0.05) -> None:
    """Move every trained number, so that each tensor counts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def require_as_told(
    adapter: Adapter, family: Family, settings: AdapterSettings, base: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Require that headers and weight shapes alone told which layers and tensors there would be."""
    forecast = adapted_layers(settings, family.spec, locate_base(str(base)))
    assert forecast is not None
    assert num_parameters(forecast, settings) == adapter.num_parameters()
    assert {(module.component, module.path) for module in adapter.modules} == set(forecast)
    plans = plan_layers(shapes, family.spec, settings, "denoiser")
    for module in [module for module in adapter.modules if module.component == "denoiser"]:
        told = tensor_shapes(shapes[module.path], plans[module.path], settings)
        assert {name: tuple(tensor.shape) for name, tensor in module.tensors.items()} == told
    parts = (family.denoiser, *family.text_encoders.values())
    trained = {id(p) for part in parts for p in part.parameters() if p.requires_grad}
    assert trained == {id(parameter) for parameter in adapter.parameters()}


@pytest.mark.parametrize(("base", "kind"), cells())
def test_an_adapter_begins_as_nothing_adds_its_delta_and_goes_round(
    base: str, kind: str, bases: dict[str, Path]
) -> None:
    settings = AdapterSettings(**SETTINGS[kind], text_encoder=base == USUAL and kind in SAMPLE)
    family = load_tiny(bases[base])
    with torch.no_grad():
        plain = answer(family)
    shapes = weight_shapes(family.denoiser)
    adapter = attach_adapter(family, settings, seed=1)
    require_as_told(adapter, family, settings, bases[base], shapes)
    with torch.no_grad():
        if settings.init == "orthogonal":  # two halves of a basis: 0 but for rounding
            torch.testing.assert_close(answer(family), plain, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(answer(family), plain)
    disturb(adapter)
    adapted = answer(family)
    adapted.square().mean().backward()
    # The last text layers of some transformers reach no output.
    reached = sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in adapter.parameters())
    assert reached == len(adapter.parameters()) or (base != USUAL and reached > 0.5 * len(adapter.parameters()))
    change = (adapted - plain).abs().max().item()
    assert change > 1e-4

    saved = adapter.state_dict()
    other_family = load_tiny(bases[base])
    other = attach_adapter(other_family, settings, seed=2)
    other.load_state_dict(saved)
    assert all(torch.equal(value, saved[key]) for key, value in other.state_dict().items())
    with torch.no_grad():
        assert torch.equal(answer(other_family), adapted)
        adapter.set_enabled(False)
        assert torch.equal(answer(family), plain)
        for module in adapter.modules:
            weight = module.layer.base_layer.weight
            delta = adapter.delta(module)
            assert (delta.shape, delta.dtype) == (weight.shape, torch.float32)
            weight += delta
        assert (answer(family) - adapted).abs().max().item() < 1e-3 * change + 1e-5


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "oft", "boft"])
def test_every_tensor_is_fp32_beside_a_bf16_base(kind: str, bases: dict[str, Path]) -> None:
    family = load_tiny(bases[USUAL], torch.bfloat16)
    settings = AdapterSettings(**{**SETTINGS[kind], "kind": kind, "convolutions": False})
    with torch.no_grad():
        plain = answer(family)
    adapter = attach_adapter(family, settings, seed=1)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(answer(family), plain)
    disturb(adapter)
    adapted = answer(family)
    assert adapted.dtype == torch.bfloat16
    assert not torch.equal(adapted, plain)
    adapted.float().square().mean().backward()
    assert {p.grad.dtype for p in adapter.parameters() if p.grad is not None} == {torch.float32}
    assert all(parameter.grad is not None for parameter in adapter.parameters())
