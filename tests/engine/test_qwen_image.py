"""Qwen-Image: what its scripts compute, the names that readers accept, and the files that people have."""

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

from lorasmith.engine.adapters import attach_adapter
from lorasmith.engine.config import AdapterSettings, ObjectiveSettings
from lorasmith.engine.errors import BaseModelError, ExportError
from lorasmith.engine.families import DrawSettings, Family, PictureRequest, identify_base, qwen_image, usual_drawing
from lorasmith.engine.objectives import build_objective
from lorasmith.engine.sources import BaseFiles, locate_base
from tests import split_files
from tests.tiny_qwen_image import build_tiny_qwen_image

CPU = torch.device("cpu")
LONG = "a much longer prompt of a square"
UNREAD = ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")


def load(files: BaseFiles, dtype: torch.dtype = torch.float32) -> Family:
    module, identity = identify_base(files)
    return module.load(files, identity, CPU, dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen_image(tmp_path_factory.mktemp("qwen_image") / "base")


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    return load(locate_base(str(folder)))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def predicted(family: Family) -> torch.Tensor:
    noisy = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        conditioning = family.collate(family.encode_prompts(["a red circle"]))
        return family.predict(noisy, torch.tensor([700.0]), conditioning)


# --- what the reference computes ---------------------------------------------------------------------------------


def test_prompts_are_the_pipelines_without_padding(family: Family, pipeline: Any) -> None:
    prompts = ["a red circle", "", LONG]
    expected, mask = pipeline.encode_prompt(list(prompts))
    for own, other, valid in zip(family.encode_prompts(prompts), expected, mask.bool(), strict=True):
        torch.testing.assert_close(own["prompt_embeds"], other[valid], rtol=1e-5, atol=1e-5)


def test_a_prompt_does_not_depend_on_its_neighbors_and_is_masked_only_where_it_is_padded(family: Family) -> None:
    short, long, same = family.encode_prompts(["red", LONG, "tan"])
    assert "prompt_mask" not in family.collate([short, same])
    batch = family.collate([short, long])
    assert batch["prompt_mask"].sum(1).tolist() == [len(short["prompt_embeds"]), len(long["prompt_embeds"])]
    noisy, times = torch.randn((2, 16, 8, 4), generator=torch.Generator().manual_seed(1)), torch.tensor([100.0, 800.0])
    with torch.no_grad():
        both = family.predict(noisy, times, batch)
        for row, item in enumerate((short, long)):
            alone = family.predict(noisy[row : row + 1], times[row : row + 1], family.collate([item]))
            torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_of_the_diffusers_pipeline(family: Family, pipeline: Any, guidance: float) -> None:
    (expected,) = pipeline(
        prompt=["a red circle"],
        negative_prompt=["a blue square"] if guidance > 1 else None,
        num_inference_steps=3,
        true_cfg_scale=guidance,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(7)],
    ).images
    positive, negative = family.encode_prompts(["a red circle", "a blue square"])
    (picture,) = family.draw([PictureRequest(positive, negative, 7)], DrawSettings(3, guidance, 64, 64))
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert usual_drawing(family) == (50, 4.0)


def test_loss_and_gradients_are_those_of_the_reference_script(folder: Path, pipeline: Any) -> None:
    family = load(locate_base(str(folder)))
    adapter = attach_adapter(family, AdapterSettings(rank=4, alpha=2.0, targets="all-linear"), seed=1)
    for index, module in enumerate(adapter.modules):
        torch.nn.init.normal_(module.up, std=0.1, generator=torch.Generator().manual_seed(index))
    pixels = torch.rand((2, 3, 64, 32), generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents, prompts, level = family.encode_images(pixels), ["a red circle", LONG], 0.3
    objective = build_objective(family, ObjectiveSettings(), seed=0)
    batch = objective.at(latents, level, [5, 6])
    conditioning = family.collate(family.encode_prompts(prompts))
    loss = objective.loss(family.predict(batch.noisy, batch.timesteps, conditioning), batch)
    loss.backward()
    # Nothing reads the words behind the last block, so what only they pass through cannot learn.
    unread = [module.path for module in adapter.modules if module.up.grad is None]
    assert unread == [f"transformer_blocks.1.{name}" for name in UNREAD]
    parameters = [
        tensor for module in adapter.modules if module.path not in unread for tensor in module.tensors.values()
    ]
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters)
    for parameter in parameters:
        parameter.grad = None

    # train_dreambooth_lora_qwen_image.py: latents of one frame, normalized channel by channel, packed as the pipeline
    # packs them; noise by sigma; t / 1000; the mask of the prompts.
    vae, script = pipeline.vae, type(pipeline)
    with torch.no_grad():
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        inverse = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        clean = (vae.encode(pixels.unsqueeze(2)).latent_dist.mode() - mean) * inverse
        embeds, mask = pipeline.encode_prompt(list(prompts))
    noise = (batch.target + latents.float()).unsqueeze(2)
    noisy = ((1.0 - level) * clean + level * noise).permute(0, 2, 1, 3, 4)
    answer = family.denoiser(
        hidden_states=script._pack_latents(noisy, 2, 16, 8, 4),
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=mask,
        timestep=torch.full((2,), level * 1000.0) / 1000,
        img_shapes=[(1, 4, 2)] * 2,
        return_dict=False,
    )[0]
    answer = script._unpack_latents(answer, 64, 32, 8)
    reference = torch.nn.functional.mse_loss(answer.float(), noise - clean)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-5)


# --- names that readers accept -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size() -> dict[str, torch.nn.Linear]:
    """The linear layers of the real model, without weights."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        network = QwenImageTransformer2DModel()
    assert sum(parameter.numel() for parameter in network.parameters()) == qwen_image.SPEC.denoiser_parameters
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}


def wanted(layers: Mapping[str, torch.nn.Linear], targets: str) -> list[str]:
    ends = tuple(f".{suffix}" for suffix in qwen_image.SPEC.targets[targets])
    return [path for path in layers if f".{path}".endswith(ends)]


def test_target_presets_of_the_real_model(full_size: Mapping[str, torch.nn.Linear]) -> None:
    sizes = {name: len(wanted(full_size, name)) for name in qwen_image.SPEC.targets}
    in_blocks = {path for path in full_size if path.startswith("transformer_blocks.")}
    assert set(wanted(full_size, "ai-toolkit")) == in_blocks
    assert (sizes["attention"], sizes["diffusers"]) == (8 * 60, 4 * 60)
    assert sizes["attention-mlp"] == sizes["kohya"] == 12 * 60
    assert sizes["all-linear"] == 14 * 60 + 3


def comfyui_accepts(layout: str) -> dict[str, tuple[int, ...]]:
    """The names that ComfyUI maps to weights of Qwen-Image, with the shapes of those weights.

    comfy/lora.py takes `diffusion_model.`, `transformer.` and `lora_unet_` (with _ for .) before every name of its own
    model, which are those of comfy/ldm/qwen_image/model.py.
    """
    d, mlp = 3072, 12288
    own: dict[str, tuple[int, ...]] = {"img_in": (d, 64), "txt_in": (d, 3584), "proj_out": (64, d)}
    for block in range(60):
        begin = f"transformer_blocks.{block}"
        attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        own |= {f"{begin}.attn.{name}": (d, d) for name in attention}
        for stream in ("img", "txt"):
            own[f"{begin}.{stream}_mod.1"] = (6 * d, d)
            own[f"{begin}.{stream}_mlp.net.0.proj"] = (mlp, d)
            own[f"{begin}.{stream}_mlp.net.2"] = (d, mlp)
    if layout == "kohya":
        return {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in own.items()}
    prefix = {"comfyui": "diffusion_model.", "diffusers": "transformer."}[layout]
    return {prefix + name: shape for name, shape in own.items()}


@pytest.mark.parametrize("layout", qwen_image.SPEC.layouts)
def test_comfyui_knows_every_target_by_its_name_and_shape(
    full_size: Mapping[str, torch.nn.Linear], layout: str
) -> None:
    paths = wanted(full_size, "all-linear")
    names = {qwen_image.export_name(layout, "denoiser", path): tuple(full_size[path].weight.shape) for path in paths}
    assert names == comfyui_accepts(layout)


@pytest.mark.parametrize("layout", ["comfyui", "kohya"])
def test_diffusers_turns_the_names_into_the_layers_of_the_real_model_and_reads_alpha(
    full_size: Mapping[str, torch.nn.Linear], layout: str
) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_qwen_lora_to_diffusers as convert

    down, up = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    state: dict[str, torch.Tensor] = {}
    paths = wanted(full_size, "all-linear")
    for number, path in enumerate(paths):
        name = qwen_image.export_name(layout, "denoiser", path)
        state[f"{name}.{down}.weight"] = torch.ones(2, 1)
        state[f"{name}.{up}.weight"] = torch.full((1, 2), float(number))
        if layout == "kohya":
            state[f"{name}.alpha"] = torch.tensor(4.0)
    converted = convert(state)
    assert len(converted) == 2 * len(paths)
    scale = 2.0 if layout == "kohya" else 1.0
    for number, path in enumerate(paths):
        product = converted[f"transformer.{path}.lora_B.weight"] @ converted[f"transformer.{path}.lora_A.weight"]
        assert product.item() == scale * 2 * number


def test_there_is_no_name_for_the_text_encoder() -> None:
    with pytest.raises(ExportError, match="no comfyui name for text_encoder"):
        qwen_image.export_name("comfyui", "text_encoder", "layers.0.self_attn.q_proj")


# --- files that people have --------------------------------------------------------------------------------------

_VAE_NAMES = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    (r"\.norm1\.gamma", ".residual.0.gamma"),
    (r"\.norm2\.gamma", ".residual.3.gamma"),
    (r"\.conv_shortcut\.", ".shortcut."),
)


def original_autoencoder(folder: Path) -> dict[str, Any]:
    """The autoencoder in the names of Wan's code, where all layers of a half are numbered in one row."""
    renamed: dict[str, Any] = {}
    for key, value in split_files.part(folder, "vae").items():
        name = re.sub(
            r"^decoder\.up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.(0))\.",
            lambda found: f"decoder.upsamples.{4 * int(found[1]) + (3 if found[3] else int(found[2]))}.",
            key,
        )
        block = re.search(r"(samples\.\d+|mid_block\.resnets\.\d|down_blocks\.\d+)\.conv[12]\.", name)
        if block:
            name = name.replace(".conv1.", ".residual.2.").replace(".conv2.", ".residual.6.")
        for pattern, new in _VAE_NAMES:
            name = re.sub(pattern, new, name)
        renamed[name] = value
    return renamed


@pytest.fixture(scope="module")
def parts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    """ComfyUI's three files."""
    place = tmp_path_factory.mktemp("split")
    return BaseFiles(
        "single_file",
        split_files.write(place / "qwen_image_bf16.safetensors", split_files.part(folder, "transformer")),
        "qwen_image_bf16.safetensors",
        vae_file=split_files.write(place / "qwen_image_vae.safetensors", original_autoencoder(folder)),
        encoder_files=(
            split_files.write(place / "qwen_2.5_vl_7b.safetensors", split_files.part(folder, "text_encoder")),
        ),
    )


@pytest.fixture(autouse=True)
def tokenizers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where single files find their tokenizer."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizers" / "qwen2.5")
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(tmp_path / "tokenizers"))


def test_split_files_give_what_the_folder_gives(parts: BaseFiles, family: Family) -> None:
    own = load(parts)
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(own.encode_images(pixels), family.encode_images(pixels))
    torch.testing.assert_close(predicted(own), predicted(family))
    assert own.noise_schedule["shift_terminal"] == family.noise_schedule["shift_terminal"]


def test_fp8_weights_are_scaled_back(folder: Path, parts: BaseFiles, tmp_path: Path) -> None:
    stored, meant = split_files.in_fp8(split_files.part(folder, "transformer"))
    text_stored, text_meant = split_files.in_fp8(split_files.part(folder, "text_encoder"))
    families = []
    for name, weights, text in (("meant", meant, text_meant), ("qwen_image_fp8", stored, text_stored)):
        path = split_files.write(tmp_path / f"{name}.safetensors", weights, "model.diffusion_model.")
        encoder = split_files.write(tmp_path / f"{name}_text.safetensors", text)
        families.append(load(dataclasses.replace(parts, path=path, encoder_files=(encoder,))))
    assert "fp8" in families[1].identity.label
    torch.testing.assert_close(predicted(families[1]), predicted(families[0]))


def test_a_folder_takes_parts_from_files_given_apart(folder: Path, parts: BaseFiles, family: Family) -> None:
    files = dataclasses.replace(parts, kind="folder", path=folder, origin=str(folder))
    torch.testing.assert_close(predicted(load(files)), predicted(family))


# --- what a file is ----------------------------------------------------------------------------------------------


def named(folder: Path, name: str, extra: Mapping[str, tuple[int, ...]] | None = None) -> BaseFiles:
    """A file of that name with the real model's header and no weights."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        weights = QwenImageTransformer2DModel().state_dict()
    shapes = {key: tuple(value.shape) for key, value in weights.items()} | dict(extra or {})
    return BaseFiles("single_file", split_files.header(folder / name, shapes), name)


@pytest.mark.parametrize(
    ("name", "variant"), [("qwen_image_bf16.safetensors", "image"), ("qwen_image_2512_fp8.safetensors", "2512")]
)
def test_the_real_models_file_is_recognized(tmp_path: Path, name: str, variant: str) -> None:
    identity = qwen_image.identify(named(tmp_path, name))
    assert identity is not None
    assert identity.variant == variant
    assert "20.43 B" in identity.label
    assert "bf16" in identity.label
    assert identity.parts_missing == ("vae", "text_encoder")
    assert identity.native_resolution == 1024
    assert identity.details["prompt_numbers"] == 1024 * 3584


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("qwen_image_edit_2509_bf16.safetensors", {}),
        ("something.safetensors", {"__index_timestep_zero__": (0,)}),
        ("something.safetensors", {"time_text_embed.addition_t_embedding.weight": (2, 3072)}),
    ],
)
def test_models_that_edit_pictures_are_refused_by_name(
    tmp_path: Path, name: str, extra: Mapping[str, tuple[int, ...]]
) -> None:
    with pytest.raises(BaseModelError, match=r"edits pictures|Qwen-Image-Edit|Layered"):
        qwen_image.identify(named(tmp_path, name, extra))


def test_folders_that_edit_pictures_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "edit")
    index = tmp_path / "edit" / "model_index.json"
    index.write_text(index.read_text().replace('"QwenImagePipeline"', '"QwenImageEditPlusPipeline"'))
    with pytest.raises(BaseModelError, match="is QwenImageEditPlus, which lorasmith cannot train"):
        identify_base(locate_base(str(tmp_path / "edit")))


def test_qwen_image_2_1_is_not_taken_for_it(tmp_path: Path) -> None:
    from diffusers import QwenImage21Transformer2DModel

    with torch.device("meta"):
        weights = QwenImage21Transformer2DModel(num_layers=1).state_dict()
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    path = split_files.header(tmp_path / "qwen_image_2.1.safetensors", shapes)
    assert qwen_image.identify(BaseFiles("single_file", path, path.name)) is None


def test_missing_parts_are_named_with_the_settings_and_files_that_fill_them(parts: BaseFiles) -> None:
    alone = dataclasses.replace(parts, vae_file=None, encoder_files=())
    with pytest.raises(BaseModelError, match="has no vae and no text_encoder") as caught:
        load(alone)
    assert "base.vae to qwen_image_vae.safetensors" in str(caught.value.fix)
    assert "base.text_encoders to qwen_2.5_vl_7b.safetensors" in str(caught.value.fix)


def test_a_missing_tokenizer_is_an_error_with_the_command_that_fetches_it(
    parts: BaseFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(tmp_path / "nowhere"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(BaseModelError, match="not on this machine") as caught:
        load(parts)
    assert "hf download Qwen/Qwen-Image" in str(caught.value.fix)


def test_a_transformer_with_a_weight_too_many_is_refused(folder: Path, parts: BaseFiles, tmp_path: Path) -> None:
    weights = {**split_files.part(folder, "transformer"), "controlnet_blocks.0.weight": torch.ones(2, 2)}
    path = split_files.write(tmp_path / "qwen_image_bf16.safetensors", weights)
    with pytest.raises(BaseModelError, match=r"transformer of .* does not fit"):
        load(dataclasses.replace(parts, path=path))
