"""What the exported file is: its names, its strength for every alpha, and that only a proved file gets its name."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.engine.adapters import Adapter, attach_adapter
from lorasmith.engine.config import AdapterSettings, ExportSettings, RunConfig, RunSettings
from lorasmith.engine.errors import ExportError, StorageError
from lorasmith.engine.export import export_file_name, export_lora, verify_export
from lorasmith.engine.export.changes import Change, adaptable_layers
from lorasmith.engine.export.layouts import known_names
from lorasmith.engine.export.rules import read_changes
from lorasmith.engine.families import Family, identify_base
from lorasmith.engine.families.sd15 import SPEC, export_name
from lorasmith.engine.inspect_file import inspect_lora
from lorasmith.engine.sources import locate_base

RANK = 4


def load_family(folder: Path) -> Family:
    files = locate_base(str(folder))
    module, identity = identify_base(files)
    return module.load(files, identity, torch.device("cpu"), torch.float32)


def trained(family: Family, settings: AdapterSettings, size: float = 0.02) -> Adapter:
    adapter = attach_adapter(family, settings, seed=1)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in adapter.modules:
            module.up.copy_(torch.randn(module.up.shape, generator=draw) * size)
    return adapter


def config_for(layouts: list[Any], precision: Any = "fp16", name: str = "my-lora") -> RunConfig:
    return RunConfig(run=RunSettings(name=name), export=ExportSettings(layouts=layouts, precision=precision))


LOCON_AND_TEXT = AdapterSettings(
    kind="locon", rank=RANK, alpha=2.0, conv_rank=2, conv_alpha=3.0, targets="attention-mlp", text_encoder=True
)


@pytest.fixture
def family(tiny_sd15: Path) -> Family:
    return load_family(tiny_sd15)


@pytest.mark.parametrize("alpha", [1.0, RANK / 2, float(RANK), 2.0 * RANK])
def test_every_reader_rebuilds_the_trained_change_for_every_alpha(family: Family, tmp_path: Path, alpha: float) -> None:
    adapter = trained(family, AdapterSettings(rank=RANK, alpha=alpha))
    results = export_lora(family, adapter, config_for(["kohya", "diffusers"]), tmp_path, "x", {}, 7)
    assert [result.layout for result in results] == ["kohya", "diffusers"]
    for result in results:
        changes = read_changes(load_file(result.path))
        for module in adapter.modules:
            exact = adapter.delta(module)
            found = changes[export_name(result.layout, module.component, module.path)].written_out()
            assert torch.linalg.vector_norm(found - exact) <= 1e-3 * torch.linalg.vector_norm(exact)
        assert verify_export(result.path, result.layout, family, adapter) == result.keys == len(load_file(result.path))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_locon_and_text_encoder_prove_in_every_precision_and_layout(
    family: Family, tmp_path: Path, precision: str
) -> None:
    adapter = trained(family, LOCON_AND_TEXT)
    results = export_lora(family, adapter, config_for(["kohya", "diffusers"], precision), tmp_path, "x", {}, 1)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for result in results:
        matrices = [tensor for key, tensor in load_file(result.path).items() if not key.endswith(".alpha")]
        assert {tensor.dtype for tensor in matrices} == {dtype}
    assert any(key.startswith("lora_te_text_model_encoder_layers_0") for key in load_file(results[0].path))
    assert any(key.startswith("text_encoder.text_model.encoder.layers.0") for key in load_file(results[1].path))


def test_a_diffusers_file_says_the_same_with_and_without_its_header(family: Family, tmp_path: Path) -> None:
    adapter = trained(family, LOCON_AND_TEXT)
    (result,) = export_lora(family, adapter, config_for(["diffusers"], "fp32"), tmp_path, "x", {}, 1)
    stated = json.loads(inspect_lora(result.path).metadata["lora_adapter_metadata"])
    assert stated["unet.r"] == stated["unet.lora_alpha"] == RANK
    assert stated["unet.rank_pattern"] == stated["unet.alpha_pattern"] != {}
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(result.path), bare)
    assert verify_export(bare, "diffusers", family, adapter) == result.keys


def test_barely_trained_weights_survive_fp16(family: Family, tmp_path: Path) -> None:
    # One small step leaves up matrices of about 1e-7, below the smallest fp16 numbers.
    adapter = trained(family, AdapterSettings(rank=RANK, alpha=1.0), size=1e-7)
    (result,) = export_lora(family, adapter, config_for(["kohya"]), tmp_path, "x", {}, 1)
    assert result.unchanged == ()


def test_a_picture_is_drawn_alike_from_the_file_and_from_memory(
    family: Family, tiny_sd15: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    adapter = trained(family, LOCON_AND_TEXT, size=0.3)
    results = export_lora(family, adapter, config_for(["kohya", "diffusers"], "fp32"), tmp_path, "x", {}, 1)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(20)[None]
    embeds = family.text_encoders["text_encoder"](tokens)[0]
    here = family.predict(noise, torch.tensor([500]), {"prompt_embeds": embeds})
    adapter.set_enabled(False)
    embeds = family.text_encoders["text_encoder"](tokens)[0]
    base = family.predict(noise, torch.tensor([500]), {"prompt_embeds": embeds})
    assert not torch.allclose(here, base, atol=1e-2)
    for result in results:
        pipeline = DiffusionPipeline.from_pretrained(tiny_sd15, local_files_only=True, safety_checker=None)
        pipeline.load_lora_weights(str(tmp_path), weight_name=result.path.name, local_files_only=True)
        there = pipeline.unet(noise, 500, encoder_hidden_states=pipeline.text_encoder(tokens)[0]).sample
        torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-3)


@pytest.fixture
def exported(family: Family, tmp_path: Path) -> tuple[Family, Adapter, Path]:
    adapter = trained(family, AdapterSettings(rank=RANK, alpha=2.0))
    (result,) = export_lora(family, adapter, config_for(["kohya"]), tmp_path, "x", {}, 1)
    return family, adapter, result.path


def _changed(path: Path, change: str) -> Path:
    tensors = load_file(path)
    first = sorted(key for key in tensors if key.endswith(".lora_up.weight"))[0]
    if change == "renamed":
        tensors[first.replace("lora_unet_", "lora_unet_model_")] = tensors.pop(first)
    elif change == "missing":
        del tensors[first.replace(".lora_up.weight", ".alpha")]
    elif change == "left over":
        tensors["lora_unet_extra.alpha"] = torch.tensor(1.0)
    elif change == "twice as strong":
        tensors[first.replace(".lora_up.weight", ".alpha")] *= 2
    elif change == "nan":
        tensors[first][0, 0] = float("nan")
    target = path.with_name("changed.safetensors")
    save_file(tensors, target)
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("renamed", "unknown key lora_unet_model_"),
        ("missing", "lacks the key .*alpha"),
        ("left over", "unknown key lora_unet_extra.alpha"),
        ("twice as strong", "another weight change"),
        ("nan", "another weight change"),
    ],
)
def test_a_file_with_one_wrong_key_or_number_is_refused(
    exported: tuple[Family, Adapter, Path], change: str, words: str
) -> None:
    family, adapter, path = exported
    with pytest.raises(ExportError, match=words):
        verify_export(_changed(path, change), "kohya", family, adapter)


def test_a_torn_file_is_refused(exported: tuple[Family, Adapter, Path]) -> None:
    family, adapter, path = exported
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ExportError, match="Cannot read"):
        verify_export(path, "kohya", family, adapter)


def test_a_layout_that_diffusers_would_ignore_with_a_warning_is_refused(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A wrong prefix "loads" in diffusers: it warns that there are no LoRA keys, and draws the base model's pictures.
    from lorasmith.engine.families import sd15

    monkeypatch.setattr(sd15, "export_name", lambda layout, component, module: f"wrong_unet.{module}")
    adapter = trained(family, AdapterSettings(rank=RANK))
    with pytest.raises(ExportError, match=r"warning.*No LoRA keys"):
        export_lora(family, adapter, config_for(["diffusers"]), tmp_path, "x", {}, 1)
    assert list(tmp_path.iterdir()) == []


def test_an_untrained_adapter_is_refused_and_leaves_the_older_file(
    exported: tuple[Family, Adapter, Path], tmp_path: Path
) -> None:
    family, adapter, path = exported
    before = path.read_bytes()
    with torch.no_grad():
        for module in adapter.modules:
            module.up.zero_()
    with pytest.raises(ExportError, match="change nothing"):
        export_lora(family, adapter, config_for(["kohya"]), tmp_path, "x", {}, 2)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_an_untrained_adapter_proves_where_that_is_stated(exported: tuple[Family, Adapter, Path]) -> None:
    family, adapter, path = exported
    with torch.no_grad():
        for module in adapter.modules:
            module.up.zero_()
    tensors = load_file(path)
    save_file({key: tensor * (0 if "lora_up" in key else 1) for key, tensor in tensors.items()}, path)
    assert verify_export(path, "kohya", family, adapter, allow_untrained=True) == len(tensors)


def test_modules_that_training_left_alone_are_named_but_no_error(family: Family, tmp_path: Path) -> None:
    # Attention over a single token has no gradient in its queries and keys, e.g. deep layers at small sizes.
    adapter = trained(family, AdapterSettings(rank=RANK))
    with torch.no_grad():
        adapter.modules[0].up.zero_()
    (result,) = export_lora(family, adapter, config_for(["kohya"]), tmp_path, "x", {}, 1)
    assert result.unchanged == (f"denoiser:{adapter.modules[0].path}",)


def test_the_file_follows_the_umask_and_leaves_nothing_beside_it(family: Family, tmp_path: Path) -> None:
    adapter = trained(family, AdapterSettings(rank=RANK))
    folder = tmp_path / "läufe 実験" / "export"
    before = os.umask(0o027)
    try:
        (result,) = export_lora(family, adapter, config_for(["kohya"]), folder, "Zoë 実験", {}, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(result.path.stat().st_mode) == 0o640
    assert [item.name for item in folder.iterdir()] == ["Zoë 実験.safetensors"]
    assert result.bytes == result.path.stat().st_size


def test_a_full_disk_is_a_storage_error_and_leaves_no_file(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained(family, AdapterSettings(rank=RANK))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        export_lora(family, adapter, config_for(["kohya"]), tmp_path, "x", {}, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_storage_error(family: Family, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    adapter = trained(family, AdapterSettings(rank=RANK))
    with pytest.raises(StorageError, match="taken"):
        export_lora(family, adapter, config_for(["kohya"]), tmp_path / "taken" / "export", "x", {}, 1)


def test_the_libraries_loggers_are_as_before_after_a_proof(exported: tuple[Family, Adapter, Path]) -> None:
    import logging

    family, adapter, path = exported
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    verify_export(path, "kohya", family, adapter)
    assert [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers] == before


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("my-lora", "my-lora.safetensors"),
        ("../../etc/x", "_.._etc_x.safetensors"),
        ("a:b*c\n", "a_b_c_.safetensors"),
        ("Zoë 実験", "Zoë 実験.safetensors"),
        ("...", "lora.safetensors"),
    ],
)
def test_a_run_name_becomes_a_file_name_inside_the_folder(name: str, file: str) -> None:
    assert export_file_name(name) == file
    assert export_file_name(name, "diffusers") == file.replace(".safetensors", "-diffusers.safetensors")
    assert len(export_file_name("実" * 100).encode()) < 255


def test_names_of_the_real_sd15_are_those_of_the_field() -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    fake: Any = type("Loaded", (), {"denoiser": unet, "text_encoders": {"text_encoder": encoder}, "spec": SPEC})()
    names = known_names(fake, "kohya")
    assert {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2",
        "lora_unet_up_blocks_1_attentions_0_proj_in",
        "lora_unet_down_blocks_0_resnets_0_conv1",
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut",
        "lora_unet_down_blocks_0_downsamplers_0_conv",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
        "lora_unet_down_blocks_0_resnets_0_time_emb_proj",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_11_mlp_fc2",
    } <= names
    assert len(names) == len(list(adaptable_layers(unet))) + len(list(adaptable_layers(encoder)))
    # Kohya's trainer writes 192 modules for the UNet's transformer blocks and 72 for the text encoder.
    blocks = [name for name in names if "_attentions_" in name]
    assert len(blocks) == 192
    assert len([name for name in names if name.startswith("lora_te_")]) == 72
    attention = [name for name in blocks if name.endswith(("to_q", "to_k", "to_v", "to_out_0"))]
    assert len(attention) == 128
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" in known_names(fake, "diffusers")


def test_changes_are_compared_without_being_written_out() -> None:
    draw = torch.Generator().manual_seed(0)
    one = Change(torch.randn(4, 6, 3, 3, generator=draw), torch.randn(8, 4, 1, 1, generator=draw), 0.5)
    two = Change(one.down * 2, one.up / 2 + 1e-5, 0.5)
    assert one.shape == two.shape == (8, 6, 3, 3)
    assert one.distance() == pytest.approx(float(one.written_out().norm()), rel=1e-5)
    apart = float((one.written_out().double() - two.written_out().double()).norm())
    assert one.distance(two) == pytest.approx(apart, rel=2e-2)
    assert one.distance(one) == pytest.approx(0, abs=1e-6)


def test_names_do_not_change_when_an_adapter_is_attached(family: Family) -> None:
    before = known_names(family, "kohya")
    attach_adapter(family, LOCON_AND_TEXT, seed=1)
    assert known_names(family, "kohya") == before
