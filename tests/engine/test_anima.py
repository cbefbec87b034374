"""Anima: what diffusers' modular pipeline computes, the names that readers accept, and the files that people have."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorasmith.engine.errors import BaseModelError, ExportError
from lorasmith.engine.families import DrawSettings, Family, anima, identify_base
from lorasmith.engine.families import _anima_files as files_of
from lorasmith.engine.safetensors_header import read_header
from lorasmith.engine.sources import BaseFiles, locate_base
from tests import split_files
from tests.engine.one_step import PROMPTS, take_step
from tests.tiny_anima import build_tiny_anima

CPU = torch.device("cpu")


def load(files: BaseFiles, dtype: torch.dtype = torch.float32) -> Family:
    module, identity = identify_base(files)
    return module.load(files, identity, CPU, dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_anima(tmp_path_factory.mktemp("anima") / "base")


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    return load(locate_base(str(folder)))


@pytest.fixture(scope="module")
def parts_of_diffusers(folder: Path) -> Any:
    """The parts as diffusers loads them, for its own pipeline's steps."""
    from diffusers import AnimaTextConditioner, AutoencoderKLQwenImage, CosmosTransformer3DModel
    from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler
    from transformers import AutoTokenizer, Qwen3Model

    return SimpleNamespace(
        transformer=CosmosTransformer3DModel.from_pretrained(folder / "transformer"),
        text_conditioner=AnimaTextConditioner.from_pretrained(folder / "text_conditioner"),
        text_encoder=Qwen3Model.from_pretrained(folder / "text_encoder"),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae"),
        scheduler=Scheduler.from_pretrained(folder / "scheduler"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        t5_tokenizer=AutoTokenizer.from_pretrained(folder / "t5_tokenizer"),
        _execution_device=CPU,
    )


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the transformer takes from torchvision, which is not installed: resizing its mask of padded pictures."""
    from diffusers.models.transformers import transformer_cosmos

    def resize(mask: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
        return torch.nn.functional.interpolate(mask, size=size, mode=interpolation)

    fake = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    monkeypatch.setattr(transformer_cosmos, "transforms", fake, raising=False)


def reference_prompts(parts: Any, prompts: list[str]) -> torch.Tensor:
    from diffusers.modular_pipelines.anima.before_denoise import AnimaTextConditioningStep as Condition
    from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep as Encode

    states, mask = Encode._get_qwen_prompt_embeds(parts, prompts, 512, CPU, torch.float32)
    words, words_mask = Encode._get_t5_prompt_ids(parts, prompts, 512, CPU)
    embeds: torch.Tensor = Condition._condition_prompt_embeds(
        parts, states, mask, words, words_mask, CPU, torch.float32, torch.float32
    )
    return embeds


def predicted(family: Family) -> torch.Tensor:
    noisy = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        conditioning = family.collate(family.encode_prompts(["a red circle"]))
        return family.predict(noisy, torch.tensor([700.0]), conditioning)


# --- what the reference computes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [["a red circle", "blue"], ["a red circle " * 90], [""]])
def test_prompts_are_the_modular_pipelines(family: Family, parts_of_diffusers: Any, prompts: list[str]) -> None:
    with torch.no_grad():
        expected = reference_prompts(parts_of_diffusers, prompts)
    for own, other in zip(family.encode_prompts(prompts), expected, strict=True):
        assert own["prompt_embeds"].shape == (512, 32)
        torch.testing.assert_close(own["prompt_embeds"], other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.usefixtures("torchvision")
def test_latents_are_drawn_as_the_modular_pipelines_steps_draw_them(
    family: Any, parts_of_diffusers: Any, guidance: float
) -> None:
    import numpy as np
    from diffusers.guiders import ClassifierFreeGuidance

    parts, scheduler = parts_of_diffusers, parts_of_diffusers.scheduler
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 3, 3))
    scheduler.set_begin_index(0)
    latents = torch.randn((1, 16, 1, 8, 8), generator=torch.Generator().manual_seed(7))
    padding_mask, guider = torch.zeros(1, 1, 64, 64), ClassifierFreeGuidance(guidance_scale=guidance)
    with torch.no_grad():
        embeds = [reference_prompts(parts, [prompt]) for prompt in ("a red circle", "blue")]
        for time in scheduler.timesteps:
            both = [
                parts.transformer(latents, time.expand(1) / 1000, row, padding_mask=padding_mask, return_dict=False)[0]
                for row in embeds
            ]
            velocity = guider.forward(*both).pred if guidance > 1.0 else both[0]
            latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
        wanted, unwanted = family.encode_prompts(["a red circle", "blue"])
        settings, seen = DrawSettings(3, guidance, 64, 64), []
        drawn = family.draw_latents(
            [wanted], [unwanted], settings, [torch.Generator().manual_seed(7)], lambda *step: seen.append(step[1])
        )
    torch.testing.assert_close(drawn, latents.squeeze(2), rtol=1e-4, atol=1e-4)
    assert seen == [0, 1, 2]


@pytest.mark.usefixtures("torchvision")
def test_loss_and_gradients_are_those_of_the_formula(folder: Path, parts_of_diffusers: Any) -> None:
    """Rectified flow on the class's own path: its mask of padded pictures is made by itself here."""
    family = load(locate_base(str(folder)))
    step = take_step(family)
    vae = parts_of_diffusers.vae
    with torch.no_grad():
        mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
        std = torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
        clean = (vae.encode(step.pixels.unsqueeze(2)).latent_dist.mode() - mean) / std
        embeds = torch.cat([reference_prompts(parts_of_diffusers, [prompt]) for prompt in PROMPTS])
    noise = step.noise.unsqueeze(2)
    family.denoiser.register_to_config(concat_padding_mask=True)
    prediction = family.denoiser(
        hidden_states=(1.0 - step.level) * clean + step.level * noise,
        timestep=torch.full((2,), step.level),
        encoder_hidden_states=embeds,
        padding_mask=torch.zeros(1, 1, 64, 64),
        return_dict=False,
    )[0]
    step.compare(((prediction.float() - (noise - clean)) ** 2).reshape(2, -1).mean(1).mean())


# --- names that readers accept -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> torch.nn.Module:
    """The real transformer without weights, by the configuration of circlestone-labs/Anima-Base-v1.0-Diffusers."""
    from diffusers import CosmosTransformer3DModel

    with torch.device("meta"):
        return CosmosTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=16,
            attention_head_dim=128,
            num_layers=28,
            mlp_ratio=4.0,
            text_embed_dim=1024,
            adaln_lora_dim=256,
            max_size=(128, 240, 240),
            patch_size=(1, 2, 2),
            rope_scale=(1.0, 4.0, 4.0),
            concat_padding_mask=True,
            extra_pos_embed_type=None,
        )


@pytest.fixture(scope="module")
def full_size(real: torch.nn.Module) -> list[str]:
    return [path for path, layer in real.named_modules() if isinstance(layer, torch.nn.Linear)]


def original_names() -> set[str]:
    """The linear layers in the names of Cosmos Predict 2's code, which is ComfyUI's."""
    ends = [
        f"{kind}_attn.{name}" for kind in ("self", "cross") for name in ("q_proj", "k_proj", "v_proj", "output_proj")
    ]
    ends += [f"adaln_modulation_{kind}.{i}" for kind in ("self_attn", "cross_attn", "mlp") for i in (1, 2)]
    names = {f"blocks.{i}.{end}" for i in range(28) for end in (*ends, "mlp.layer1", "mlp.layer2")}
    names |= {"x_embedder.proj.1", "t_embedder.1.linear_1", "t_embedder.1.linear_2"}
    return names | {"final_layer.linear", "final_layer.adaln_modulation.1", "final_layer.adaln_modulation.2"}


def test_the_real_model_is_the_spec(real: torch.nn.Module, full_size: list[str]) -> None:
    assert sum(parameter.numel() for parameter in real.parameters()) == anima.SPEC.denoiser_parameters
    count = {
        name: sum(f".{path}".endswith(tuple(f".{end}" for end in ends)) for path in full_size)
        for name, ends in anima.SPEC.targets.items()
    }
    assert count["attention"] == 8 * 28
    assert count["attention-mlp"] == 10 * 28
    assert count["all-linear"] == 16 * 28


@pytest.mark.parametrize(("layout", "prefix"), [("comfyui", "diffusion_model."), ("kohya", "lora_unet_")])
def test_comfyui_knows_every_layer_by_its_name(full_size: list[str], layout: str, prefix: str) -> None:
    accepted = original_names()
    if layout == "kohya":
        accepted = {name.replace(".", "_") for name in accepted}
    assert {anima.export_name(layout, "denoiser", path) for path in full_size} == {prefix + name for name in accepted}


def test_diffusers_turns_comfyuis_names_into_the_layers_of_the_real_model(full_size: list[str]) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers as convert

    names = {anima.export_name("comfyui", "denoiser", path): path for path in full_size}
    converted = convert({f"{name}.lora_A.weight": path for name, path in names.items()})
    assert converted == {f"transformer.{path}.lora_A.weight": path for path in full_size}
    assert anima.export_name("diffusers", "denoiser", full_size[3]) == f"transformer.{full_size[3]}"


def test_there_is_no_name_for_the_text_encoder() -> None:
    with pytest.raises(ExportError, match="no kohya name for text_encoder"):
        anima.export_name("kohya", "text_encoder", "layers.0.self_attn.q_proj")


# --- files that people have --------------------------------------------------------------------------------------


def original_weights(state: Mapping[str, Any], conditioner: Mapping[str, Any]) -> dict[str, Any]:
    """Both networks in the names of ComfyUI's file, with what is in it and nothing reads."""
    renames = (
        (r"^transformer_blocks\.", "blocks."),
        (r"^patch_embed\.proj\.", "x_embedder.proj.1."),
        (r"^time_embed\.t_embedder\.", "t_embedder.1."),
        (r"^time_embed\.norm\.", "t_embedding_norm."),
        (r"^norm_out\.linear_(\d)\.", r"final_layer.adaln_modulation.\1."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"\.norm1\.linear_(\d)\.", r".adaln_modulation_self_attn.\1."),
        (r"\.norm2\.linear_(\d)\.", r".adaln_modulation_cross_attn.\1."),
        (r"\.norm3\.linear_(\d)\.", r".adaln_modulation_mlp.\1."),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_([qkv])\.", r".\1_proj."),
        (r"\.to_out\.0\.", ".output_proj."),
        (r"\.norm_([qk])\.", r".\1_norm."),
        (r"\.ff\.net\.0\.proj\.", ".mlp.layer1."),
        (r"\.ff\.net\.2\.", ".mlp.layer2."),
    )
    weights = {}
    for path, value in state.items():
        name = path
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        weights[name] = value
    weights |= {f"llm_adapter.{name}": value for name, value in conditioner.items()}
    return weights | {"pos_embedder.seq": torch.arange(240)}


@pytest.fixture(scope="module")
def parts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    """ComfyUI's three files."""
    place = tmp_path_factory.mktemp("split")
    networks = original_weights(split_files.part(folder, "transformer"), split_files.part(folder, "text_conditioner"))
    return BaseFiles(
        "single_file",
        split_files.write(place / "anima-preview.safetensors", networks, "net."),
        "anima-preview.safetensors",
        vae_file=split_files.write(place / "qwen_image_vae.safetensors", split_files.part(folder, "vae")),
        encoder_files=(
            split_files.write(
                place / "qwen_3_06b_base.safetensors", split_files.part(folder, "text_encoder"), "model."
            ),
        ),
    )


@pytest.fixture(autouse=True)
def tokenizers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where single files find their tokenizers."""
    for name, kept in (("tokenizer", "qwen3"), ("t5_tokenizer", "t5")):
        shutil.copytree(folder / name, tmp_path / "tokenizers" / kept)
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(tmp_path / "tokenizers"))


def test_split_files_give_what_the_folder_gives(parts: BaseFiles, family: Family) -> None:
    own = load(parts)
    torch.testing.assert_close(predicted(own), predicted(family))
    assert own.noise_schedule["shift"] == family.noise_schedule["shift"] == 3.0


def test_fp8_weights_are_scaled_back(parts: BaseFiles, folder: Path, tmp_path: Path) -> None:
    networks = original_weights(split_files.part(folder, "transformer"), split_files.part(folder, "text_conditioner"))
    stored, meant = split_files.in_fp8(networks)
    expected, quantized = (
        load(dataclasses.replace(parts, path=split_files.write(tmp_path / name, weights)))
        for name, weights in (("meant.safetensors", meant), ("fp8.safetensors", stored))
    )
    assert "fp8" in quantized.identity.label
    torch.testing.assert_close(predicted(quantized), predicted(expected))


def test_the_real_file_is_recognized_and_its_configuration_read_from_its_header(
    real: torch.nn.Module, tmp_path: Path
) -> None:
    from diffusers import AnimaTextConditioner

    with torch.device("meta"):
        conditioner = AnimaTextConditioner()
    states = (
        {k: torch.empty(v.shape, device="meta") for k, v in net.state_dict().items()} for net in (real, conditioner)
    )
    shapes = {name: tuple(value.shape) for name, value in original_weights(*states).items()}
    path = split_files.header(tmp_path / "anima-turbo-v1.1.safetensors", shapes)
    identity = anima.identify(BaseFiles("single_file", path, path.name))
    assert identity is not None
    assert identity.label == "Anima Turbo (guessed from its name), velocity, bf16, 1.96 B"
    assert identity.parts_missing == ("vae", "text_encoder")
    config = files_of.transformer_config(read_header(path)[0])
    assert {key: real.config[key] for key in config} == config
    inside = {name.removeprefix("llm_adapter."): info for name, info in read_header(path)[0].items()}
    names = {name: inside[name] for name in conditioner.state_dict()}
    config = files_of.conditioner_config(names)
    assert {key: conditioner.config[key] for key in config} == config


def test_cosmos_without_an_adapter_is_not_anima(parts: BaseFiles, folder: Path, tmp_path: Path) -> None:
    weights = original_weights(split_files.part(folder, "transformer"), {})
    path = split_files.write(tmp_path / "cosmos_predict2_2B_t2i.safetensors", weights)
    assert anima.identify(BaseFiles("single_file", path, path.name)) is None


def test_missing_parts_are_named_and_refused(parts: BaseFiles) -> None:
    with pytest.raises(BaseModelError, match="has no vae and no text_encoder"):
        load(dataclasses.replace(parts, vae_file=None, encoder_files=()))
