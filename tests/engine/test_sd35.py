"""Stable Diffusion 3.5: what its scripts compute, the names that readers accept, and the files that people have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lorasmith.engine.adapters import attach_adapter
from lorasmith.engine.config import AdapterSettings, ObjectiveSettings
from lorasmith.engine.errors import ExportError
from lorasmith.engine.families import DrawSettings, Family, PictureRequest, sd35
from lorasmith.engine.objectives import build_objective
from lorasmith.engine.objectives.timesteps import FlowLevels
from lorasmith.engine.sources import BaseFiles, locate_base
from tests import split_files
from tests.engine.loaded_models import full_size_sd35, load, pixels, predicted
from tests.tiny_sd35 import TinyFiles, build_tiny_files, build_tiny_sd35

PROMPTS = ["a red circle", "red " * 300, ""]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    return build_tiny_files(tmp_path_factory.mktemp("sd35"))


@pytest.fixture(scope="module")
def pipeline(files: TinyFiles) -> Any:
    return pipeline_of(files.folder)


@pytest.fixture(scope="module")
def family(files: TinyFiles) -> Family:
    return load(locate_base(str(files.folder)))


def pipeline_of(folder: Path, **parts: Any) -> Any:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- what the reference computes ---------------------------------------------------------------------------------


def same_prompts(family: Family, pipeline: Any) -> None:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False, max_sequence_length=256
    )
    for index, own in enumerate(family.encode_prompts(PROMPTS)):
        torch.testing.assert_close(own["prompt_embeds"], embeds[index], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own["pooled"], pooled[index], rtol=1e-4, atol=1e-5)


def test_prompts_are_the_pipelines(family: Family, pipeline: Any) -> None:
    same_prompts(family, pipeline)


def test_without_t5_its_tokens_are_zeros_and_everything_else_works(tmp_path: Path) -> None:
    base = build_tiny_sd35(tmp_path / "base", with_t5=False)
    family = load(locate_base(str(base)))
    assert "without T5" in family.identity.label
    assert set(family.text_encoders) == {"text_encoder", "text_encoder_2"}
    assert len(sd35.load_tokenizers(locate_base(str(base)))) == 2
    same_prompts(family, pipeline_of(base, text_encoder_3=None, tokenizer_3=None))
    assert not family.encode_prompts(["red"])[0]["prompt_embeds"][-256:].any()
    assert torch.isfinite(predicted(family)).all()
    # A file with T5 can be given to it.
    t5 = split_files.write(
        tmp_path / "t5xxl.safetensors", split_files.part(build_tiny_sd35(tmp_path / "b"), "text_encoder_3")
    )
    identity = sd35.identify(BaseFiles("folder", base, "base", None, (t5,)))
    assert identity is not None
    assert "without T5" not in identity.label
    assert "text_encoder_3" in identity.details["text_parts"]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_of_the_diffusers_pipeline(family: Family, pipeline: Any, guidance: float) -> None:
    (expected,) = pipeline(
        prompt="a red circle",
        negative_prompt="a blue square",
        num_inference_steps=3,
        guidance_scale=guidance,
        height=64,
        width=96,
        generator=[torch.Generator().manual_seed(7)],
    ).images
    positive, negative = family.encode_prompts(["a red circle", "a blue square"])
    (picture,) = family.draw([PictureRequest(positive, negative, 7)], DrawSettings(3, guidance, 64, 96))
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_loss_and_gradients_are_those_of_the_reference_script(files: TinyFiles, pipeline: Any) -> None:
    family = load(locate_base(str(files.folder)))
    adapter = attach_adapter(family, AdapterSettings(rank=4, alpha=2.0, targets="attention-mlp"), seed=1)
    for index, module in enumerate(adapter.modules):
        torch.nn.init.normal_(module.up, std=0.1, generator=torch.Generator().manual_seed(index))
    prompts, level = ["a red circle", "a blue square"], 0.3
    latents = family.encode_images(pixels(64, 96))
    objective = build_objective(family, ObjectiveSettings(), seed=0)
    batch = objective.at(latents, level, [5, 6])
    conditioning = family.collate(family.encode_prompts(prompts))
    loss = objective.loss(family.predict(batch.noisy, batch.timesteps, conditioning), batch)
    loss.backward()
    parameters = [tensor for module in adapter.modules for tensor in module.tensors.values()]
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    # The last block's prompt side leads nowhere but into its attention: add_q_proj gets zeros, not nothing.
    assert len(gradients) == len(parameters)
    for parameter in parameters:
        parameter.grad = None

    # train_dreambooth_lora_sd3.py without preconditioning.
    with torch.no_grad():
        clean = (pipeline.vae.encode(pixels(64, 96)).latent_dist.mode() - 0.0609) * 1.5305
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
    noise = batch.target + latents.float()
    answer = family.denoiser(
        hidden_states=(1.0 - level) * clean + level * noise,
        timestep=torch.full((2,), level * 1000.0),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    reference = torch.mean((answer.float() - (noise - clean)) ** 2)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


def test_noise_levels_are_those_that_the_script_draws_from_its_shifted_table(family: Family) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import compute_density_for_timestep_sampling

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(family.noise_schedule))
    generator = torch.Generator().manual_seed(0)
    numbers = compute_density_for_timestep_sampling("logit_normal", 40_000, 0.0, 1.0, generator=generator)
    script = scheduler.sigmas[(numbers * 1000).long()]
    quantile = FlowLevels(ObjectiveSettings(), sd35.SPEC, family.noise_schedule, 0).quantile(64)
    for number in (0.1, 0.5, 0.9):
        assert quantile(number) == pytest.approx(float(script.quantile(number)), abs=0.01)


# --- names that readers accept -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size() -> dict[str, Any]:
    return full_size_sd35()


def adapted(network: torch.nn.Module, targets: str) -> dict[str, torch.nn.Module]:
    ends = tuple(f".{suffix}" for suffix in sd35.SPEC.targets[targets])
    return {path: layer for path, layer in network.named_modules() if f".{path}".endswith(ends)}


@pytest.mark.parametrize(("variant", "blocks", "dual"), [("medium", 24, 13), ("large", 38, 0)])
def test_comfyui_and_diffusers_know_every_name_of_the_full_size_model(
    variant: str, blocks: int, dual: int, full_size: dict[str, Any]
) -> None:
    """ComfyUI's rules (comfy/utils.py mmdit_to_diffusers, comfy/lora.py for SD3), written out here."""
    network = full_size[variant]
    block = [f"attn.{part}" for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")]
    block += [f"attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")] + ["attn.to_out.0", "attn.to_add_out"]
    block += ["norm1.linear", "norm1_context.linear", "ff.net.0.proj", "ff.net.2"]
    block += ["ff_context.net.0.proj", "ff_context.net.2"]
    accepted = {f"transformer.transformer_blocks.{index}.{part}" for index in range(blocks) for part in block}
    layers = adapted(network, "all-linear")
    assert all(isinstance(layer, torch.nn.Linear) for layer in layers.values())
    assert {str(sd35.export_name("diffusers", "denoiser", path)) for path in layers} <= accepted
    # Of the last block the prompt's side ends with its attention.
    attention = adapted(network, "attention")
    assert len(attention) == blocks * 8 - 1 + dual * 4
    assert len(adapted(network, "attention-mlp")) == len(attention) + blocks * 4 - 2
    assert len(adapted(network, "diffusers")) == blocks * 8 - 1
    assert sum(".attn2." in path for path in attention) == dual * 4
    if variant == "medium":
        assert sum(parameter.numel() for parameter in network.parameters()) == sd35.SPEC.denoiser_parameters


def test_text_encoder_names_are_those_that_comfyui_and_diffusers_read() -> None:
    encoder = "text_model.encoder.layers.0.self_attn.q_proj"
    assert sd35.export_name("diffusers", "text_encoder", encoder) == f"text_encoder.{encoder}"
    assert sd35.export_name("diffusers", "text_encoder_2", encoder) == f"text_encoder_2.{encoder}"
    for layout, part in (("kohya", "denoiser"), ("diffusers", "text_encoder_3")):
        with pytest.raises(ExportError, match=f"no {layout} name for {part}"):
            sd35.export_name(layout, part, encoder)


def test_diffusers_applies_a_lora_with_the_exported_names_to_every_layer(files: TinyFiles, tmp_path: Path) -> None:
    family, pipeline = load(locate_base(str(files.folder))), pipeline_of(files.folder)
    networks = {"denoiser": family.denoiser} | {
        part: family.text_encoders[part] for part in sd35.SPEC.trainable_text_encoders
    }
    weights: dict[str, torch.Tensor] = {}
    paths: dict[str, set[str]] = {}
    for part, network in networks.items():
        suffixes = tuple(f".{name}" for name in sd35.SPEC.text_encoder_targets)
        found = adapted(network, "attention-mlp") if part == "denoiser" else None
        for path, layer in (found or dict(network.named_modules())).items():
            if found is None and not path.endswith(suffixes):
                continue
            name = sd35.export_name("diffusers", part, path)
            weights[f"{name}.lora_A.weight"] = torch.randn(2, layer.in_features)  # type: ignore[arg-type]
            weights[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 2)  # type: ignore[arg-type]
            paths.setdefault(part, set()).add(path)
    save_file(weights, tmp_path / "lora.safetensors")
    pipeline.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="mine")
    sd35.load_lora(tmp_path / "lora.safetensors", networks)
    for part, network in networks.items():
        other = pipeline.transformer if part == "denoiser" else getattr(pipeline, part)
        for loaded in (network, other):
            there = {name.removesuffix(".lora_A") for name, _ in loaded.named_modules() if name.endswith(".lora_A")}
            assert there == paths[part]
