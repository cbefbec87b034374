"""Krea 2: what its scripts compute, the names that readers accept, and the files that people have."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorasmith.engine.errors import BaseModelError, ExportError
from lorasmith.engine.families import DrawSettings, Family, PictureRequest, identify_base, krea2, usual_drawing
from lorasmith.engine.families import _encoder_qwen3_vl as encoder
from lorasmith.engine.families import _krea2_files as files_of
from lorasmith.engine.sources import BaseFiles, locate_base
from tests import split_files
from tests.engine.one_step import PROMPTS, take_step
from tests.tiny_krea2 import build_tiny_krea2

CPU = torch.device("cpu")


def load(files: BaseFiles, dtype: torch.dtype = torch.float32) -> Family:
    module, identity = identify_base(files)
    return module.load(files, identity, CPU, dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_krea2(tmp_path_factory.mktemp("krea2") / "raw")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import Krea2Pipeline

    pipe = Krea2Pipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    return load(locate_base(str(folder)))


def predicted(family: Family) -> torch.Tensor:
    noisy = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        conditioning = family.collate(family.encode_prompts(["a red circle"]))
        return family.predict(noisy.to(family.dtype), torch.tensor([700.0]), conditioning)


# --- what the reference computes ---------------------------------------------------------------------------------


def test_prompts_are_the_pipelines_without_its_padding(family: Family, pipeline: Any) -> None:
    prompts = ["a red circle", "", "word " * 300]
    embeds, mask = pipeline.encode_prompt(prompts)
    assert embeds.shape[1] == 512
    for own, other, valid in zip(family.encode_prompts(prompts), embeds, mask, strict=True):
        torch.testing.assert_close(own["prompt_embeds"], other[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_pictures_are_those_of_the_diffusers_pipeline(family: Family, pipeline: Any, guidance: float) -> None:
    (expected,) = pipeline(
        prompt=["a red circle"],
        negative_prompt=["a blue square"],
        num_inference_steps=3,
        guidance_scale=0.0 if guidance == 1.0 else guidance,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(7)],
    ).images
    positive, negative = family.encode_prompts(["a red circle", "a blue square"])
    (picture,) = family.draw([PictureRequest(positive, negative, 7)], DrawSettings(3, guidance, 64, 64))
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_turbo_is_drawn_with_its_own_fixed_shift(tmp_path: Path) -> None:
    from diffusers import Krea2Pipeline

    path = build_tiny_krea2(tmp_path / "turbo", distilled=True)
    own, pipe = load(locate_base(str(path))), Krea2Pipeline.from_pretrained(path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert usual_drawing(own) == (8, 0.0)
    assert own.identity.details["training_adapter"].endswith("_v1.safetensors")
    settings = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 0.0}
    (expected,) = pipe(prompt=["red"], generator=[torch.Generator().manual_seed(7)], **settings).images
    positive, negative = own.encode_prompts(["red", ""])
    (picture,) = own.draw([PictureRequest(positive, negative, 7)], DrawSettings(3, 0.0, 64, 64))
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_loss_and_gradients_are_those_of_the_reference_script(folder: Path, pipeline: Any) -> None:
    """train_dreambooth_lora_krea2.py, with its padded prompts and its own packing."""
    family = load(locate_base(str(folder)))
    step = take_step(family)
    vae = pipeline.vae
    with torch.no_grad():
        latents_mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
        latents_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
        model_input = (vae.encode(step.pixels.unsqueeze(2)).latent_dist.mode() - latents_mean) * latents_std
        prompt_embeds, prompt_embeds_mask = pipeline.encode_prompt(prompt=list(PROMPTS))
    noise = step.noise.unsqueeze(2)
    noisy = ((1.0 - step.level) * model_input + step.level * noise).permute(0, 2, 1, 3, 4)
    packed = noisy.reshape(2, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 64)
    model_pred = family.denoiser(
        hidden_states=packed,
        encoder_hidden_states=prompt_embeds,
        timestep=torch.full((2,), step.level * 1000.0) / 1000,
        position_ids=pipeline.prepare_position_ids(prompt_embeds.shape[1], 4, 4, CPU),
        encoder_attention_mask=prompt_embeds_mask,
        return_dict=False,
    )[0]
    model_pred = model_pred.view(2, 4, 4, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 1, 8, 8)
    target = noise - model_input
    step.compare(((model_pred.float() - target.float()) ** 2).reshape(2, -1).mean(1).mean())


# --- names that readers accept -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> torch.nn.Module:
    from diffusers import Krea2Transformer2DModel

    with torch.device("meta"):
        return Krea2Transformer2DModel()


@pytest.fixture(scope="module")
def full_size(real: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers of the real model, without weights."""
    return {path: layer for path, layer in real.named_modules() if isinstance(layer, torch.nn.Linear)}


def original_names() -> dict[str, str]:
    """Krea's own names of the linear layers by those of diffusers (comfy/utils.py, krea2_to_diffusers)."""
    blocks = {f"transformer_blocks.{i}": f"blocks.{i}" for i in range(28)}
    blocks |= {
        f"text_fusion.{k}_blocks.{i}": f"txtfusion.{k}_blocks.{i}" for k in ("layerwise", "refiner") for i in (0, 1)
    }
    ends = {"attn.to_q": "attn.wq", "attn.to_k": "attn.wk", "attn.to_v": "attn.wv", "attn.to_gate": "attn.gate"}
    ends |= {"attn.to_out.0": "attn.wo", "ff.gate": "mlp.gate", "ff.up": "mlp.up", "ff.down": "mlp.down"}
    names = {f"{own}.{end}": f"{theirs}.{other}" for own, theirs in blocks.items() for end, other in ends.items()}
    names |= {"img_in": "first", "time_mod_proj": "tproj.1", "final_layer.linear": "last.linear"}
    names |= {"time_embed.linear_1": "tmlp.0", "time_embed.linear_2": "tmlp.2"}
    names |= {"txt_in.linear_1": "txtmlp.1", "txt_in.linear_2": "txtmlp.3"}
    return names | {"text_fusion.projector": "txtfusion.projector"}


def test_the_real_model_is_the_spec(real: torch.nn.Module, full_size: Mapping[str, torch.nn.Module]) -> None:
    assert sum(parameter.numel() for parameter in real.parameters()) == krea2.SPEC.denoiser_parameters
    blocks, count = 28 + 4, {}
    for name, suffixes in krea2.SPEC.targets.items():
        ends = tuple(f".{suffix}" for suffix in suffixes)
        count[name] = sum(f".{path}".endswith(ends) for path in full_size)
    assert count["attention"] == 5 * blocks
    assert count["attention-mlp"] == count["all-linear"] == 8 * blocks
    assert count["diffusers"] == 7 * blocks + 8


@pytest.mark.parametrize(
    ("layout", "prefix"), [("comfyui", "diffusion_model."), ("diffusers", "transformer."), ("kohya", "lora_unet_")]
)
def test_comfyui_knows_every_layer_by_its_name(
    full_size: Mapping[str, torch.nn.Module], layout: str, prefix: str
) -> None:
    """comfy/lora.py maps `diffusion_model.` and `lora_unet_` before its own names, `transformer.` before diffusers'."""
    accepted = set(original_names()) if layout == "diffusers" else set(original_names().values())
    if layout == "kohya":
        accepted = {name.replace(".", "_") for name in accepted}
    assert {krea2.export_name(layout, "denoiser", path) for path in full_size} == {prefix + name for name in accepted}


def test_diffusers_turns_comfyuis_names_into_the_layers_of_the_real_model(
    full_size: Mapping[str, torch.nn.Module],
) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_krea2_lora_to_diffusers as convert

    state: dict[str, torch.Tensor] = {}
    for number, path in enumerate(full_size):
        name = krea2.export_name("comfyui", "denoiser", path)
        state |= {f"{name}.lora_{side}.weight": torch.full((1, 1), float(number)) for side in "AB"}
    converted = convert(state)
    assert len(converted) == 2 * len(full_size)
    for number, path in enumerate(full_size):
        assert converted[f"transformer.{path}.lora_A.weight"].item() == number


def test_diffusers_names_behind_comfyuis_prefix_are_refused(family: Family, tmp_path: Path) -> None:
    """Why `comfyui` has the original names."""
    name = "diffusion_model.transformer_blocks.0.attn.to_q.lora_{}.weight"
    path = split_files.write(
        tmp_path / "wrong.safetensors", {name.format("A"): torch.ones(2, 32), name.format("B"): torch.ones(32, 2)}
    )
    with pytest.raises(ValueError, match="should be empty"):
        krea2.load_lora(path, {"denoiser": family.denoiser})


def test_there_is_no_name_for_the_text_encoder() -> None:
    with pytest.raises(ExportError, match="no comfyui name for text_encoder"):
        krea2.export_name("comfyui", "text_encoder", "layers.0.self_attn.q_proj")


# --- files that people have --------------------------------------------------------------------------------------


def original_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """The transformer in the names of Krea's own code, with each block's modulation in one row."""
    renames = (
        (r"^transformer_blocks\.", "blocks."),
        (r"^text_fusion\.", "txtfusion."),
        (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.mod.lin"),
        (r"^final_layer\.scale_shift_table$", "last.modulation.lin"),
        (r"^final_layer\.norm\.weight$", "last.norm.scale"),
        (r"^final_layer\.linear\.", "last.linear."),
        (r"^txt_in\.norm\.weight$", "txtmlp.0.scale"),
        (r"^txt_in\.linear_1\.", "txtmlp.1."),
        (r"^txt_in\.linear_2\.", "txtmlp.3."),
        (r"^time_embed\.linear_1\.", "tmlp.0."),
        (r"^time_embed\.linear_2\.", "tmlp.2."),
        (r"^time_mod_proj\.", "tproj.1."),
        (r"^img_in\.", "first."),
        (r"\.norm1\.weight$", ".prenorm.scale"),
        (r"\.norm2\.weight$", ".postnorm.scale"),
        (r"\.attn\.norm_q\.weight$", ".attn.qknorm.qnorm.scale"),
        (r"\.attn\.norm_k\.weight$", ".attn.qknorm.knorm.scale"),
        (r"\.attn\.to_([qkv])\.", r".attn.w\1."),
        (r"\.attn\.to_out\.0\.", ".attn.wo."),
        (r"\.attn\.to_gate\.", ".attn.gate."),
        (r"\.ff\.", ".mlp."),
    )
    weights = {}
    for name, value in state.items():
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        weights[name] = value.reshape(-1) if name.endswith(".mod.lin") else value
    return weights


@pytest.fixture(scope="module")
def parts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    """ComfyUI's three files; the autoencoder is in diffusers' names, in which it is a file of its own too."""
    place = tmp_path_factory.mktemp("split")
    reader = {f"model.{name}": value for name, value in split_files.part(folder, "text_encoder").items()}
    return BaseFiles(
        "single_file",
        split_files.write(
            place / "krea2_raw_bf16.safetensors", original_weights(split_files.part(folder, "transformer"))
        ),
        "krea2_raw_bf16.safetensors",
        vae_file=split_files.write(place / "qwen_image_vae.safetensors", split_files.part(folder, "vae")),
        encoder_files=(split_files.write(place / "qwen3vl_4b_bf16.safetensors", reader),),
    )


@pytest.fixture(autouse=True)
def as_small_as_the_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single files find their tokenizer, and read the layers that the tiny text encoder has."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizers" / "qwen3")
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(tmp_path / "tokenizers"))
    monkeypatch.setattr(files_of, "READ_LAYERS", (1, 2, 4))


def test_split_files_give_what_the_folder_gives(parts: BaseFiles, family: Family) -> None:
    own = load(parts)
    assert (own.identity.variant, own.noise_schedule["max_image_seq_len"]) == ("raw", 6400)
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(own.encode_images(pixels), family.encode_images(pixels))
    torch.testing.assert_close(predicted(own), predicted(family))


def test_the_transformer_in_diffusers_names_is_a_single_file_too(
    folder: Path, parts: BaseFiles, family: Family
) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.testing.assert_close(
        predicted(load(dataclasses.replace(parts, path=path, origin=path.name))), predicted(family)
    )


def test_norms_keep_their_32_bits_from_files_as_from_folders(folder: Path, parts: BaseFiles) -> None:
    from_folder, from_file = load(locate_base(str(folder)), torch.bfloat16), load(parts, torch.bfloat16)
    exact = dict(from_folder.denoiser.named_parameters())
    for name, parameter in from_file.denoiser.named_parameters():
        assert torch.equal(parameter, exact[name]), name
        assert parameter.dtype == exact[name].dtype
    assert exact["final_layer.norm.weight"].dtype == torch.float32
    torch.testing.assert_close(predicted(from_file), predicted(from_folder))


def test_fp8_weights_are_scaled_back(folder: Path, parts: BaseFiles, tmp_path: Path) -> None:
    stored, meant = split_files.in_fp8(original_weights(split_files.part(folder, "transformer")))
    expected, quantized = (
        load(dataclasses.replace(parts, path=split_files.write(tmp_path / name, weights, "model.diffusion_model.")))
        for name, weights in (("meant.safetensors", meant), ("krea2_raw_fp8.safetensors", stored))
    )
    assert "fp8" in quantized.identity.label
    torch.testing.assert_close(predicted(quantized), predicted(expected))


def test_a_text_encoder_in_several_files_is_read_whole(folder: Path, family: Family, tmp_path: Path) -> None:
    copy = tmp_path / "sharded"
    shutil.copytree(folder, copy)
    weights = split_files.part(copy, "text_encoder")
    (copy / "text_encoder" / "model.safetensors").unlink()
    cut = len(weights) // 2
    for number, half in enumerate((list(weights.items())[:cut], list(weights.items())[cut:]), start=1):
        split_files.write(copy / "text_encoder" / f"model-0000{number}-of-00002.safetensors", dict(half))
    torch.testing.assert_close(predicted(load(locate_base(str(copy)))), predicted(family))


def test_a_plain_qwen3_of_the_same_size_is_not_taken_for_the_text_encoder(parts: BaseFiles, tmp_path: Path) -> None:
    """It has the very same layers, and would read prompts in another way."""
    from safetensors.torch import load_file

    blind = {name: value for name, value in load_file(parts.encoder_files[0]).items() if "visual." not in name}
    path = split_files.write(tmp_path / "qwen_3_4b.safetensors", blind)
    given = dataclasses.replace(parts, encoder_files=(path,))
    assert encoder.find(given) == []
    with pytest.raises(BaseModelError, match="has no text_encoder"):
        load(given)


# --- what a file is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "metadata", "variant", "guessed"),
    [
        ("krea2_raw_bf16.safetensors", None, "raw", True),
        ("krea2_turbo_bf16.safetensors", None, "turbo", True),
        ("mix.safetensors", None, "raw", True),
        ("mix.safetensors", {"modelspec.title": "Krea 2 Turbo"}, "turbo", False),
    ],
)
def test_the_real_file_is_recognized_by_its_header_and_a_guess_is_called_one(
    real: torch.nn.Module, tmp_path: Path, name: str, metadata: dict[str, str] | None, variant: str, guessed: bool
) -> None:
    state = {key: torch.empty(value.shape, device="meta") for key, value in real.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in original_weights(state).items()}
    path = split_files.header(tmp_path / name, shapes, metadata)
    identity = krea2.identify(BaseFiles("single_file", path, name))
    assert identity is not None
    assert (identity.variant, "guessed" in identity.label, "12.82 B" in identity.label) == (variant, guessed, True)
    assert identity.parts_missing == ("vae", "text_encoder")
    assert identity.native_resolution == 1024
    assert ("training_adapter" in identity.details) == (variant == "turbo")


def test_the_configuration_of_the_real_model_is_read_from_its_shapes(real: torch.nn.Module, tmp_path: Path) -> None:
    state = {key: torch.empty(value.shape, device="meta") for key, value in real.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in original_weights(state).items()}
    path = split_files.header(tmp_path / "raw.safetensors", shapes)
    from lorasmith.engine.safetensors_header import read_header

    config = files_of.config_of(read_header(path)[0])
    assert {key: real.config[key] for key in config} == config


def test_a_text_encoder_with_too_few_layers_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BaseModelError, match="only 5 layers of the 35"):
        encoder.load(locate_base(str(folder)), 35, torch.float32)


def test_missing_parts_are_named_and_refused(parts: BaseFiles) -> None:
    with pytest.raises(BaseModelError, match="has no vae and no text_encoder"):
        load(dataclasses.replace(parts, vae_file=None, encoder_files=()))
