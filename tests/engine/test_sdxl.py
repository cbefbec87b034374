"""Stable Diffusion XL: what its scripts compute, the names that readers accept, and the files that people have."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lorasmith.engine.adapters import attach_adapter
from lorasmith.engine.config import AdapterSettings, ObjectiveSettings
from lorasmith.engine.errors import ExportError
from lorasmith.engine.families import sdxl
from lorasmith.engine.objectives import build_objective
from lorasmith.engine.sources import locate_base
from tests.engine.loaded_models import drawn, full_size_sdxl, load, pixels
from tests.tiny_sdxl import build_tiny_sdxl
from tests.tiny_sdxl_files import TinyFiles, build_tiny_files, sdxl_unet_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def zero_snr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sdxl(tmp_path_factory.mktemp("sdxl-v") / "base", "v_prediction", zero_snr=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    return build_tiny_files(tmp_path_factory.mktemp("sdxl-files"))


def pipeline_of(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- what the reference computes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", ["", "a blue square"])
def test_pictures_are_those_of_the_diffusers_pipeline(folder: Path, negative: str) -> None:
    expected = drawn_by_diffusers(pipeline_of(folder), negative or None)
    assert np.abs(drawn(load(locate_base(str(folder))), negative) - expected).max() <= 1


def test_a_zero_snr_model_draws_from_the_last_timestep_and_scales_guidance_back(zero_snr: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    pipeline = pipeline_of(zero_snr)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    expected = drawn_by_diffusers(pipeline, "a blue square", guidance_rescale=0.7)
    assert pipeline.scheduler.timesteps[0] == 999
    assert np.abs(drawn(load(locate_base(str(zero_snr))), "a blue square") - expected).max() <= 1


def drawn_by_diffusers(pipeline: Any, negative: str | None, **more: Any) -> np.ndarray[Any, Any]:
    (picture,) = pipeline(
        prompt="a red circle",
        negative_prompt=negative,
        num_inference_steps=3,
        guidance_scale=4.0,
        height=64,
        width=128,
        generator=[torch.Generator().manual_seed(7)],
        **more,
    ).images
    return np.asarray(picture).astype(int)


def test_prompts_are_the_pipelines_and_the_empty_one_is_zeros(folder: Path, tmp_path: Path) -> None:
    prompts = ["a red circle", "red " * 60, ""]
    embeds, _, pooled, _ = pipeline_of(folder).encode_prompt(list(prompts), do_classifier_free_guidance=False)
    encoded = load(locate_base(str(folder))).encode_prompts(prompts)
    for index in (0, 1):
        torch.testing.assert_close(encoded[index]["prompt_embeds"], embeds[index])
        torch.testing.assert_close(encoded[index]["pooled"], pooled[index])
    assert not any(value.any() for value in encoded[2].values())
    # A pipeline's index can say that the empty prompt is encoded like any other.
    base = shutil.copytree(folder, tmp_path / "base")
    index_file = base / "model_index.json"
    index_file.write_text(json.dumps(json.loads(index_file.read_text()) | {"force_zeros_for_empty_prompt": False}))
    torch.testing.assert_close(load(locate_base(str(base))).encode_prompts([""])[0]["prompt_embeds"], embeds[2])


@pytest.mark.parametrize("kind", ["epsilon", "zero_snr"])
def test_loss_and_gradients_are_those_of_the_reference_script(kind: str, folder: Path, zero_snr: Path) -> None:
    base = folder if kind == "epsilon" else zero_snr
    family, pipeline = load(locate_base(str(base))), pipeline_of(base)
    adapter = attach_adapter(family, AdapterSettings(rank=4, alpha=2.0, targets="attention-mlp"), seed=1)
    for index, module in enumerate(adapter.modules):
        torch.nn.init.normal_(module.up, std=0.1, generator=torch.Generator().manual_seed(index))
    prompts, timestep = ["a red circle", "a blue square"], 999 if kind == "zero_snr" else 300
    latents = family.encode_images(pixels(64, 96))
    objective = build_objective(family, ObjectiveSettings(min_snr_gamma=0.0), seed=0)
    batch = objective.at(latents, timestep / 999, [5, 6])
    assert batch.timesteps.tolist() == [timestep] * 2
    conditioning = family.collate(family.encode_prompts(prompts))
    loss = objective.loss(family.predict(batch.noisy, batch.timesteps, conditioning), batch)
    loss.backward()
    parameters = [tensor for module in adapter.modules for tensor in module.tensors.values()]
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters)
    for parameter in parameters:
        parameter.grad = None

    # train_dreambooth_lora_sdxl.py with the usual size numbers: original = target, no crop.
    signal, spread = cumulative(zero_snr=kind == "zero_snr")[timestep]
    with torch.no_grad():
        clean = pipeline.vae.encode(pixels(64, 96)).latent_dist.mode() * 0.13025
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    # Only the noise is taken from what is tested.
    drawn_noise = batch.target if kind == "epsilon" else signal * batch.target + spread * batch.noisy
    noisy = signal * clean + spread * drawn_noise
    target = drawn_noise if kind == "epsilon" else signal * drawn_noise - spread * clean
    answer = family.denoiser(
        noisy,
        torch.tensor([timestep] * 2),
        embeds,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2)},
    ).sample
    reference = torch.nn.functional.mse_loss(answer.float(), target.float())
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


def cumulative(*, zero_snr: bool) -> list[tuple[float, float]]:
    """How much of the picture and of the noise each timestep has; Lin et al., arXiv:2305.08891, algorithm 1."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1.0 - betas))
    if zero_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return [(float(value), float(np.sqrt(1.0 - value**2))) for value in root]


def test_the_autoencoder_computes_in_fp32_unless_it_is_the_one_made_for_16_bits(folder: Path, tmp_path: Path) -> None:
    fixed = build_tiny_sdxl(tmp_path / "fixed", fp16_fix=True)
    whole = load(locate_base(str(folder))).encode_images(pixels())
    for dtype in (torch.float16, torch.bfloat16):
        latents = load(locate_base(str(folder)), dtype).encode_images(pixels())
        assert latents.dtype == dtype
        assert torch.equal(latents, whole.to(dtype))
        own: Any = load(locate_base(str(fixed)), dtype)
        assert {parameter.dtype for parameter in own.load_vae().parameters()} == {dtype}


# --- names that readers accept -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size() -> dict[str, torch.nn.Module]:
    return full_size_sdxl()


def adapted(network: torch.nn.Module, suffixes: tuple[str, ...]) -> dict[str, torch.nn.Module]:
    ends = tuple(f".{suffix}" for suffix in suffixes)
    return {path: layer for path, layer in network.named_modules() if f".{path}".endswith(ends)}


_A1111_LAYERS = {
    "resnets": {
        "conv1": "in_layers_2",
        "conv2": "out_layers_3",
        "time_emb_proj": "emb_layers_1",
        "conv_shortcut": "skip_connection",
    }
}
_A1111: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
        lambda m: f"input_blocks_{1 + int(m[1]) * 3 + int(m[3])}_{int(m[2] == 'attentions')}_{_suffix(m[2], m[4])}",
    ),
    (
        r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)",
        lambda m: f"middle_block_{1 if m[1] == 'attentions' else int(m[2]) * 2}_{_suffix(m[1], m[3])}",
    ),
    (
        r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
        lambda m: f"output_blocks_{int(m[1]) * 3 + int(m[3])}_{int(m[2] == 'attentions')}_{_suffix(m[2], m[4])}",
    ),
    (r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", lambda m: f"input_blocks_{3 + int(m[1]) * 3}_0_op"),
    (
        r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv",
        lambda m: f"output_blocks_{2 + int(m[1]) * 3}_{2 if int(m[1]) else 1}_conv",
    ),
)
"""The rules of A1111's `convert_diffusers_name_to_compvis` (extensions-builtin/Lora/networks.py)."""


def _suffix(kind: str, name: str) -> str:
    return _A1111_LAYERS.get(kind, {}).get(name, name)


def test_a1111_finds_every_layer_of_the_full_size_unet_but_one_upsampler(full_size: dict[str, torch.nn.Module]) -> None:
    unet, spec = full_size["denoiser"], sdxl.SPEC
    layers = adapted(unet, (*spec.targets["all-linear"], *spec.conv_targets))
    originals = {sdxl_unet_name(f"{path}.weight").removesuffix(".weight").replace(".", "_") for path in layers}
    lost = []
    for path in layers:
        name = str(sdxl.export_name("kohya", "denoiser", path))
        found = next(rule(match) for pattern, rule in _A1111 if (match := re.fullmatch(pattern, name)))
        if found not in originals:
            lost.append(path)
    assert lost == ["up_blocks.0.upsamplers.0.conv"]
    assert sum(parameter.numel() for parameter in unet.parameters()) == spec.denoiser_parameters
    linear, convolutions = adapted(unet, spec.targets["attention-mlp"]), adapted(unet, spec.conv_targets)
    # 11 blocks of 70 transformer layers: 2 x 4 of attention and 2 of feed-forward each, and proj_in and proj_out.
    assert len(linear) == 70 * 10 + 11 * 2
    assert all(isinstance(layer, torch.nn.Linear) for layer in linear.values())
    assert len(convolutions) == 17 * 3 + 11 + 2 + 2


def test_comfyui_finds_every_layer_of_the_full_size_model(full_size: dict[str, torch.nn.Module]) -> None:
    """By its rules (comfy/utils.py unet_to_diffusers, comfy/lora.py model_lora_keys_clip), written out here."""
    layer = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    layer += ["ff.net.0.proj", "ff.net.2"]
    residual = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
    known = {f"down_blocks.{x}.downsamplers.0.conv" for x in range(3)} | {"conv_in", "conv_out"}
    known |= {f"up_blocks.{x}.upsamplers.0.conv" for x in range(3)}
    blocks = [(f"down_blocks.{x}", 2, (0, 2, 10)[x]) for x in range(3)] + [("mid_block", 2, 10)]
    blocks += [(f"up_blocks.{x}", 3, (10, 2, 0)[x]) for x in range(3)]
    for block, count, depth in blocks:
        known |= {f"{block}.resnets.{i}.{part}" for i in range(count) for part in residual}
        for i in range(count if depth else 0):
            known |= {f"{block}.attentions.{i}.{part}" for part in ("proj_in", "proj_out")}
            known |= {f"{block}.attentions.{i}.transformer_blocks.{t}.{part}" for t in range(depth) for part in layer}
    accepted = {"lora_unet_" + name.replace(".", "_") for name in known}
    clip = ("mlp_fc1", "mlp_fc2", *(f"self_attn_{part}" for part in ("k_proj", "q_proj", "v_proj", "out_proj")))
    for number, count in ((1, 12), (2, 32)):
        accepted |= {f"lora_te{number}_text_model_encoder_layers_{b}_{c}" for b in range(count) for c in clip}
    spec = sdxl.SPEC
    names = set()
    for part, network in full_size.items():
        suffixes = spec.text_encoder_targets if part != "denoiser" else ()
        suffixes = suffixes or (*spec.targets["all-linear"], *spec.conv_targets)
        names |= {str(sdxl.export_name("kohya", part, path)) for path in adapted(network, suffixes)}
    assert names <= accepted
    assert {name.split("_text")[0] for name in names if name.startswith("lora_te")} == {"lora_te1", "lora_te2"}


@pytest.mark.parametrize("layout", ["kohya", pytest.param("diffusers", marks=pytest.mark.campaign)])
def test_diffusers_applies_a_lora_with_the_exported_names_to_every_layer(
    layout: str, folder: Path, tmp_path: Path
) -> None:
    family, pipeline = load(locate_base(str(folder))), pipeline_of(folder)
    spec = sdxl.SPEC
    down, up = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    networks = {"denoiser": family.denoiser, **family.text_encoders}
    weights: dict[str, torch.Tensor] = {}
    paths: dict[str, set[str]] = {}
    for part, network in networks.items():
        suffixes = spec.targets["attention-mlp"] if part == "denoiser" else spec.text_encoder_targets
        for path, layer in adapted(network, suffixes).items():
            name = sdxl.export_name(layout, part, path)
            weights[f"{name}.{down}.weight"] = torch.randn(2, layer.in_features)  # type: ignore[arg-type]
            weights[f"{name}.{up}.weight"] = torch.randn(layer.out_features, 2)  # type: ignore[arg-type]
            if layout == "kohya":
                weights[f"{name}.alpha"] = torch.tensor(2.0)
            paths.setdefault(part, set()).add(path)
    save_file(weights, tmp_path / "lora.safetensors")
    pipeline.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="mine")
    sdxl.load_lora(tmp_path / "lora.safetensors", networks)
    for part, network in networks.items():
        other = pipeline.unet if part == "denoiser" else getattr(pipeline, part)
        for loaded in (network, other):
            found = {name.removesuffix(".lora_A") for name, _ in loaded.named_modules() if name.endswith(".lora_A")}
            assert found == paths[part]


def test_names_exist_for_the_layouts_and_parts_of_this_family_alone() -> None:
    encoder = "encoder.layers.0.self_attn.q_proj"
    assert sdxl.export_name("kohya", "text_encoder", encoder) == "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    second = f"text_model.{encoder}"
    assert sdxl.export_name("kohya", "text_encoder_2", second).startswith("lora_te2_text_model_encoder_layers_0_")
    assert sdxl.export_name("diffusers", "text_encoder_2", second) == f"text_encoder_2.{second}"
    assert sdxl.export_name("kohya", "text_encoder_2", "text_projection") == "lora_te2_text_projection"
    with pytest.raises(ExportError, match="no kohya name for text_encoder_3"):
        sdxl.export_name("kohya", "text_encoder_3", encoder)
