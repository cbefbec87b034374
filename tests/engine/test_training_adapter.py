"""A training adapter: beside the frozen layers while training, gone in previews, never in the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorasmith.engine.adapters import attach_adapter
from lorasmith.engine.config import AdapterSettings, BaseSettings
from lorasmith.engine.errors import BaseModelError, CheckpointError, HubError
from lorasmith.engine.export.layouts import build_tensors
from lorasmith.engine.families import BaseIdentity, Family
from lorasmith.engine.lora_files import read_lora
from lorasmith.engine.training_adapter import attach_training_adapter, resolve_training_adapter
from tests.engine.running import load_tiny, run_training, texts, tiny_config


@pytest.fixture(scope="module")
def file(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoCon that changes attention and convolutions visibly."""
    family = load_tiny(tiny_sd15)
    settings = AdapterSettings(kind="locon", rank=2, alpha=2.0, conv_rank=2, conv_alpha=1.0, targets="attention-mlp")
    adapter = attach_adapter(family, settings, seed=1)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in adapter.modules:
            module.up.copy_(torch.randn(module.up.shape, generator=draw) * 0.3)
    path = tmp_path_factory.mktemp("adapter") / "undistill.safetensors"
    save_file(build_tensors(family, adapter, "kohya", torch.float32), path)
    return path


def answer(family: Family) -> torch.Tensor:
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return family.predict(noisy, torch.tensor([500]), {"prompt_embeds": embeds})


@pytest.mark.parametrize("adapter_first", [False, True])
def test_it_does_what_the_lora_does_until_it_is_switched_off(tiny_sd15: Path, file: Path, adapter_first: bool) -> None:
    from lorasmith.engine.export.changes import frozen_layer
    from lorasmith.engine.export.layouts import layer_of

    merged = load_tiny(tiny_sd15)
    for (component, path), change in read_lora(file).changes(merged).items():
        layer: Any = frozen_layer(layer_of(merged, component, path))
        with torch.no_grad():
            layer.weight += change.written_out()
    family = load_tiny(tiny_sd15)
    plain = answer(family)
    if adapter_first:
        attach_adapter(family, AdapterSettings(rank=2), seed=1)
    training = attach_training_adapter(family, file)
    if not adapter_first:
        attach_adapter(family, AdapterSettings(rank=2), seed=1)
    assert (answer(merged) - plain).abs().max() > 1e-2
    torch.testing.assert_close(answer(family), answer(merged), atol=1e-4, rtol=1e-3)
    with training.switched_off():
        assert torch.equal(answer(family), plain)
    torch.testing.assert_close(answer(family), answer(merged), atol=1e-4, rtol=1e-3)
    training.remove()
    assert torch.equal(answer(family), plain)


def test_it_is_in_the_training_and_not_in_the_export_and_another_one_ends_a_resume(
    tiny_sd15: Path, file: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(file.read_bytes())
    base = {"model": str(tiny_sd15), "training_adapter": str(own)}
    config = tiny_config(tiny_sd15, tmp_path, base=base, train={"steps": 1})
    run, host = run_training(config)
    assert "own.safetensors is active in" in texts(host.events)
    # It changes more layers than the run adapts.
    assert len(read_lora(next(run.export.iterdir())).modules) == 32 < len(read_lora(own).modules)
    changed = read_lora(own).modules
    tensors = {
        f"{name}.{suffix}": stored.tensors[role]
        for name, stored in changed.items()
        for suffix, role in (("lora_down.weight", "down"), ("lora_up.weight", "up"))
    }
    save_file({key: tensor * 1.5 for key, tensor in tensors.items()}, own)
    with pytest.raises(CheckpointError, match="training adapter has changed"):
        run_training(config, run=run)


def identity(needed: str = "") -> BaseIdentity:
    details = {"training_adapter": needed} if needed else {}
    return BaseIdentity("sd15", "Some Turbo", "turbo", "epsilon", 64, 1, "fp32", details=details)


def test_auto_is_what_the_base_names_and_off_is_none(file: Path) -> None:
    assert resolve_training_adapter(BaseSettings(), identity()) is None
    assert resolve_training_adapter(BaseSettings(), identity(str(file))) == file
    assert resolve_training_adapter(BaseSettings(training_adapter="off"), identity(str(file))) is None
    assert resolve_training_adapter(BaseSettings(training_adapter=str(file)), identity()) == file
    with pytest.raises(BaseModelError, match=r"no file nowhere\.safetensors"):
        resolve_training_adapter(BaseSettings(training_adapter="nowhere.safetensors"), identity())


def test_without_a_network_the_missing_adapter_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("someone/adapter", "someone/adapter/file.safetensors"):
        with pytest.raises(HubError, match=f"Some Turbo is trained with {name}.*base.training_adapter to off"):
            resolve_training_adapter(BaseSettings(), identity(name))


def test_a_lora_for_another_base_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    path = tmp_path / "x.safetensors"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}, path)
    with pytest.raises(BaseModelError, match="a LoRA for FLUX"):
        attach_training_adapter(load_tiny(tiny_sd15), path)
