"""What diffusers makes of files that look right: the reasons why the table promises less than the names suggest.

These are tests of diffusers, not of lorasmith: when one fails after an upgrade, the rule in `engine/compatibility.py`
that it stands for can be lifted.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from lorasmith.engine.compatibility import loads_in
from lorasmith.engine.config import AdapterSettings
from lorasmith.engine.families import Family, families
from tests.engine.running import load_tiny
from tests.tiny import TINY_BUILDERS


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY_BUILDERS["flux1"](tmp_path_factory.mktemp("traps") / "flux1")


def lora_layers(family: Family) -> list[LoraLayer]:
    return [layer for layer in family.denoiser.modules() if isinstance(layer, LoraLayer)]


def pair(name: str, layer: torch.nn.Linear) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_A.weight": torch.randn(2, layer.in_features),
        f"{name}.lora_B.weight": torch.randn(layer.out_features, 2),
    }


def test_the_original_names_of_flux1_with_a_and_b_change_nothing_in_diffusers(flux: Path, tmp_path: Path) -> None:
    family = load_tiny(flux)
    layer = family.denoiser.get_submodule("transformer_blocks.0.attn.to_out.0")
    assert isinstance(layer, torch.nn.Linear)
    path = tmp_path / "x.safetensors"
    save_file(pair("diffusion_model.double_blocks.0.img_attn.proj", layer), path)
    try:
        families()["flux1"].load_lora(path, {"denoiser": family.denoiser})
    except (ValueError, KeyError, RuntimeError):
        return
    assert not lora_layers(family)
    assert "comfyui" not in families()["flux1"].SPEC.layouts


def test_lengths_of_a_dora_under_comfyuis_name_are_lost_in_diffusers(
    flux: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = load_tiny(flux)
    name = "transformer_blocks.0.attn.to_out.0"
    layer = family.denoiser.get_submodule(name)
    assert isinstance(layer, torch.nn.Linear)
    tensors = pair(f"transformer.{name}", layer) | {f"transformer.{name}.dora_scale": torch.ones(layer.out_features, 1)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        families()["flux1"].load_lora(path, {"denoiser": family.denoiser})
    (loaded,) = lora_layers(family)
    assert not any(getattr(loaded, "use_dora", {}).values()), "the length is gone, and a plain LoRA stays"
    for module in families().values():
        for layout in module.SPEC.layouts:
            if layout != "diffusers" and module.SPEC.objective == "flow":
                assert "diffusers" not in loads_in(module.SPEC, AdapterSettings(kind="dora"), layout)
