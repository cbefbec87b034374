"""A LoRA of any program is read back by layer, and a run begins with it, exactly or as near as its adapter can."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorasmith.engine.adapters import Adapter, attach_adapter
from lorasmith.engine.config import AdapterSettings
from lorasmith.engine.errors import BaseModelError, ConfigError
from lorasmith.engine.export.changes import WholeChange, base_weight
from lorasmith.engine.export.layouts import build_tensors, layer_of
from lorasmith.engine.families import Family
from lorasmith.engine.lora_files import read_lora, start_adapter
from lorasmith.engine.lora_files.nearest import leading_directions, nearest_kronecker, nearest_product
from tests.engine.running import load_tiny, run_training, texts, tiny_config

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
SGM = "input_blocks_1_1_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def family(tiny_sd15: Path) -> Family:
    return load_tiny(tiny_sd15)


def product(rows: int = 16, columns: int = 16, rank: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw)


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


FLAT = TO_Q.replace(".", "_")
SPELLINGS = {
    "kohya": (f"lora_unet_{FLAT}", ".lora_down.weight", ".lora_up.weight"),
    "sgm": (f"lora_unet_{SGM}", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": (f"unet.{TO_Q}", ".lora_A.weight", ".lora_B.weight"),
    "comfyui": (f"diffusion_model.{TO_Q}", ".lora_A.weight", ".lora_B.weight"),
    "peft": (f"base_model.model.{TO_Q}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "old diffusers": (
        f"unet.{TO_Q.replace('attn1.to_q', 'attn1.processor.to_q')}",
        "_lora.down.weight",
        "_lora.up.weight",
    ),
    "lycoris": (f"lycoris_{FLAT}", ".lora_down.weight", ".lora_up.weight"),
    "onetrainer": (f"lora_transformer_{FLAT}", ".lora_down.weight", ".lora_up.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_layer_is_found_with_its_strength(family: Family, tmp_path: Path, spelling: str) -> None:
    name, down, up = SPELLINGS[spelling]
    a, b = product()
    path = write(tmp_path / "x.safetensors", {name + down: a, name + up: b, f"{name}.alpha": torch.tensor(1.0)})
    changes = read_lora(path).changes(family)
    assert set(changes) == {("denoiser", TO_Q)}
    torch.testing.assert_close(changes["denoiser", TO_Q].written_out(), b @ a * 0.5)


def test_text_encoders_are_found_with_and_without_the_level_that_transformers_dropped(
    family: Family, tmp_path: Path
) -> None:
    a, b = product(32, 32)
    for number, name in enumerate(
        (
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
            "text_encoder.encoder.layers.0.self_attn.q_proj",
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q",
        )
    ):
        tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        ((component, path),) = read_lora(write(tmp_path / f"{number}.safetensors", tensors)).changes(family)
        assert (component, path.removeprefix("text_model.")) == ("text_encoder", "encoder.layers.0.self_attn.q_proj")


def test_fused_attention_gives_each_layer_its_rows(family: Family, tmp_path: Path) -> None:
    a, b = product(48, 16)
    name = f"diffusion_model.{TO_Q.replace('to_q', 'qkv')}"
    changes = read_lora(
        write(tmp_path / "x.safetensors", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
    ).changes(family)
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        found = changes["denoiser", TO_Q.replace("to_q", part)].written_out()
        torch.testing.assert_close(found, (b @ a)[16 * number : 16 * (number + 1)])


def test_a_dora_of_either_kind_does_what_it_did(family: Family, tmp_path: Path) -> None:
    a, b = product()
    weight = base_weight(layer_of(family, "denoiser", TO_Q))
    lengths = torch.rand(16) + 0.5
    changed = weight + b @ a
    peft = {f"unet.{TO_Q}.lora_A.weight": a, f"unet.{TO_Q}.lora_B.weight": b}
    path = write(tmp_path / "x.safetensors", peft | {f"unet.{TO_Q}.lora_magnitude_vector": lengths})
    expected = changed * (lengths / changed.norm(dim=1))[:, None] - weight
    torch.testing.assert_close(read_lora(path).changes(family)["denoiser", TO_Q].written_out(), expected)
    name = f"lora_unet_{FLAT}"
    kohya = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    columns = torch.rand(1, 16) + 0.5
    path = write(tmp_path / "y.safetensors", kohya | {f"{name}.dora_scale": columns})
    expected = changed * columns / changed.norm(dim=0, keepdim=True) - weight
    torch.testing.assert_close(read_lora(path).changes(family)["denoiser", TO_Q].written_out(), expected)


def test_a_lora_for_another_base_is_refused_in_one_sentence(family: Family, tmp_path: Path) -> None:
    a, b = product(16, 2048)
    name = f"lora_unet_{FLAT.replace('attn1_to_q', 'attn2_to_k')}"
    path = write(tmp_path / "x.safetensors", {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b})
    with pytest.raises(BaseModelError, match=r"x\.safetensors is a LoRA for SDXL, not for Stable Diffusion"):
        read_lora(path).changes(family)
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    path = write(tmp_path / "y.safetensors", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
    with pytest.raises(BaseModelError, match=r"a LoRA for FLUX, not for"):
        read_lora(path).changes(family)


def test_a_file_with_missing_tensors_is_called_damaged(tmp_path: Path) -> None:
    a, b = product()
    tensors = {f"lora_unet_{FLAT}.lora_down.weight": a, f"lora_unet_{FLAT}.lora_up.weight": b}
    path = write(tmp_path / "x.safetensors", tensors | {"lora_unet_mid.lora_down.weight": a.clone()})
    with pytest.raises(BaseModelError, match="damaged: lora_unet_mid lacks"):
        read_lora(path)


def moved(family: Family, **settings: Any) -> Adapter:
    adapter = attach_adapter(family, AdapterSettings(**{"rank": 4, "alpha": 2.0, **settings}), seed=1)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in adapter.modules:
            for tensor in module.tensors.values():
                tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.05)
    return adapter


def saved(tiny: Path, path: Path, layout: str = "kohya", **settings: Any) -> Adapter:
    family = load_tiny(tiny)
    adapter = moved(family, **settings)
    write(path, build_tensors(family, adapter, layout, torch.float32))
    return adapter


def error_of(adapter: Adapter, exact: Adapter) -> float:
    gaps = [
        float((adapter.delta(a) - exact.delta(b)).norm() / exact.delta(b).norm())
        for a, b in zip(adapter.modules, exact.modules, strict=True)
    ]
    return max(gaps)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, {}),
        pytest.param({"rank": 2}, {}, marks=pytest.mark.campaign),
        ({}, {"kind": "dora"}),
        pytest.param({}, {"kind": "loha"}, marks=pytest.mark.campaign),
        ({"kind": "dora"}, {"kind": "dora", "alpha": 4.0}),
        ({"kind": "loha"}, {"kind": "loha", "alpha": 4.0}),
        ({"kind": "lokr"}, {"kind": "lokr", "alpha": 4.0}),
        ({"kind": "oft", "block_size": 4}, {"kind": "oft", "block_size": 4}),
        pytest.param({"kind": "boft", "block_size": 4}, {"kind": "boft", "block_size": 4}, marks=pytest.mark.campaign),
    ],
)
def test_what_the_adapter_can_hold_is_taken_over_exactly(
    tiny_sd15: Path, tmp_path: Path, settings: dict[str, Any], wanted: dict[str, Any]
) -> None:
    path = tmp_path / "x.safetensors"
    exact = saved(tiny_sd15, path, **settings)
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, AdapterSettings(**{"rank": 4, "alpha": 4.0, **wanted}), seed=7)
    assert "32 layers taken over exactly" in start_adapter(adapter, path, family)
    assert error_of(adapter, exact) < 1e-4


def test_a_rotation_begins_with_one_that_lycoris_limited_as_it_is_read(tiny_sd15: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    family = load_tiny(tiny_sd15)
    tensors = build_tensors(family, moved(family, kind="oft", block_size=4), "kohya", torch.float32)
    limited = {key: torch.tensor(0.1) if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    write(path, limited)
    other = load_tiny(tiny_sd15)
    adapter = attach_adapter(other, AdapterSettings(kind="oft", block_size=4), seed=7)
    assert "32 layers taken over exactly" in start_adapter(adapter, path, other)
    for module in adapter.modules:
        blocks = module.tensors["oft_blocks"].detach()
        assert float((blocks - blocks.transpose(1, 2)).norm()) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "oft", "block_size": 4}, r"blocks of 4, and this run of 2.*Set adapter.block_size to what"),
        ({}, "adds to"),
    ],
)
def test_a_rotation_begins_with_nothing_else(
    tiny_sd15: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    path = tmp_path / "x.safetensors"
    saved(tiny_sd15, path, **settings)
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, AdapterSettings(kind="oft", block_size=2), seed=7)
    with pytest.raises(ConfigError, match=re.compile(words, re.DOTALL)):
        start_adapter(adapter, path, family)


@pytest.mark.parametrize("wanted", [{"rank": 2}, {"kind": "lokr", "lokr_full": True}])
def test_what_it_cannot_hold_becomes_the_nearest_and_the_loss_is_told(
    tiny_sd15: Path, tmp_path: Path, wanted: dict[str, Any]
) -> None:
    path = tmp_path / "x.safetensors"
    exact = saved(tiny_sd15, path)
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, AdapterSettings(**{"rank": 4, "alpha": 4.0, **wanted}), seed=7)
    words = start_adapter(adapter, path, family)
    assert "32 of them as the nearest" in words
    gaps = [adapter.delta(a) - exact.delta(b) for a, b in zip(adapter.modules, exact.modules, strict=True)]
    whole = [exact.delta(module) for module in exact.modules]
    error = (sum(float(gap.square().sum()) for gap in gaps) / sum(float(d.square().sum()) for d in whole)) ** 0.5
    assert f"{error:.1%} of the change is lost" in words
    if wanted == {"rank": 2}:
        best = sum(float(torch.linalg.svdvals(delta)[2:].square().sum()) for delta in whole)
        assert error == pytest.approx((best / sum(float(d.square().sum()) for d in whole)) ** 0.5, rel=1e-3)


def test_layers_on_one_side_only_are_told(tiny_sd15: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved(tiny_sd15, path, text_encoder=True)
    family = load_tiny(tiny_sd15)
    settings = AdapterSettings(rank=4, alpha=2.0, targets="attention-mlp")
    words = start_adapter(attach_adapter(family, settings, seed=1), path, family)
    assert "layers are not in the file and begin anew" in words
    assert "Not taken over, since this run does not adapt them: 8 layers (text_encoder." in words


def test_a_start_from_the_bases_own_weights_cannot_have_another_start(tiny_sd15: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved(tiny_sd15, path)
    family = load_tiny(tiny_sd15)
    adapter = attach_adapter(family, AdapterSettings(rank=4, init="pissa"), seed=1)
    with pytest.raises(ConfigError, match=r"adapter\.init"):
        start_adapter(adapter, path, family)


def test_large_matrices_are_approximated_as_well_as_by_a_full_decomposition() -> None:
    draw = torch.Generator().manual_seed(0)
    decaying = (
        torch.randn(600, 40, generator=draw)
        @ torch.diag(0.8 ** torch.arange(40.0))
        @ torch.randn(40, 700, generator=draw)
    )
    up, values, down = leading_directions(decaying, 8)
    exact = torch.linalg.svdvals(decaying)
    torch.testing.assert_close(values, exact[:8], rtol=1e-3, atol=1e-3)
    near = nearest_product(WholeChange(decaying), 8).written_out()
    assert float((near - decaying).norm()) == pytest.approx(float(exact[8:].norm()), rel=1e-3)
    assert up.shape == (600, 8)
    assert down.shape == (8, 700)


def test_the_nearest_kronecker_product_of_one_is_itself() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, 2, generator=draw), torch.randn(4, 5, generator=draw)
    a, b = nearest_kronecker(torch.kron(first, second), (3, 2), (4, 5))
    torch.testing.assert_close(torch.kron(a, b), torch.kron(first, second), atol=1e-5, rtol=1e-5)


def test_a_run_begins_with_the_lora_it_is_given_and_a_resumed_one_does_not(tiny_sd15: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    exact = saved(tiny_sd15, path, rank=2)
    settings = {"rank": 2, "alpha": 2.0, "start_from": str(path)}
    config = tiny_config(tiny_sd15, tmp_path, adapter=settings, train={"steps": 1}, optimizer={"learning_rate": 1e-9})
    run, host = run_training(config)
    assert "begins with x.safetensors: 32 layers taken over exactly" in texts(host.events)
    found = read_lora(next(run.export.iterdir())).changes(load_tiny(tiny_sd15))
    for module in exact.modules:
        change = found[module.component, module.path].written_out()
        torch.testing.assert_close(change, exact.delta(module), atol=1e-4, rtol=2e-3)
    _, again = run_training(config, run=run)
    assert "begins with" not in texts(again.events)
