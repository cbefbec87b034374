"""FLUX.2: what its scripts compute, the names that readers accept, and the files that people have."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorasmith.engine.adapters import attach_adapter
from lorasmith.engine.config import AdapterSettings, ObjectiveSettings
from lorasmith.engine.errors import BaseModelError, ExportError
from lorasmith.engine.families import (
    DrawSettings,
    Family,
    FusedName,
    PictureRequest,
    flux2,
    identify_base,
    usual_drawing,
)
from lorasmith.engine.objectives import build_objective
from lorasmith.engine.sources import BaseFiles, locate_base
from tests import split_files
from tests.tiny_flux2 import autoencoder, build_tiny_flux2, build_tiny_flux2_dev

CPU = torch.device("cpu")
REAL = {
    "klein-4b": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    "klein-9b": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    "dev": {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360},
}
"""The sizes of black-forest-labs/flux2, src/flux2/model.py."""


def load(files: BaseFiles, dtype: torch.dtype = torch.float32) -> Family:
    module, identity = identify_base(files)
    return module.load(files, identity, CPU, dtype)


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_flux2(tmp_path_factory.mktemp("flux2") / "klein")


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_flux2_dev(tmp_path_factory.mktemp("flux2") / "dev")


@pytest.fixture(scope="module")
def family(klein: Path) -> Family:
    return load(locate_base(str(klein)))


@pytest.fixture(scope="module")
def dev_family(dev: Path) -> Family:
    return load(locate_base(str(dev)))


@pytest.fixture(scope="module")
def pipeline(klein: Path) -> Any:
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(klein, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def dev_pipeline(dev: Path) -> Any:
    """The pipeline of dev with the whole text encoder, from its parts: its processor would need torchvision."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
    from transformers import Mistral3ForConditionalGeneration

    from lorasmith.engine.families import _encoder_mistral as mistral

    pipe = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(dev, subfolder="scheduler"),
        vae=AutoencoderKLFlux2.from_pretrained(dev, subfolder="vae"),
        text_encoder=Mistral3ForConditionalGeneration.from_pretrained(dev / "text_encoder").eval(),
        tokenizer=mistral.load_tokenizer(dev / "tokenizer"),
        transformer=Flux2Transformer2DModel.from_pretrained(dev, subfolder="transformer"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def predicted(family: Family) -> torch.Tensor:
    noisy = torch.randn((1, 128, 4, 4), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        conditioning = family.collate(family.encode_prompts(["a red circle"]))
        return family.predict(noisy, torch.tensor([700.0]), conditioning)


# --- what the reference computes ---------------------------------------------------------------------------------


def test_prompts_are_the_pipelines_though_the_last_layers_are_not_loaded(family: Family, pipeline: Any) -> None:
    expected, _ = pipeline.encode_prompt(["a red circle", ""])
    for own, other in zip(family.encode_prompts(["a red circle", ""]), expected, strict=True):
        torch.testing.assert_close(own["prompt_embeds"], other, rtol=1e-5, atol=1e-5)
    assert len(family.text_encoders["text_encoder"].layers) == 27 < len(pipeline.text_encoder.model.layers)


def test_devs_prompts_are_the_pipelines_padded_before_the_words(dev_family: Family, dev_pipeline: Any) -> None:
    expected, _ = dev_pipeline.encode_prompt(["a red circle", ""])
    for own, other in zip(dev_family.encode_prompts(["a red circle", ""]), expected, strict=True):
        torch.testing.assert_close(own["prompt_embeds"], other, rtol=1e-5, atol=1e-5)
    (tokenizer,) = flux2.load_tokenizers(locate_base(dev_family.files.origin))  # type: ignore[attr-defined]
    chat = [{"role": "system", "content": [{"type": "text", "text": "be"}]}, {"role": "user", "content": "red"}]
    ids = tokenizer.apply_chat_template(chat, padding="max_length", max_length=20, return_dict=True)["input_ids"]
    assert (
        tokenizer.decode(ids).replace(" ", "") == "<pad>" * 10 + "<s>[SYSTEM_PROMPT]be[/SYSTEM_PROMPT][INST]red[/INST]"
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_of_the_diffusers_pipeline(family: Family, pipeline: Any, guidance: float) -> None:
    negative = pipeline.encode_prompt(["a blue square"])[0]
    (expected,) = pipeline(
        prompt=["a red circle"],
        negative_prompt_embeds=negative,
        num_inference_steps=3,
        guidance_scale=guidance,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(7)],
    ).images
    assert_same_picture(family, guidance, expected)


def test_devs_guidance_is_told_to_the_transformer(dev_family: Family, dev_pipeline: Any) -> None:
    (expected,) = dev_pipeline(
        prompt=["a red circle"],
        num_inference_steps=3,
        guidance_scale=2.5,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(7)],
    ).images
    assert_same_picture(dev_family, 2.5, expected)
    first = predicted(dev_family)
    dev_family.guidance = 3.5
    assert not torch.equal(predicted(dev_family), first)
    dev_family.guidance = 1.0


def assert_same_picture(family: Family, guidance: float, expected: Any) -> None:
    positive, negative = family.encode_prompts(["a red circle", "a blue square"])
    (picture,) = family.draw([PictureRequest(positive, negative, 7)], DrawSettings(3, guidance, 64, 64))
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_a_picture_comes_back_from_its_latents(family: Family) -> None:
    """What the autoencoder decodes is the same whether the latents were normalized in between or not."""
    vae = autoencoder()
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        plain = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        latents = family.latents_of(vae, pixels)  # type: ignore[attr-defined]
        torch.testing.assert_close(family.pixels_of(vae, latents), plain)  # type: ignore[attr-defined]


@pytest.mark.parametrize("line", ["klein", "dev"])
def test_loss_and_gradients_are_those_of_the_reference_script(request: pytest.FixtureRequest, line: str) -> None:
    from diffusers import AutoencoderKLFlux2
    from diffusers import Flux2Pipeline as Script

    folder = request.getfixturevalue(line)
    family = load(locate_base(str(folder)))
    family.guidance = 3.5
    adapter = attach_adapter(family, AdapterSettings(rank=4, alpha=2.0, targets="attention-mlp"), seed=1)
    for index, module in enumerate(adapter.modules):
        torch.nn.init.normal_(module.up, std=0.1, generator=torch.Generator().manual_seed(index))
    pixels = torch.rand((2, 3, 64, 32), generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents, level = family.encode_images(pixels), 0.3
    batch = build_objective(family, ObjectiveSettings(), seed=0).at(latents, level, [5, 6])
    embeds = [item["prompt_embeds"] for item in family.encode_prompts(["a red circle", "a much longer prompt"])]
    conditioning = family.collate([{"prompt_embeds": item} for item in embeds])
    objective = build_objective(family, ObjectiveSettings(), seed=0)
    loss = objective.loss(family.predict(batch.noisy, batch.timesteps, conditioning), batch)
    loss.backward()
    parameters = [tensor for module in adapter.modules for tensor in module.tensors.values()]
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters)
    for parameter in parameters:
        parameter.grad = None

    # train_dreambooth_lora_flux2(_klein).py: patches, then the batch norm; noise by sigma; t / 1000; guidance only for
    # a transformer that embeds it; the answer is cut to the picture's tokens and laid out by their places.
    vae = AutoencoderKLFlux2.from_pretrained(folder, subfolder="vae")
    with torch.no_grad():
        clean = Script._patchify_latents(vae.encode(pixels).latent_dist.mode())
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        clean = (clean - mean) / torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    noise = batch.target + latents.float()
    noisy = (1.0 - level) * clean + level * noise
    packed, ids = Script._pack_latents(noisy), Script._prepare_latent_ids(noisy)
    text = torch.stack(embeds)
    answer = family.denoiser(
        hidden_states=packed,
        timestep=torch.full((2,), level * 1000.0) / 1000,
        guidance=torch.full((2,), 3.5) if family.denoiser.config.guidance_embeds else None,
        encoder_hidden_states=text,
        txt_ids=Script._prepare_text_ids(text),
        img_ids=ids,
        return_dict=False,
    )[0]
    answer = Script._unpack_latents_with_ids(answer[:, : packed.size(1), :], ids)
    reference = torch.nn.functional.mse_loss(answer.float(), noise - clean)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-5)


# --- names that readers accept -----------------------------------------------------------------------------------


def real(name: str) -> Any:
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        return Flux2Transformer2DModel(**REAL[name], guidance_embeds=name == "dev")


@pytest.fixture(scope="module")
def full_size() -> dict[str, torch.nn.Linear]:
    """The linear layers of the real klein 4B, without weights."""
    network = real("klein-4b")
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}


def wanted(layers: Mapping[str, torch.nn.Linear], targets: str) -> list[str]:
    ends = tuple(f".{suffix}" for suffix in flux2.SPEC.targets[targets])
    return [path for path in layers if f".{path}".endswith(ends)]


def test_the_real_model_has_as_many_weights_as_the_spec_says() -> None:
    network = real("klein-4b")
    assert sum(parameter.numel() for parameter in network.parameters()) == flux2.SPEC.denoiser_parameters


def test_target_presets_of_the_real_model(full_size: Mapping[str, torch.nn.Linear]) -> None:
    double, single = 5, 20
    in_blocks = {path for path in full_size if "transformer_blocks." in path}
    assert set(wanted(full_size, "attention-mlp")) == in_blocks
    sizes = {name: len(wanted(full_size, name)) for name in flux2.SPEC.targets}
    assert sizes["attention"] == 8 * double + 2 * single
    assert sizes["attention-mlp"] == sizes["kohya"] == sizes["ai-toolkit"] == 12 * double + 2 * single
    assert sizes["all-linear"] == sizes["attention-mlp"] + 3
    # train_dreambooth_lora_flux2_klein.py: its default targets and the single blocks' to_out.
    assert sizes["diffusers"] == 4 * double + 2 * single


def comfyui_accepts(layout: str) -> dict[str, tuple[int, ...]]:
    """The names that ComfyUI maps to weights of klein 4B, with the shapes of those weights.

    comfy/lora.py: `diffusion_model.` and `lora_unet_` before every original name, `transformer.` before those of
    flux_to_diffusers in comfy/utils.py. The original names and shapes: black-forest-labs/flux2, src/flux2/model.py.
    """
    d, mlp = 3072, 9216
    own: dict[str, tuple[int, ...]] = {"img_in": (d, 128), "txt_in": (d, 7680), "final_layer.linear": (128, d)}
    mapped = {"x_embedder": (d, 128), "context_embedder": (d, 7680), "proj_out": (128, d)}
    for block in range(5):
        for stream, names in (("img", ("to_q", "to_k", "to_v", "to_out.0")), ("txt", ("add_q_proj", "add_k_proj"))):
            own[f"double_blocks.{block}.{stream}_attn.qkv"] = (3 * d, d)
            own[f"double_blocks.{block}.{stream}_attn.proj"] = (d, d)
            own[f"double_blocks.{block}.{stream}_mlp.0"] = (2 * mlp, d)
            own[f"double_blocks.{block}.{stream}_mlp.2"] = (d, mlp)
            more = () if stream == "img" else ("add_v_proj", "to_add_out")
            mapped |= {f"transformer_blocks.{block}.attn.{name}": (d, d) for name in (*names, *more)}
            feed_forward = "ff" if stream == "img" else "ff_context"
            mapped[f"transformer_blocks.{block}.{feed_forward}.linear_in"] = (2 * mlp, d)
            mapped[f"transformer_blocks.{block}.{feed_forward}.linear_out"] = (d, mlp)
    for block in range(20):
        own[f"single_blocks.{block}.linear1"] = mapped[f"single_transformer_blocks.{block}.attn.to_qkv_mlp_proj"] = (
            3 * d + 2 * mlp,
            d,
        )
        own[f"single_blocks.{block}.linear2"] = mapped[f"single_transformer_blocks.{block}.attn.to_out"] = (d, d + mlp)
    if layout == "diffusers":
        return {f"transformer.{name}": shape for name, shape in mapped.items()}
    if layout == "comfyui":
        return {f"diffusion_model.{name}": shape for name, shape in own.items()}
    return {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in own.items()}


@pytest.mark.parametrize("layout", flux2.SPEC.layouts)
def test_comfyui_knows_every_target_by_its_name_and_shape(
    full_size: Mapping[str, torch.nn.Linear], layout: str
) -> None:
    names: dict[str, tuple[int, ...]] = {}
    for path in wanted(full_size, "all-linear"):
        name = flux2.export_name(layout, "denoiser", path)
        if isinstance(name, FusedName):
            assert path in name.rows
            shapes = [tuple(full_size[row].weight.shape) for row in name.rows]
            names[name.name] = (sum(shape[0] for shape in shapes), shapes[0][1])
        else:
            names[name] = tuple(full_size[path].weight.shape)
    assert names == comfyui_accepts(layout)


@pytest.mark.parametrize("layout", ["comfyui", "kohya"])
def test_diffusers_turns_the_original_names_into_the_layers_of_the_real_model(
    full_size: Mapping[str, torch.nn.Linear], layout: str
) -> None:
    from diffusers.loaders import lora_conversion_utils as conversion

    down, up = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    state: dict[str, torch.Tensor] = {}
    paths = wanted(full_size, "all-linear")
    numbers = {path: float(number) for number, path in enumerate(paths)}
    for path in paths:
        name = flux2.export_name(layout, "denoiser", path)
        rows = name.rows if isinstance(name, FusedName) else (path,)
        key = name.name if isinstance(name, FusedName) else name
        state[f"{key}.{down}.weight"] = torch.ones(1, 1)
        state[f"{key}.{up}.weight"] = torch.tensor([[numbers[row]] for row in rows])
    convert = (
        conversion._convert_kohya_flux2_lora_to_diffusers
        if layout == "kohya"
        else conversion._convert_non_diffusers_flux2_lora_to_diffusers
    )
    converted = convert(state)
    assert {f"transformer.{path}": number for path, number in numbers.items()} == {
        key.removesuffix(".lora_B.weight"): value.item() for key, value in converted.items() if "lora_B" in key
    }


def test_an_alpha_beside_the_original_names_is_an_error_in_diffusers(family: Family, tmp_path: Path) -> None:
    """Why `comfyui` files have their scale inside the weights."""
    key = "diffusion_model.single_blocks.0.linear2"
    weights = {
        f"{key}.lora_A.weight": torch.ones(2, 128),
        f"{key}.lora_B.weight": torch.ones(32, 2),
        f"{key}.alpha": torch.tensor(1.0),
    }
    with pytest.raises(ValueError, match="should be empty"):
        flux2.load_lora(split_files.write(tmp_path / "alpha.safetensors", weights), {"denoiser": family.denoiser})


def test_there_is_no_name_for_the_text_encoder() -> None:
    with pytest.raises(ExportError, match="no comfyui name for text_encoder"):
        flux2.export_name("comfyui", "text_encoder", "layers.0.self_attn.q_proj")


# --- files that people have --------------------------------------------------------------------------------------

_RENAMES = (
    (r"^transformer_blocks\.", "double_blocks."),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"(single_blocks\.\d+)\.attn\.to_qkv_mlp_proj\.", r"\1.linear1."),
    (r"(single_blocks\.\d+)\.attn\.to_out\.", r"\1.linear2."),
    (r"(single_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"(single_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
    (r"\.ff\.linear_in\.", ".img_mlp.0."),
    (r"\.ff\.linear_out\.", ".img_mlp.2."),
    (r"\.ff_context\.linear_in\.", ".txt_mlp.0."),
    (r"\.ff_context\.linear_out\.", ".txt_mlp.2."),
    (r"^x_embedder\.", "img_in."),
    (r"^context_embedder\.", "txt_in."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^time_guidance_embed\.timestep_embedder\.linear_1\.", "time_in.in_layer."),
    (r"^time_guidance_embed\.timestep_embedder\.linear_2\.", "time_in.out_layer."),
    (r"^time_guidance_embed\.guidance_embedder\.linear_1\.", "guidance_in.in_layer."),
    (r"^time_guidance_embed\.guidance_embedder\.linear_2\.", "guidance_in.out_layer."),
    (r"modulation(_img|_txt|)\.linear\.", r"modulation\1.lin."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
)


def original_transformer(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The transformer in the names of Black Forest Labs."""
    weights = split_files.fused(weights, ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.qkv")
    weights = split_files.fused(weights, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.qkv")
    for pattern, new in _RENAMES:
        weights = {re.sub(pattern, new, name): value for name, value in weights.items()}
    scale, shift = weights["final_layer.adaLN_modulation.1.weight"].chunk(2)
    return {**weights, "final_layer.adaLN_modulation.1.weight": torch.cat([shift, scale])}


def original_autoencoder(folder: Path) -> dict[str, Any]:
    """The autoencoder in the names of Black Forest Labs, whose quantizing layers sit inside encoder and decoder."""
    weights = split_files.original_autoencoder(folder)
    return {
        re.sub(
            r"^quant_conv", "encoder.quant_conv", re.sub(r"^post_quant_conv", "decoder.post_quant_conv", name)
        ): value
        for name, value in weights.items()
    }


@pytest.fixture(scope="module")
def parts(klein: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    """The files of klein base as ComfyUI's users have them."""
    place = tmp_path_factory.mktemp("split")
    transformer = original_transformer(split_files.part(klein, "transformer"))
    return BaseFiles(
        "single_file",
        split_files.write(place / "flux-2-klein-base-4b.safetensors", transformer),
        "flux-2-klein-base-4b.safetensors",
        vae_file=split_files.write(place / "flux2-vae.safetensors", original_autoencoder(klein)),
        encoder_files=(split_files.write(place / "qwen_3_4b.safetensors", split_files.part(klein, "text_encoder")),),
    )


@pytest.fixture(autouse=True)
def tokenizers(klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where single files find their tokenizer."""
    shutil.copytree(klein / "tokenizer", tmp_path / "tokenizers" / "qwen3")
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(tmp_path / "tokenizers"))


def test_split_files_give_what_the_folder_gives(parts: BaseFiles, family: Family) -> None:
    own = load(parts)
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(own.encode_images(pixels), family.encode_images(pixels))
    torch.testing.assert_close(predicted(own), predicted(family))
    assert own.noise_schedule["use_dynamic_shifting"] == family.noise_schedule["use_dynamic_shifting"]


def test_devs_files_give_what_the_folder_gives_and_carry_their_tokenizer(
    dev: Path, dev_family: Family, tmp_path: Path
) -> None:
    encoder = {
        name.replace("language_model.model.", "model."): value
        for name, value in split_files.part(dev, "text_encoder").items()
        if name.startswith("language_model.") and ".layers.30." not in name
    }
    encoder["tekken_model"] = torch.tensor(list(json.dumps(tekken(dev)).encode()), dtype=torch.uint8)
    transformer = original_transformer(split_files.part(dev, "transformer"))
    files = BaseFiles(
        "single_file",
        split_files.write(tmp_path / "flux2-dev.safetensors", transformer, "model.diffusion_model."),
        "flux2-dev.safetensors",
        vae_file=dev / "vae" / "diffusion_pytorch_model.safetensors",
        encoder_files=(split_files.write(tmp_path / "mistral_3_small_flux2_bf16.safetensors", encoder),),
    )
    own = load(files)
    assert own.identity.variant == "dev"
    torch.testing.assert_close(predicted(own), predicted(dev_family))


def tekken(folder: Path) -> dict[str, Any]:
    """The tokenizer of a folder as Mistral writes its own."""
    import base64

    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")).get_vocab()
    marks = sorted((word for word in vocabulary if len(word) > 1), key=vocabulary.__getitem__)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    of_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}
    letters = sorted((word for word in vocabulary if len(word) == 1), key=vocabulary.__getitem__)
    return {
        "config": {
            "pattern": r"\S+|\s+",
            "default_vocab_size": len(vocabulary),
            "default_num_special_tokens": len(marks),
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(bytes([of_letter[letter]])).decode()}
            for rank, letter in enumerate(letters)
        ],
        "special_tokens": [{"rank": rank, "token_str": word, "is_control": True} for rank, word in enumerate(marks)],
    }


def test_fp8_weights_are_scaled_back(parts: BaseFiles, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    stored, meant = split_files.in_fp8(load_file(parts.path))
    expected, quantized = (
        load(dataclasses.replace(parts, path=split_files.write(tmp_path / name, weights)))
        for name, weights in (("meant-base.safetensors", meant), ("flux-2-klein-base-4b-fp8.safetensors", stored))
    )
    assert "fp8" in quantized.identity.label
    torch.testing.assert_close(predicted(quantized), predicted(expected))


def test_the_transformer_in_diffusers_names_is_a_single_file_too(klein: Path, parts: BaseFiles, family: Family) -> None:
    path = klein / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.testing.assert_close(predicted(load(dataclasses.replace(parts, path=path))), predicted(family))


def test_a_folder_takes_parts_from_files_given_apart(klein: Path, parts: BaseFiles, family: Family) -> None:
    files = dataclasses.replace(parts, kind="folder", path=klein, origin=str(klein))
    torch.testing.assert_close(predicted(load(files)), predicted(family))


def test_a_small_decoder_is_an_autoencoder_of_flux2_too(parts: BaseFiles, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16, 16),
        decoder_block_out_channels=(4, 8, 8, 8),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=4,
    )
    own = load(dataclasses.replace(parts, vae_file=split_files.write(tmp_path / "vae.safetensors", vae.state_dict())))
    assert own._vae.config.decoder_block_out_channels == (4, 8, 8, 8)  # type: ignore[attr-defined]


# --- what a file is ----------------------------------------------------------------------------------------------


def named(folder: Path, size: str, name: str, metadata: Mapping[str, str] | None = None) -> BaseFiles:
    """A file of that name with the header of a real transformer and no weights."""
    shapes = {key: tuple(value.shape) for key, value in original_transformer(real(size).state_dict()).items()}
    return BaseFiles("single_file", split_files.header(folder / name, shapes, metadata), name)


@pytest.mark.parametrize(
    ("size", "name", "variant", "license_name", "drawing"),
    [
        ("klein-4b", "flux-2-klein-base-4b.safetensors", "klein-base-4b", "Apache 2.0", (50, 4.0)),
        ("klein-4b", "flux-2-klein-4b-fp8.safetensors", "klein-4b", "Apache 2.0", (4, 1.0)),
        ("klein-9b", "flux2_klein_base_9b.safetensors", "klein-base-9b", "FLUX Non-Commercial License", (50, 4.0)),
        ("klein-9b", "myDatabase.safetensors", "klein-9b", "FLUX Non-Commercial License", (4, 1.0)),
        ("dev", "flux2-dev.safetensors", "dev", "FLUX Non-Commercial License", (28, 4.0)),
    ],
)
def test_variants_are_told_by_size_and_name(
    tmp_path: Path, size: str, name: str, variant: str, license_name: str, drawing: tuple[int, float]
) -> None:
    identity = flux2.identify(named(tmp_path, size, name))
    assert identity is not None
    assert identity.variant == variant
    assert identity.details["license"] == license_name
    assert (identity.details["draw_steps"], identity.details["draw_guidance"]) == drawing
    assert identity.details["prompt_numbers"] == 512 * int(REAL[size]["joint_attention_dim"])
    assert ("guessed" in identity.label) == (size != "dev")
    assert ("distilled" in identity.details.get("warning", "")) == (drawing == (4, 1.0))
    assert identity.parts_missing == ("vae", "text_encoder")
    assert "bf16" in identity.label
    assert identity.native_resolution == 1024


def test_a_folder_says_whether_it_is_distilled_and_draws_without_negative_prompts(tmp_path: Path) -> None:
    family = load(locate_base(str(build_tiny_flux2(tmp_path / "base", distilled=True))))
    assert "distilled" in family.identity.label
    assert "guessed" not in family.identity.label
    assert "Train on FLUX.2 klein base" in family.identity.details["warning"]
    assert usual_drawing(family) == (4, 1.0)
    positive, red, blue = family.encode_prompts(["a circle", "red", "blue"])
    one, other = (
        family.draw([PictureRequest(positive, negative, 1)], DrawSettings(4, 5.0, 64, 64))[0]
        for negative in (red, blue)
    )
    assert one.tobytes() == other.tobytes()


def test_flux1_is_not_taken_for_flux2(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        weights = FluxTransformer2DModel(num_layers=1, num_single_layers=1).state_dict()
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    shapes |= {"double_blocks.0.img_mod.lin.weight": (18432, 3072), "single_blocks.0.linear1.weight": (21504, 3072)}
    path = split_files.header(tmp_path / "flux1-dev.safetensors", shapes)
    assert flux2.identify(BaseFiles("single_file", path, path.name)) is None


def test_missing_parts_are_named_with_the_settings_and_files_that_fill_them(parts: BaseFiles) -> None:
    alone = dataclasses.replace(parts, vae_file=None, encoder_files=())
    with pytest.raises(BaseModelError, match="has no vae and no text_encoder") as caught:
        load(alone)
    assert "base.vae and base.text_encoders" in str(caught.value.fix)
    assert "flux2-vae.safetensors and qwen_3_4b.safetensors" in str(caught.value.fix)


def test_a_text_encoder_of_another_size_is_not_this_models(parts: BaseFiles, tmp_path: Path) -> None:
    sizes = {"embed_tokens": (300, 64), "layers.0.mlp.gate_proj": (96, 64)}
    sizes |= {f"layers.0.self_attn.{name}": (64, 64) for name in ("q_proj", "k_proj")} | {
        "layers.0.self_attn.q_norm": (16,)
    }
    shapes = {f"model.{name}.weight": shape for name, shape in sizes.items()}
    other = split_files.header(tmp_path / "qwen_3_8b.safetensors", shapes)
    identity = flux2.identify(dataclasses.replace(parts, encoder_files=(other,)))
    assert identity is not None
    assert identity.parts_missing == ("text_encoder",)


def test_four_bit_files_are_refused_by_name(parts: BaseFiles, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = {**load_file(parts.path), "single_blocks.0.linear1.weight_scale_2": torch.ones(1)}
    path = split_files.write(tmp_path / "flux2-nvfp4-base.safetensors", weights)
    with pytest.raises(BaseModelError, match="NVFP4"):
        load(dataclasses.replace(parts, path=path))


def test_a_missing_tokenizer_is_an_error_with_the_command_that_fetches_it(
    parts: BaseFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(tmp_path / "nowhere"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(BaseModelError, match="not on this machine") as caught:
        load(parts)
    assert "hf download Qwen/Qwen3-4B" in str(caught.value.fix)


def test_a_transformer_that_lacks_a_weight_is_refused_by_its_name(parts: BaseFiles, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(parts.path)
    del weights["single_blocks.1.linear2.weight"]
    path = split_files.write(tmp_path / "klein-base.safetensors", weights)
    with pytest.raises(BaseModelError, match=r"transformer of .* does not fit"):
        load(dataclasses.replace(parts, path=path))


def test_a_tokenizer_without_chat_template_is_an_error_by_name(klein: Path, tmp_path: Path) -> None:
    shutil.copytree(klein, tmp_path / "base")
    (tmp_path / "base" / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(BaseModelError, match="no chat template"):
        load(locate_base(str(tmp_path / "base")))
