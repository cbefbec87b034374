"""Z-Image: what its scripts compute, the names that readers accept, and the files that people have."""

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
from lorasmith.engine.families import DrawSettings, Family, PictureRequest, identify_base, usual_drawing, z_image
from lorasmith.engine.sources import BaseFiles, locate_base
from tests import split_files
from tests.engine.one_step import PROMPTS, take_step
from tests.tiny_z_image import build_tiny_z_image

CPU = torch.device("cpu")
QKV = ("to_q", "to_k", "to_v")


def load(files: BaseFiles, dtype: torch.dtype = torch.float32) -> Family:
    module, identity = identify_base(files)
    return module.load(files, identity, CPU, dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_z_image(tmp_path_factory.mktemp("z_image") / "base")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder, local_files_only=True)
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


def test_prompts_are_the_pipelines_and_are_left_as_they_were(family: Family, pipeline: Any) -> None:
    prompts = ["a red circle", "", "ein blauer Würfel"]
    kept = list(prompts)
    expected, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    encoded = family.encode_prompts(prompts)
    assert prompts == kept
    for own, other in zip(encoded, expected, strict=True):
        torch.testing.assert_close(own["prompt_embeds"], other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
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


def test_loss_and_gradients_are_those_of_the_reference_script(folder: Path, pipeline: Any) -> None:
    """train_dreambooth_lora_z_image.py: the transformer's time runs backward, and its answer is negated."""
    family = load(locate_base(str(folder)))
    step = take_step(family)
    vae = pipeline.vae
    with torch.no_grad():
        model_input = vae.encode(step.pixels).latent_dist.mode()
        model_input = (model_input - vae.config.shift_factor) * vae.config.scaling_factor
        prompt_embeds, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    timesteps = torch.full((2,), step.level * 1000.0)
    noisy_model_input = (1.0 - step.level) * model_input + step.level * step.noise
    timestep_normalized = (1000 - timesteps) / 1000
    inputs = list(noisy_model_input.unsqueeze(2).unbind(dim=0))
    answers = family.denoiser(inputs, timestep_normalized, prompt_embeds, return_dict=False)[0]
    model_pred = -torch.stack(answers, dim=0).squeeze(2)
    step.compare(((model_pred.float() - (step.noise - model_input).float()) ** 2).reshape(2, -1).mean(1).mean())


# --- names that readers accept -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size() -> dict[str, torch.nn.Module]:
    """The linear layers of the real model, without weights."""
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        network = ZImageTransformer2DModel(axes_lens=[1536, 512, 512])
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}


def wanted(layers: Mapping[str, torch.nn.Module], targets: str) -> list[str]:
    ends = tuple(f".{suffix}" for suffix in z_image.SPEC.targets[targets])
    return [path for path in layers if f".{path}".endswith(ends)]


def comfyui_accepts() -> set[str]:
    """The diffusers names of linear layers that ComfyUI maps to its own (comfy/utils.py, z_image_to_diffusers)."""
    blocks = [f"layers.{i}" for i in range(30)] + [
        f"{kind}_refiner.{i}" for kind in ("context", "noise") for i in (0, 1)
    ]
    ends = [*(f"attention.{name}" for name in (*QKV, "to_out.0")), *(f"feed_forward.w{i}" for i in (1, 2, 3))]
    names = {f"{block}.{end}" for block in blocks for end in ends}
    names |= {f"{block}.adaLN_modulation.0" for block in blocks if not block.startswith("context")}
    names |= {"all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1", "all_x_embedder.2-1"}
    return names | {"cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"}


def test_the_real_model_has_as_many_weights_as_the_spec_says() -> None:
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        network = ZImageTransformer2DModel()
    assert sum(parameter.numel() for parameter in network.parameters()) == z_image.SPEC.denoiser_parameters


def test_target_presets_of_the_real_model(full_size: Mapping[str, torch.nn.Module]) -> None:
    in_blocks = {path for path in full_size if path.startswith(("layers.", "noise_refiner.", "context_refiner."))}
    assert set(wanted(full_size, "all-linear")) == in_blocks
    sizes = {name: len(wanted(full_size, name)) for name in z_image.SPEC.targets}
    blocks = 30 + 4
    assert sizes["attention"] == sizes["diffusers"] == 4 * blocks
    assert sizes["attention-mlp"] == 7 * blocks
    assert (sizes["kohya"], sizes["ai-toolkit"]) == (7 * 30, 8 * 30)
    assert not [path for path in wanted(full_size, "ai-toolkit") if "refiner" in path]


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_comfyui_and_diffusers_know_every_layer_by_its_name(
    full_size: Mapping[str, torch.nn.Module], layout: str
) -> None:
    prefix = {"comfyui": "diffusion_model.", "diffusers": "transformer."}[layout]
    names = {z_image.export_name(layout, "denoiser", path) for path in full_size}
    assert names == {prefix + path for path in comfyui_accepts()}
    assert not [name for name in names if "qkv" in name]


@pytest.mark.parametrize("layout", z_image.SPEC.layouts)
def test_diffusers_turns_every_layout_into_the_layers_of_the_real_model(
    full_size: Mapping[str, torch.nn.Module], layout: str
) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_z_image_lora_to_diffusers as convert

    ends = ("lora_down.weight", "lora_up.weight") if layout == "kohya" else ("lora_A.weight", "lora_B.weight")
    state: dict[str, torch.Tensor] = {}
    for number, path in enumerate(full_size):
        name = z_image.export_name(layout, "denoiser", path)
        state |= {f"{name}.{end}": torch.full((1, 1), float(number)) for end in ends}
    if layout != "diffusers":
        state = convert(state)
    for number, path in enumerate(full_size):
        assert state[f"transformer.{path}.lora_A.weight"].item() == number
        assert state[f"transformer.{path}.lora_B.weight"].item() == number
    assert len(state) == 2 * len(full_size)


def test_the_fused_names_are_refused_by_diffusers(family: Family, tmp_path: Path) -> None:
    """Why `qkv` is never written: what ComfyUI and other trainers write fused is an error there."""
    weights = {
        "diffusion_model.layers.0.attention.qkv.lora_A.weight": torch.ones(2, 32),
        "diffusion_model.layers.0.attention.qkv.lora_B.weight": torch.ones(96, 2),
    }
    path = split_files.write(tmp_path / "fused.safetensors", weights)
    with pytest.raises(Exception, match=r"[Nn]o modules were targeted|[Tt]arget modules"):
        z_image.load_lora(path, {"denoiser": family.denoiser})


def test_there_is_no_name_for_the_text_encoder() -> None:
    with pytest.raises(ExportError, match="no comfyui name for text_encoder"):
        z_image.export_name("comfyui", "text_encoder", "layers.0.self_attn.q_proj")


# --- files that people have --------------------------------------------------------------------------------------


def comfyui_transformer(folder: Path) -> dict[str, Any]:
    """The transformer in the names of ComfyUI's files."""
    weights = split_files.fused(split_files.part(folder, "transformer"), QKV, "qkv")
    renames = (
        (r"^all_(x_embedder|final_layer)\.2-1\.", r"\1."),
        (r"\.attention\.to_out\.0\.", ".attention.out."),
        (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
    )
    for pattern, new in renames:
        weights = {re.sub(pattern, new, name): value for name, value in weights.items()}
    return weights | {"norm_final.weight": torch.ones(32)}  # is in the files, and nothing reads it


@pytest.fixture(scope="module")
def parts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    """ComfyUI's three files."""
    place = tmp_path_factory.mktemp("split")
    encoder = split_files.part(folder, "text_encoder")
    return BaseFiles(
        "single_file",
        split_files.write(place / "z_image_turbo_bf16.safetensors", comfyui_transformer(folder)),
        "z_image_turbo_bf16.safetensors",
        vae_file=split_files.write(place / "ae.safetensors", split_files.original_autoencoder(folder)),
        encoder_files=(split_files.write(place / "qwen_3_4b.safetensors", encoder, "model."),),
    )


@pytest.fixture(autouse=True)
def tokenizers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where single files find their tokenizer."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizers" / "qwen3")
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(tmp_path / "tokenizers"))


def test_split_files_give_what_the_folder_gives(parts: BaseFiles, family: Family) -> None:
    own = load(parts)
    assert own.identity.variant == "turbo"
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(own.encode_images(pixels), family.encode_images(pixels))
    torch.testing.assert_close(predicted(own), predicted(family))
    assert own.noise_schedule["shift"] == 3.0


def test_all_parts_in_one_file_give_what_the_folder_gives(folder: Path, family: Family, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    pieces = {
        "model.diffusion_model.": comfyui_transformer(folder),
        "vae.": split_files.original_autoencoder(folder),
        "text_encoders.qwen3_4b.transformer.model.": split_files.part(folder, "text_encoder"),
    }
    weights: dict[str, Any] = {}
    for prefix, values in pieces.items():
        weights |= load_file(split_files.write(tmp_path / "part.safetensors", values, prefix))
    own = load(locate_base(str(split_files.write(tmp_path / "all in one.safetensors", weights))))
    torch.testing.assert_close(predicted(own), predicted(family))


def test_fp8_weights_are_scaled_back(folder: Path, parts: BaseFiles, tmp_path: Path) -> None:
    stored, meant = split_files.in_fp8(comfyui_transformer(folder))
    expected, quantized = (
        load(dataclasses.replace(parts, path=split_files.write(tmp_path / name, weights, "model.diffusion_model.")))
        for name, weights in (("meant.safetensors", meant), ("z_image_base_fp8.safetensors", stored))
    )
    assert quantized.identity.precision == "fp8"
    assert "fp8" in quantized.identity.label
    torch.testing.assert_close(predicted(quantized), predicted(expected))


def test_the_transformer_in_diffusers_names_is_a_single_file_too(
    folder: Path, parts: BaseFiles, family: Family
) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    own = load(dataclasses.replace(parts, path=path, origin=path.name))
    torch.testing.assert_close(predicted(own), predicted(family))


def test_a_folder_takes_parts_from_files_given_apart(folder: Path, parts: BaseFiles, family: Family) -> None:
    files = dataclasses.replace(parts, kind="folder", path=folder, origin=str(folder))
    torch.testing.assert_close(predicted(load(files)), predicted(family))


# --- what a file is ----------------------------------------------------------------------------------------------


def named(folder: Path, name: str, metadata: Mapping[str, str] | None = None) -> BaseFiles:
    """A file of that name with the real model's header and no weights."""
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in ZImageTransformer2DModel().state_dict().items()}
    shapes = {re.sub(r"^all_(x_embedder|final_layer)\.2-1\.", r"\1.", key): shape for key, shape in shapes.items()}
    return BaseFiles("single_file", split_files.header(folder / name, shapes, metadata), name)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("z_image_turbo_bf16.safetensors", "turbo"),
        ("z_image_bf16.safetensors", "base"),
        ("z_image_de_turbo_v1_bf16.safetensors", "de-turbo"),
        ("myMix_zit_v2.safetensors", "turbo"),
        ("something.safetensors", "base"),
    ],
)
def test_the_variant_of_a_file_is_guessed_from_its_name_and_called_a_guess(
    tmp_path: Path, name: str, variant: str
) -> None:
    identity = z_image.identify(named(tmp_path, name))
    assert identity is not None
    assert identity.variant == variant
    assert "guessed" in identity.label
    assert "6.15 B" in identity.label
    assert identity.parts_missing == ("vae", "text_encoder")
    assert identity.native_resolution == 1024
    assert ("training_adapter" in identity.details) == (variant == "turbo")


def test_what_a_file_says_of_itself_is_no_guess(tmp_path: Path) -> None:
    identity = z_image.identify(named(tmp_path, "x.safetensors", {"modelspec.title": "Z-Image-Turbo"}))
    assert identity is not None
    assert identity.variant == "turbo"
    assert "guessed" not in identity.label


@pytest.mark.parametrize(("shift", "variant", "drawing"), [(3.0, "turbo", (8, 0.0)), (6.0, "base", (30, 4.0))])
def test_a_folders_scheduler_tells_turbo_and_base_apart(
    tmp_path: Path, shift: float, variant: str, drawing: tuple[int, float]
) -> None:
    family = load(locate_base(str(build_tiny_z_image(tmp_path / "model", shift))))
    assert family.identity.variant == variant
    assert usual_drawing(family) == drawing
    assert family.noise_schedule["shift"] == shift


def test_relatives_are_not_taken_for_z_image(tmp_path: Path) -> None:
    from diffusers import Lumina2Transformer2DModel, ZImageTransformer2DModel

    with torch.device("meta"):
        omni = ZImageTransformer2DModel(n_layers=1, siglip_feat_dim=1152).state_dict()
        lumina = Lumina2Transformer2DModel(num_layers=1).state_dict()
    for index, weights in enumerate((omni, lumina)):
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        path = split_files.header(tmp_path / f"{index}.safetensors", shapes)
        assert z_image.identify(BaseFiles("single_file", path, path.name)) is None


def test_missing_parts_are_named_and_refused(parts: BaseFiles) -> None:
    alone = dataclasses.replace(parts, vae_file=None, encoder_files=())
    with pytest.raises(BaseModelError, match="has no vae and no text_encoder"):
        load(alone)


def test_a_missing_tokenizer_is_an_error_with_the_command_that_fetches_it(
    parts: BaseFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(tmp_path / "nowhere"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(BaseModelError, match="hf download"):
        load(parts)


def test_a_tokenizer_without_chat_template_is_an_error_by_name(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "base")
    (tmp_path / "base" / "tokenizer" / "chat_template.jinja").unlink()
    family = load(locate_base(str(tmp_path / "base")))
    with pytest.raises(BaseModelError, match="no chat template"):
        family.encode_prompts(["red"])


def test_a_transformer_that_lacks_a_weight_is_refused_by_its_name(
    folder: Path, parts: BaseFiles, tmp_path: Path
) -> None:
    weights = comfyui_transformer(folder)
    del weights["layers.1.feed_forward.w2.weight"]
    path = split_files.write(tmp_path / "z_image_bf16.safetensors", weights)
    with pytest.raises(BaseModelError, match=r"transformer of .* does not fit"):
        load(dataclasses.replace(parts, path=path))
