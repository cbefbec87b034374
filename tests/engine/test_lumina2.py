"""Lumina-Image 2.0: what its scripts compute, the names that readers accept, and the files that people have."""

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
from lorasmith.engine.families import DrawSettings, Family, FusedName, PictureRequest, identify_base, lumina2
from lorasmith.engine.families import _lumina2_names as names
from lorasmith.engine.sources import BaseFiles, locate_base
from tests import split_files
from tests.engine.one_step import PROMPTS, take_step
from tests.tiny_lumina2 import build_tiny_lumina2

CPU = torch.device("cpu")
QKV = ("to_q", "to_k", "to_v")


def load(files: BaseFiles, dtype: torch.dtype = torch.float32) -> Family:
    module, identity = identify_base(files)
    return module.load(files, identity, CPU, dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_lumina2(tmp_path_factory.mktemp("lumina2") / "base")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import Lumina2Pipeline

    pipe = Lumina2Pipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    return load(locate_base(str(folder)))


def predicted(family: Family) -> torch.Tensor:
    noisy = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        conditioning = family.collate(family.encode_prompts(["a red circle"]))
        return family.predict(noisy, torch.tensor([700.0]), conditioning)


# --- what the reference computes ---------------------------------------------------------------------------------


def test_prompts_are_the_pipelines_and_an_empty_one_is_its_usual_negative_prompt(family: Family, pipeline: Any) -> None:
    embeds, mask, negative, negative_mask = pipeline.encode_prompt(["a red circle", "blue"], negative_prompt=["", ""])
    red, blue, empty = family.encode_prompts(["a red circle", "blue", ""])
    for own, other, valid in (
        (red, embeds[0], mask[0]),
        (blue, embeds[1], mask[1]),
        (empty, negative[0], negative_mask[0]),
    ):
        torch.testing.assert_close(own["prompt_embeds"], other[valid.bool()], rtol=1e-4, atol=1e-5)
    assert len(empty["prompt_embeds"]) == 1


def test_a_prompt_that_brings_a_system_prompt_gets_no_second_one(family: Family, pipeline: Any) -> None:
    begin = "You are an assistant designed to generate anime images based on textual prompts."
    embeds, mask, *_ = pipeline.encode_prompt(["a girl"], system_prompt=begin, do_classifier_free_guidance=False)
    (own,) = family.encode_prompts([f"{begin} <Prompt Start> a girl"])
    torch.testing.assert_close(own["prompt_embeds"], embeds[0][mask[0].bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_of_the_diffusers_pipeline(family: Family, pipeline: Any, guidance: float) -> None:
    (expected,) = pipeline(
        prompt=["a red circle"],
        negative_prompt=[""],
        num_inference_steps=5,
        guidance_scale=guidance,
        cfg_trunc_ratio=0.25,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(7)],
    ).images
    positive, negative = family.encode_prompts(["a red circle", ""])
    (picture,) = family.draw([PictureRequest(positive, negative, 7)], DrawSettings(5, guidance, 64, 64))
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_loss_and_gradients_are_those_of_the_reference_script(folder: Path, pipeline: Any) -> None:
    """train_dreambooth_lora_lumina2.py: time runs from noise to picture, and so does what is learnt."""
    family = load(locate_base(str(folder)))
    step = take_step(family)
    vae = pipeline.vae
    with torch.no_grad():
        model_input = (vae.encode(step.pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        embeds, mask, *_ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    sigmas = 1.0 - step.level  # of the script, where 1 is the picture
    noisy_model_input = (1.0 - sigmas) * step.noise + sigmas * model_input
    model_pred = family.denoiser(
        hidden_states=noisy_model_input,
        encoder_hidden_states=embeds,
        encoder_attention_mask=mask,
        timestep=torch.full((2,), sigmas * 1000.0) / 1000.0,
        return_dict=False,
    )[0]
    target = model_input - step.noise
    step.compare(((model_pred.float() - target.float()) ** 2).reshape(2, -1).mean(1).mean())


# --- names that readers accept -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> torch.nn.Module:
    from diffusers import Lumina2Transformer2DModel

    with torch.device("meta"):
        return Lumina2Transformer2DModel(cap_feat_dim=2304)


@pytest.fixture(scope="module")
def full_size(real: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers of the real model, without weights."""
    return {path: layer for path, layer in real.named_modules() if isinstance(layer, torch.nn.Linear)}


def original_shapes() -> dict[str, tuple[int, int]]:
    """The linear layers of the real model in the original code, which is ComfyUI's: name and (out, in)."""
    shapes = {"x_embedder": (2304, 64), "cap_embedder.1": (2304, 2304)}
    shapes |= {"t_embedder.mlp.0": (1024, 256), "t_embedder.mlp.2": (1024, 1024)}
    shapes |= {"final_layer.linear": (64, 2304), "final_layer.adaLN_modulation.1": (2304, 1024)}
    blocks = [f"layers.{i}" for i in range(26)] + [
        f"{kind}_refiner.{i}" for kind in ("context", "noise") for i in (0, 1)
    ]
    for block in blocks:
        shapes[f"{block}.attention.qkv"] = (2304 + 2 * 768, 2304)
        shapes[f"{block}.attention.out"] = (2304, 2304)
        shapes |= {f"{block}.feed_forward.w{i}": (9216, 2304) for i in (1, 3)}
        shapes[f"{block}.feed_forward.w2"] = (2304, 9216)
        if not block.startswith("context"):
            shapes[f"{block}.adaLN_modulation.1"] = (4 * 2304, 1024)
    return shapes


def test_the_real_model_is_the_spec(real: torch.nn.Module, full_size: Mapping[str, torch.nn.Module]) -> None:
    assert sum(parameter.numel() for parameter in real.parameters()) == lumina2.SPEC.denoiser_parameters
    count = {}
    for name, suffixes in lumina2.SPEC.targets.items():
        ends = tuple(f".{suffix}" for suffix in suffixes)
        count[name] = sum(f".{path}".endswith(ends) for path in full_size)
    blocks, modulated = 26 + 4, 26 + 2
    assert count["attention"] == count["diffusers"] == 4 * blocks
    assert count["attention-mlp"] == 7 * blocks
    assert count["all-linear"] == 7 * blocks + modulated
    assert count["kohya"] == count["all-linear"] + 2


@pytest.mark.parametrize("layout", ["comfyui", "kohya"])
def test_comfyui_knows_every_layer_by_its_name_and_shape(full_size: Mapping[str, torch.nn.Linear], layout: str) -> None:
    """comfy/lora.py maps `diffusion_model.NAME` and `lora_unet_NAME` to the names of its own model alone."""
    written: dict[str, tuple[int, int]] = {}
    for path, layer in full_size.items():
        name = lumina2.export_name(layout, "denoiser", path)
        if isinstance(name, FusedName):
            assert path in name.rows
            assert [row.rpartition(".")[2] for row in name.rows] == list(QKV)
            written[name.name] = (sum(full_size[row].out_features for row in name.rows), layer.in_features)
        else:
            assert name not in written
            written[name] = (layer.out_features, layer.in_features)
    if layout == "kohya":
        expected = {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in original_shapes().items()}
    else:
        expected = {f"diffusion_model.{name}": shape for name, shape in original_shapes().items()}
    assert written == expected


def test_the_original_names_are_those_of_diffusers_own_converter(real: torch.nn.Module) -> None:
    """Key by key on the real sizes; the converter itself knows no other ones, so that it is not used."""
    from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers

    state = {name: torch.empty(value.shape, device="meta") for name, value in real.state_dict().items()}
    original = {name: value for name, value in original_weights(state).items() if name != "norm_final.weight"}
    converted = convert_lumina2_to_diffusers(dict(original))
    ours = names.to_diffusers(original, 2304)
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in state.items()}
    assert {name: value.shape for name, value in converted.items()} == {n: value.shape for n, value in ours.items()}


def test_diffusers_reads_comfyuis_names_only_where_everything_was_trained(family: Family, tmp_path: Path) -> None:
    """Why `comfyui` promises ComfyUI alone."""
    weights = {
        "diffusion_model.layers.0.attention.qkv.lora_A.weight": torch.ones(2, 24),
        "diffusion_model.layers.0.attention.qkv.lora_B.weight": torch.ones(48, 2),
    }
    path = split_files.write(tmp_path / "attention only.safetensors", weights)
    with pytest.raises((KeyError, RuntimeError, ValueError)):
        lumina2.load_lora(path, {"denoiser": family.denoiser})


def test_there_is_no_name_for_the_text_encoder() -> None:
    with pytest.raises(ExportError, match="no comfyui name for text_encoder"):
        lumina2.export_name("comfyui", "text_encoder", "layers.0.self_attn.q_proj")


# --- files that people have --------------------------------------------------------------------------------------


def original_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """The transformer in the names of the original code and of ComfyUI's files."""
    weights = split_files.fused(state, QKV, "qkv")
    renames = (
        (r"^time_caption_embed\.caption_embedder\.", "cap_embedder."),
        (r"^time_caption_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
        (r"^time_caption_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
        (r"^norm_out\.linear_1\.", "final_layer.adaLN_modulation.1."),
        (r"^norm_out\.linear_2\.", "final_layer.linear."),
        (r"^(context_refiner\.\d+)\.norm1\.", r"\1.attention_norm1."),
        (r"\.norm1\.linear\.", ".adaLN_modulation.1."),
        (r"\.norm1\.norm\.", ".attention_norm1."),
        (r"\.norm2\.", ".attention_norm2."),
        (r"\.attn\.", ".attention."),
        (r"\.attention\.to_out\.0\.", ".attention.out."),
        (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
        (r"\.feed_forward\.linear_(\d)\.", r".feed_forward.w\1."),
    )
    for pattern, new in renames:
        weights = {re.sub(pattern, new, name): value for name, value in weights.items()}
    return weights | {"norm_final.weight": torch.ones(24)}  # is in the files, and nothing reads it


@pytest.fixture(scope="module")
def parts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    """ComfyUI's three files."""
    place = tmp_path_factory.mktemp("split")
    encoder = {f"model.{name}": value for name, value in split_files.part(folder, "text_encoder").items()}
    encoder["spiece_model"] = torch.zeros(10, dtype=torch.uint8)
    transformer = original_weights(split_files.part(folder, "transformer"))
    return BaseFiles(
        "single_file",
        split_files.write(place / "lumina_2_model_bf16.safetensors", transformer),
        "lumina_2_model_bf16.safetensors",
        vae_file=split_files.write(place / "ae.safetensors", split_files.original_autoencoder(folder)),
        encoder_files=(split_files.write(place / "gemma_2_2b_fp16.safetensors", encoder),),
    )


@pytest.fixture(autouse=True)
def tokenizers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where single files find their tokenizer."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizers" / "gemma2")
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(tmp_path / "tokenizers"))


def test_split_files_give_what_the_folder_gives(parts: BaseFiles, family: Family) -> None:
    own = load(parts)
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(own.encode_images(pixels), family.encode_images(pixels))
    torch.testing.assert_close(predicted(own), predicted(family))
    assert own.noise_schedule["shift"] == family.noise_schedule["shift"] == 6.0


def test_all_parts_in_one_file_give_what_the_folder_gives(folder: Path, family: Family, tmp_path: Path) -> None:
    pieces = {
        "model.diffusion_model.": original_weights(split_files.part(folder, "transformer")),
        "vae.": split_files.original_autoencoder(folder),
        "text_encoders.gemma2_2b.transformer.model.": split_files.part(folder, "text_encoder"),
    }
    weights = {prefix + name: value for prefix, values in pieces.items() for name, value in values.items()}
    weights["text_encoders.gemma2_2b.logit_scale"] = torch.tensor(1.0)
    own = load(locate_base(str(split_files.write(tmp_path / "lumina_2.safetensors", weights))))
    torch.testing.assert_close(predicted(own), predicted(family))


def test_fp8_weights_are_scaled_back(folder: Path, parts: BaseFiles, tmp_path: Path) -> None:
    stored, meant = split_files.in_fp8(original_weights(split_files.part(folder, "transformer")))
    expected, quantized = (
        load(dataclasses.replace(parts, path=split_files.write(tmp_path / name, weights)))
        for name, weights in (("meant.safetensors", meant), ("fp8.safetensors", stored))
    )
    assert "fp8" in quantized.identity.label
    torch.testing.assert_close(predicted(quantized), predicted(expected))


def test_the_transformer_in_diffusers_names_is_a_single_file_too(
    folder: Path, parts: BaseFiles, family: Family
) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    own = load(dataclasses.replace(parts, path=path, origin=path.name))
    torch.testing.assert_close(predicted(own), predicted(family))


# --- what a file is ----------------------------------------------------------------------------------------------


def test_the_real_file_is_recognized_by_its_header(real: torch.nn.Module, tmp_path: Path) -> None:
    state = {name: torch.empty(value.shape, device="meta") for name, value in real.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in original_weights(state).items()}
    path = split_files.header(tmp_path / "lumina_2_model_bf16.safetensors", shapes)
    identity = lumina2.identify(BaseFiles("single_file", path, path.name))
    assert identity is not None
    assert identity.label == "Lumina-Image 2.0, velocity, bf16, 2.61 B"
    assert identity.native_resolution == 1024
    assert identity.parts_missing == ("vae", "text_encoder")


def test_relatives_are_not_taken_for_lumina_image(tmp_path: Path) -> None:
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in ZImageTransformer2DModel(n_layers=1).state_dict().items()}
    path = split_files.header(tmp_path / "z.safetensors", shapes)
    assert lumina2.identify(BaseFiles("single_file", path, path.name)) is None
    omnigen = {
        "time_caption_embed.caption_embedder.0.weight": (2048,),
        "x_embedder.weight": (2520, 64),
        "layers.0.attn.to_q.weight": (2520, 2520),
        "layers.0.norm1.linear.weight": (10080, 1024),
        "ref_image_patch_embedder.weight": (2520, 64),
    }
    path = split_files.header(tmp_path / "omnigen2.safetensors", omnigen)
    assert lumina2.identify(BaseFiles("single_file", path, path.name)) is None


def test_missing_parts_are_named_and_refused(parts: BaseFiles) -> None:
    with pytest.raises(BaseModelError, match="has no vae and no text_encoder"):
        load(dataclasses.replace(parts, vae_file=None, encoder_files=()))


def test_a_missing_tokenizer_is_an_error_with_the_command_that_fetches_it(
    parts: BaseFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(tmp_path / "nowhere"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(BaseModelError, match="hf download"):
        load(parts)


def test_a_transformer_that_lacks_a_weight_is_refused_by_its_name(
    folder: Path, parts: BaseFiles, tmp_path: Path
) -> None:
    weights = original_weights(split_files.part(folder, "transformer"))
    del weights["layers.1.feed_forward.w2.weight"]
    path = split_files.write(tmp_path / "broken.safetensors", weights)
    with pytest.raises(BaseModelError, match=r"transformer of .* does not fit"):
        load(dataclasses.replace(parts, path=path))
