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
from safetensors.torch import load_file, save_file

from lorasmith.engine.adapters import attach_adapter
from lorasmith.engine.config import AdapterSettings, ObjectiveSettings
from lorasmith.engine.errors import BaseModelError, ExportError
from lorasmith.engine.families import DrawSettings, Family, PictureRequest, families, identify_base, sdxl
from lorasmith.engine.objectives import build_objective
from lorasmith.engine.sources import BaseFiles, locate_base
from tests import split_files
from tests.tiny_sdxl import FIRST, SECOND, build_tiny_sdxl
from tests.tiny_sdxl_files import TinyFiles, build_tiny_files, sdxl_unet_name

CPU = torch.device("cpu")
PARTS = ("denoiser", "text_encoder", "text_encoder_2")


def load(files: BaseFiles, dtype: torch.dtype = torch.float32) -> Family:
    module, identity = identify_base(files)
    return module.load(files, identity, CPU, dtype)


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


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand((2, 3, height, width), generator=torch.Generator().manual_seed(2)) * 2 - 1


def predicted(family: Family) -> torch.Tensor:
    with torch.no_grad():
        conditioning = family.collate(family.encode_prompts(["a red circle"]))
        return family.predict(noise(1, 4, 8, 8), torch.tensor([700]), conditioning)


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


def drawn(family: Family, negative: str) -> np.ndarray[Any, Any]:
    wanted, unwanted = family.encode_prompts(["a red circle", negative])
    (picture,) = family.draw([PictureRequest(wanted, unwanted, 7)], DrawSettings(3, 4.0, 64, 128))
    return np.asarray(picture).astype(int)


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
    """The real networks without weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        first = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12))
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)
        )
    return {"denoiser": unet, "text_encoder": first, "text_encoder_2": second}


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


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
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


# --- files -------------------------------------------------------------------------------------------------------


def same_weights(own: Family, other: Family) -> None:
    for part in PARTS:
        ours = own.denoiser if part == "denoiser" else own.text_encoders[part]
        theirs = other.denoiser if part == "denoiser" else other.text_encoders[part]
        found, expected = ours.state_dict(), theirs.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("layout", ["whole", "unet", "diffusers_unet"])
def test_every_layout_of_files_gives_the_folders_model(
    layout: str, files: TinyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(files.folder.parent))
    path = getattr(files, layout)
    located = BaseFiles("single_file", path, path.name)
    if layout != "whole":
        located = BaseFiles("single_file", path, path.name, files.vae, files.encoders)
    single, reference = load(located), load(locate_base(str(files.folder)))
    assert single.identity.parts_missing == ()
    assert single.identity.native_resolution == 1024
    assert single.identity.details["prompt_numbers"] == 77 * (FIRST + SECOND) + SECOND
    same_weights(single, reference)
    torch.testing.assert_close(single.encode_images(pixels()), reference.encode_images(pixels()))
    prompts = ["a red circle", "red"]
    for own, other in zip(single.encode_prompts(prompts), reference.encode_prompts(prompts), strict=True):
        assert all(torch.equal(own[key], other[key]) for key in other)
    torch.testing.assert_close(predicted(single), predicted(reference))
    if layout == "whole":
        assert np.abs(drawn(single, "") - drawn(reference, "")).max() <= 1


def test_parts_given_apart_replace_those_of_a_folder(files: TinyFiles, folder: Path, tmp_path: Path) -> None:
    other = build_tiny_sdxl(tmp_path / "other", seed=9)
    encoders = (other / "text_encoder" / "model.safetensors", other / "text_encoder_2" / "model.safetensors")
    vae = other / "vae" / "diffusion_pytorch_model.safetensors"
    mixed = load(BaseFiles("folder", folder, "base", vae, encoders))
    donor, base = load(locate_base(str(other))), load(locate_base(str(folder)))
    for part in ("text_encoder", "text_encoder_2"):
        expected = donor.text_encoders[part].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in mixed.text_encoders[part].state_dict().items())
    torch.testing.assert_close(mixed.encode_images(pixels()), donor.encode_images(pixels()))
    assert torch.equal(next(mixed.denoiser.parameters()), next(base.denoiser.parameters()))


def test_fp8_weights_are_scaled_back(files: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(files.folder.parent))
    stored, meant = split_files.in_fp8(load_file(files.unet))
    path = split_files.write(tmp_path / "fp8.safetensors", stored, "model.diffusion_model.")
    family = load(BaseFiles("single_file", path, path.name, files.vae, files.encoders))
    assert ", fp8, " in family.identity.label
    ours = family.denoiser.state_dict()["mid_block.attentions.0.proj_in.weight"]
    assert torch.equal(ours, meant["middle_block.1.proj_in.weight"])


def test_a_unet_alone_is_recognized_and_its_missing_parts_told_with_their_settings(files: TinyFiles) -> None:
    for encoders, missing in (
        ((), ("vae", "text_encoder", "text_encoder_2")),
        (files.encoders, ("vae",)),
    ):
        located = BaseFiles("single_file", files.unet, "unet.safetensors", None, encoders)
        module, identity = identify_base(located)
        assert identity.parts_missing == missing
        with pytest.raises(BaseModelError, match="has no vae") as caught:
            module.load(located, identity, CPU, torch.float32)
        assert "base.vae" in caught.value.fix


def test_a_damaged_or_foreign_part_is_refused_by_name(
    files: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(files.folder.parent))
    weights = load_file(files.unet)
    weights.pop("middle_block.2.in_layers.2.weight")
    path = split_files.write(tmp_path / "broken.safetensors", weights)
    with pytest.raises(BaseModelError, match="does not fit its kind of model") as caught:
        load(BaseFiles("single_file", path, path.name, files.vae, files.encoders))
    assert "mid_block.resnets.1.conv1.weight" in caught.value.why


# --- what files are ----------------------------------------------------------------------------------------------


def full_header(full_size: dict[str, torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    return {
        f"model.diffusion_model.{sdxl_unet_name(name)}": tuple(value.shape)
        for name, value in full_size["denoiser"].state_dict().items()
    }


def test_a_full_size_file_is_recognized_with_what_it_says_of_its_prediction(
    full_size: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    shapes = full_header(full_size)
    cases: tuple[tuple[str, dict[str, Any], dict[str, str], str], ...] = (
        ("sdxl", {}, {}, "Stable Diffusion XL, epsilon, bf16, 2.57 B"),
        ("a", {"v_pred": (0,), "ztsnr": (0,)}, {}, "v-prediction with zero-terminal SNR, "),
        ("a", {}, {"modelspec.prediction_type": "v"}, ", v-prediction, "),
        ("vpred", {}, {"modelspec.prediction_type": "epsilon"}, ", epsilon, "),
        ("NoobAI-XL-Vpred", {}, {}, "v-prediction with zero-terminal SNR (guessed from its name)"),
        ("ponyDiffusionV6XL", {}, {}, "XL, perhaps Pony by its name, epsilon"),
        ("a", {}, {"modelspec.title": "Illustrious v2"}, "perhaps Illustrious by its name"),
        ("sdxl_lightning_4step", {}, {}, "perhaps distilled to few steps by its name"),
    )
    for name, more, metadata, words in cases:
        path = split_files.header(tmp_path / f"{name}.safetensors", {**shapes, **more}, metadata)
        identity = sdxl.identify(locate_base(str(path)))
        assert identity is not None
        assert words in identity.label
        assert identity.prediction == ("v_prediction" if "v-prediction" in identity.label else "epsilon")
        assert identity.details["zero_snr"] == ("zero-terminal" in identity.label)
        assert identity.variant == "base"


def test_zero_snr_reaches_the_noise_schedule(files: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(files.folder.parent))
    weights = load_file(files.whole) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    path = split_files.write(tmp_path / "v.safetensors", weights)
    schedule = load(locate_base(str(path))).noise_schedule
    assert (schedule["prediction_type"], schedule["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert schedule["timestep_spacing"] == "trailing"


def test_relatives_that_are_trained_in_another_way_are_not_taken_for_it(
    full_size: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    shapes = full_header(full_size)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    inpainting = split_files.header(tmp_path / "inpainting.safetensors", {**shapes, first: (320, 9, 3, 3)})
    refiner = {name: shape for name, shape in shapes.items() if ".1.transformer_blocks" not in name}
    refiner |= {"model.diffusion_model.input_blocks.9.0.op.weight": (8, 8, 3, 3)}
    refiner_file = split_files.header(tmp_path / "refiner.safetensors", refiner)
    for path in (inpainting, refiner_file):
        assert [name for name, module in families().items() if module.identify(locate_base(str(path)))] == []
    edm = split_files.header(tmp_path / "playground.safetensors", {**shapes, "edm_mean": (4,)})
    with pytest.raises(BaseModelError, match="noise of EDM, which lorasmith cannot train"):
        identify_base(locate_base(str(edm)))


def test_no_other_family_takes_it_and_it_takes_no_other(files: TinyFiles, folder: Path) -> None:
    for path in (folder, files.whole, files.unet):
        located = locate_base(str(path))
        assert [name for name, module in families().items() if module.identify(located)] == ["sdxl"]


def test_a_folder_tells_its_scheduler_license_and_pipeline(folder: Path, zero_snr: Path, tmp_path: Path) -> None:
    _, velocity = identify_base(locate_base(str(zero_snr)))
    assert "v-prediction with zero-terminal SNR, fp32" in velocity.label
    base = shutil.copytree(folder, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: fair-ai-public-license-1.0-sd\n---\n")
    assert identify_base(locate_base(str(base)))[1].details["license"] == "fair-ai-public-license-1.0-sd"
    scheduler = base / "scheduler" / "scheduler_config.json"
    stored = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(stored | {"_class_name": "EDMDPMSolverMultistepScheduler"}))
    with pytest.raises(BaseModelError, match="which lorasmith cannot train"):
        identify_base(locate_base(str(base)))
    index = base / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": [None, None]}))
    assert sdxl.identify(locate_base(str(base))) is None
