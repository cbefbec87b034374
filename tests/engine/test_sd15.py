"""Stable Diffusion 1.x and 2.x: folders and single files, epsilon and v-prediction, and names that others read."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import DrawSettings, Family, PictureRequest, identify_base, sd15
from lorasmith.engine.sources import locate_base
from tests.tiny import build_tiny_sd15
from tests.tiny_ldm import _unet_name, build_tiny_checkpoint

CPU = torch.device("cpu")
SETTINGS = DrawSettings(steps=3, guidance=4.0, height=64, width=64)


def _load(path: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Family:
    files = locate_base(str(path))
    module, identity = identify_base(files)
    return module.load(files, dataclasses.replace(identity, **changes), CPU, dtype)


def _draw(family: Family) -> np.ndarray[Any, Any]:
    positive, negative = family.encode_prompts(["a red circle", ""])
    (picture,) = family.draw([PictureRequest(positive, negative, 7)], SETTINGS)
    return np.asarray(picture).astype(int)


def _offer_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (folder / "clip").exists():
        (folder / "clip").symlink_to(folder / "tokenizer")
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(folder))


@pytest.fixture(scope="module", params=["1.x", "2.x"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(version: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("ldm"), version)


def test_pictures_are_those_of_the_diffusers_pipeline(tiny_sd15: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    (expected,) = pipeline(
        "a red circle",
        num_inference_steps=3,
        guidance_scale=4.0,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(7),
    ).images
    assert np.abs(_draw(_load(tiny_sd15)) - np.asarray(expected)).max() <= 1


def test_latents_and_embeddings_are_those_of_the_diffusers_parts(tiny_sd15: Path) -> None:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    family = _load(tiny_sd15)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    vae = AutoencoderKL.from_pretrained(tiny_sd15 / "vae")
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(family.encode_images(pixels), expected)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd15 / "tokenizer")
    ids = tokenizer(["red"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        embeds = CLIPTextModel.from_pretrained(tiny_sd15 / "text_encoder")(ids).last_hidden_state
    torch.testing.assert_close(family.encode_prompts(["red"])[0]["prompt_embeds"], embeds[0])


def test_the_prediction_is_that_of_the_diffusers_unet(tiny_sd15: Path) -> None:
    from diffusers import UNet2DConditionModel

    family = _load(tiny_sd15)
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    conditioning = family.collate(family.encode_prompts(["red", "blue"]))
    unet = UNet2DConditionModel.from_pretrained(tiny_sd15 / "unet")
    with torch.no_grad():
        expected = unet(noisy, timesteps, encoder_hidden_states=conditioning["prompt_embeds"]).sample
    torch.testing.assert_close(family.predict(noisy, timesteps, conditioning), expected)


def test_a_folder_is_known_with_its_prediction_and_native_resolution(tiny_sd15: Path, tiny_sd15_v: Path) -> None:
    _, plain = identify_base(locate_base(str(tiny_sd15)))
    _, velocity = identify_base(locate_base(str(tiny_sd15_v)))
    assert (plain.prediction, plain.native_resolution) == ("epsilon", 64)
    assert velocity.prediction == "v_prediction"
    assert "v-prediction" in velocity.label


def test_the_license_of_a_folder_is_that_of_its_model_card(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd15, folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    licenses = [identify_base(locate_base(str(path)))[1].details["license"] for path in (tiny_sd15, folder)]
    assert licenses == ["", "apache-2.0"]


def test_zero_terminal_snr_and_the_rest_of_the_schedule_are_kept(tiny_sd15_v: Path) -> None:
    stored = json.loads((tiny_sd15_v / "scheduler" / "scheduler_config.json").read_text())
    assert dict(_load(tiny_sd15_v).noise_schedule) == stored
    assert stored["rescale_betas_zero_snr"] is True


def test_the_autoencoder_stays_in_fp32_when_the_rest_is_fp16(tiny_sd15: Path) -> None:
    family = _load(tiny_sd15, torch.float16)
    latents = family.encode_images(torch.full((1, 3, 64, 64), 0.5))
    assert latents.dtype == torch.float16
    reference = _load(tiny_sd15).encode_images(torch.full((1, 3, 64, 64), 0.5))
    assert torch.equal(latents, reference.half())


def test_weights_stored_as_the_fp16_variant_are_found(tiny_sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd15, tmp_path / "base")
    for path in [*(tmp_path / "base").glob("*/*.safetensors")]:
        save_file(load_file(path), path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        path.unlink()
    assert np.array_equal(_draw(_load(tmp_path / "base")), _draw(_load(tiny_sd15)))


def test_a_folder_with_a_missing_weight_is_refused_instead_of_filled_with_noise(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        base = tmp_path / part.partition("/")[0]
        shutil.copytree(tiny_sd15, base)
        path = base / f"{part}.safetensors"
        weights = load_file(path)
        weights.pop(sorted(weights)[-1])
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(BaseModelError, match=f"The {path.parent.name} of .* does not fit its configuration"):
            _load(base)


def test_other_pipelines_in_a_folder_are_not_taken_for_stable_diffusion(tiny_sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd15, tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    with pytest.raises(BaseModelError, match="names the pipeline StableDiffusionXLPipeline"):
        identify_base(locate_base(str(tmp_path / "base")))


def test_an_inpainting_folder_is_not_taken_for_text_to_image(tiny_sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd15, tmp_path / "base")
    path = tmp_path / "base" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_channels": 9}))
    assert sd15.identify(locate_base(str(tmp_path / "base"))) is None


def test_a_denoiser_that_predicts_the_picture_is_refused_by_name(tmp_path: Path) -> None:
    base = build_tiny_sd15(tmp_path / "base", "sample")
    with pytest.raises(BaseModelError, match="predicts sample, which lorasmith cannot train"):
        identify_base(locate_base(str(base)))


def test_a_single_file_gives_the_same_weights_and_pictures_as_its_folder(
    checkpoint: tuple[Path, Path], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = checkpoint
    _offer_tokenizer(folder, monkeypatch)
    single, reference = _load(file), _load(folder)
    assert single.identity.variant == version
    assert single.identity.native_resolution == 512
    assert single.identity.parameters == reference.identity.parameters
    expected = reference.denoiser.state_dict()
    found = single.denoiser.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    latents = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(single.encode_images(latents), reference.encode_images(latents))
    ours, theirs = single.encode_prompts(["a red circle"]), reference.encode_prompts(["a red circle"])
    torch.testing.assert_close(ours[0]["prompt_embeds"], theirs[0]["prompt_embeds"])
    assert np.abs(_draw(single) - _draw(reference)).max() <= 1
    single.release_encoders()
    assert single.text_encoders == {}


def test_a_single_file_without_a_tokenizer_on_the_machine_tells_the_command_that_fetches_it(
    checkpoint: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.delenv("LORASMITH_TOKENIZERS", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseModelError) as caught:
        sd15.load_tokenizers(locate_base(str(checkpoint[1])))
    assert "hf download openai/clip-vit-large-patch14" in caught.value.fix


def test_the_prediction_of_a_2x_file_is_told_by_its_metadata_or_guessed_from_one_bias(tmp_path: Path) -> None:
    _, file = build_tiny_checkpoint(tmp_path, "2.x")
    weights = load_file(file)
    bias = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    cases = (
        (0.05, {}, "epsilon", 512),
        (0.2, {}, "v_prediction", 768),
        (0.2, {"modelspec.prediction_type": "epsilon"}, "epsilon", 512),
        (0.05, {"modelspec.prediction_type": "v"}, "v_prediction", 768),
    )
    for spread, metadata, prediction, side in cases:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            values = torch.full((32,), spread)
            values[::2] *= -1
            save_file({**weights, bias: values.to(dtype)}, file, metadata=metadata or None)
            identity = sd15.identify(locate_base(str(file)))
            assert identity is not None
            assert (identity.prediction, identity.native_resolution) == (prediction, side)
            assert ("guessed" in identity.label) == (not metadata)


def test_a_file_without_autoencoder_is_recognized_and_refused_by_the_missing_part(
    checkpoint: tuple[Path, Path], tmp_path: Path
) -> None:
    weights = {name: value for name, value in load_file(checkpoint[1]).items() if not name.startswith("first_stage")}
    save_file(weights, tmp_path / "pruned.safetensors")
    with pytest.raises(BaseModelError, match=r"pruned\.safetensors has no vae"):
        _load(tmp_path / "pruned.safetensors")


def test_a_file_that_lacks_one_weight_is_refused_and_the_weight_named(
    checkpoint: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _offer_tokenizer(checkpoint[0], monkeypatch)
    weights = load_file(checkpoint[1])
    weights.pop("model.diffusion_model.middle_block.2.in_layers.2.weight")
    save_file(weights, tmp_path / "broken.safetensors")
    with pytest.raises(BaseModelError, match="does not fit its kind of model") as caught:
        _load(tmp_path / "broken.safetensors")
    assert "mid_block.resnets.1.conv1.weight" in caught.value.why


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"conditioner.embedders.1.model.ln_final.bias": (8,)}, "an SDXL checkpoint"),
        ({"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "a FLUX transformer"),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (8, 8)}, "a FLUX transformer"),
        ({"model.diffusion_model.joint_blocks.0.x.weight": (8, 8)}, "a Stable Diffusion 3 checkpoint"),
        ({"unet.mid_block.attn.to_q.lora_A.weight": (4, 8)}, "a LoRA, not a base model"),
        ({"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)}, "a ControlNet, not a base model"),
        ({"down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "a UNet in the diffusers layout"),
        ({"emb_params": (1, 768)}, "a textual inversion embedding"),
        ({"first_stage_model.decoder.mid.block_1.conv1.weight": (8, 8, 3, 3)}, "an autoencoder"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)}, "made for inpainting"),
        ({"something.else": (3,)}, "unknown names, such as something.else"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(
    names: dict[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, path)
    with pytest.raises(BaseModelError, match=words):
        identify_base(locate_base(str(path)))


def test_exported_names_are_those_that_other_programs_read() -> None:
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    encoder = "encoder.layers.0.self_attn.q_proj"
    assert sd15.export_name("kohya", "denoiser", attention) == (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    )
    assert sd15.export_name("kohya", "text_encoder", encoder) == "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert sd15.export_name("diffusers", "denoiser", attention) == f"unet.{attention}"
    assert sd15.export_name("diffusers", "text_encoder", encoder) == f"text_encoder.text_model.{encoder}"


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_diffusers_applies_a_lora_with_the_exported_names_to_every_layer(
    layout: str, tiny_sd15: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, local_files_only=True)
    family = _load(tiny_sd15)
    down, up = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    weights: dict[str, torch.Tensor] = {}
    layers = {"denoiser": sd15.SPEC.targets["attention-mlp"], "text_encoder": sd15.SPEC.text_encoder_targets}
    for component, suffixes in layers.items():
        network = family.denoiser if component == "denoiser" else family.text_encoders["text_encoder"]
        for path, layer in network.named_modules():
            if path.endswith(suffixes) and isinstance(layer, torch.nn.Linear):
                name = sd15.export_name(layout, component, path)
                weights[f"{name}.{down}.weight"] = torch.randn(2, layer.in_features)
                weights[f"{name}.{up}.weight"] = torch.randn(layer.out_features, 2)
                if layout == "kohya":
                    weights[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(weights, tmp_path / "lora.safetensors")
    pipeline.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="mine")
    loaded = {
        component: sum(name.endswith("lora_A") for name, _ in getattr(pipeline, component).named_modules())
        for component in ("unet", "text_encoder")
    }
    assert loaded["unet"] + loaded["text_encoder"] == sum(name.endswith(f"{down}.weight") for name in weights)
    assert loaded["text_encoder"] == 2 * len(sd15.SPEC.text_encoder_targets)


def test_prompts_cannot_be_encoded_to_nothing(tiny_sd15: Path) -> None:
    assert _load(tiny_sd15).encode_prompts([]) == []


def test_a_full_size_checkpoint_is_recognized_from_its_header_alone(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8
        )
    shapes = {
        f"model.diffusion_model.{_unet_name(name)}": tuple(value.shape) for name, value in unet.state_dict().items()
    }
    shapes |= {"first_stage_model.quant_conv.bias": (8,), "cond_stage_model.transformer.text_model.x": (768,)}
    path = tmp_path / "v1-5.safetensors"
    _write_sparse(path, shapes)
    _, identity = identify_base(locate_base(str(path)))
    assert identity.label == "Stable Diffusion 1.x, epsilon, fp16, 0.86 B"
    assert identity.parameters == sd15.SPEC.denoiser_parameters
    assert identity.native_resolution == 512


def _write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a true header and a hole in place of the weights."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
