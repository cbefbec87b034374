"""FLUX.1: what its script computes, the names that readers accept, and the files that people have."""

from __future__ import annotations

import dataclasses
import itertools
import json
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
    flux1,
    identify_base,
    usual_drawing,
)
from lorasmith.engine.objectives import build_objective
from lorasmith.engine.sources import BaseFiles, locate_base
from tests import split_files
from tests.original_flux import in_original_names, original_transformer
from tests.tiny_flux1 import build_tiny_flux1

CPU = torch.device("cpu")


def load(files: BaseFiles, dtype: torch.dtype = torch.float32) -> Family:
    module, identity = identify_base(files)
    return module.load(files, identity, CPU, dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_flux1(tmp_path_factory.mktemp("flux1") / "dev")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_flux1(tmp_path_factory.mktemp("flux1") / "schnell", guided=False)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return reference(folder)


def reference(folder: Path) -> Any:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, local_files_only=True)
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


def test_prompts_are_the_pipelines(family: Family, pipeline: Any) -> None:
    prompts = ["a red circle", "", "ein blauer Würfel"]
    embeds, pooled, _ = pipeline.encode_prompt(list(prompts), None)
    for index, own in enumerate(family.encode_prompts(prompts)):
        torch.testing.assert_close(own["prompt_embeds"], embeds[index], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own["pooled"], pooled[index], rtol=1e-5, atol=1e-5)


def test_schnell_reads_half_the_tokens(schnell: Path) -> None:
    family = load(locate_base(str(schnell)))
    (own,) = family.encode_prompts(["red " * 400])
    embeds, _, _ = reference(schnell).encode_prompt(["red " * 400], None, max_sequence_length=256)
    torch.testing.assert_close(own["prompt_embeds"], embeds[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_pictures_are_those_of_the_diffusers_pipeline(folder: Path, schnell: Path, kind: str) -> None:
    place = {"dev": folder, "schnell": schnell}[kind]
    family = load(locate_base(str(place)))
    (expected,) = reference(place)(
        prompt=["a red circle"],
        num_inference_steps=3,
        guidance_scale=2.5,
        height=64,
        width=96,
        max_sequence_length={"dev": 512, "schnell": 256}[kind],
        generator=[torch.Generator().manual_seed(7)],
    ).images
    positive, negative = family.encode_prompts(["a red circle", "a blue square"])
    (picture,) = family.draw([PictureRequest(positive, negative, 7)], DrawSettings(3, 2.5, 64, 96))
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_a_de_distilled_model_draws_with_a_real_guidance(schnell: Path, tmp_path: Path) -> None:
    shutil.copytree(schnell, tmp_path / "OpenFLUX.1")
    family, pipe = load(locate_base(str(tmp_path / "OpenFLUX.1"))), reference(schnell)
    assert family.identity.variant == "de-distilled"
    assert "training_adapter" not in family.identity.details
    (expected,) = pipe(
        prompt=["a red circle"],
        negative_prompt=["a blue square"],
        true_cfg_scale=3.5,
        num_inference_steps=3,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(7)],
    ).images
    positive, negative = family.encode_prompts(["a red circle", "a blue square"])
    (picture,) = family.draw([PictureRequest(positive, negative, 7)], DrawSettings(3, 3.5, 64, 64))
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_guidance_is_built_in_when_drawing_and_one_when_training(family: Family) -> None:
    (red,) = family.encode_prompts(["a red circle"])
    pictures = [family.draw([PictureRequest(red, red, 7)], DrawSettings(2, g, 64, 64))[0] for g in (1.0, 3.5)]
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert family.guidance == 1.0
    usual = predicted(family)
    family.guidance = 3.5
    try:
        assert (predicted(family) - usual).abs().max() > 1e-4
    finally:
        family.guidance = 1.0


@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_loss_and_gradients_are_those_of_the_reference_script(folder: Path, schnell: Path, kind: str) -> None:
    place = {"dev": folder, "schnell": schnell}[kind]
    family, pipe = load(locate_base(str(place))), reference(place)
    adapter = attach_adapter(family, AdapterSettings(rank=4, alpha=2.0, targets="attention-mlp"), seed=1)
    for index, module in enumerate(adapter.modules):
        torch.nn.init.normal_(module.up, std=0.1, generator=torch.Generator().manual_seed(index))
    pixels = torch.rand((2, 3, 64, 96), generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents, prompts, level = family.encode_images(pixels), ["a red circle", "a much longer prompt of a square"], 0.3
    objective = build_objective(family, ObjectiveSettings(), seed=0)
    batch = objective.at(latents, level, [5, 6])
    conditioning = family.collate(family.encode_prompts(prompts))
    loss = objective.loss(family.predict(batch.noisy, batch.timesteps, conditioning), batch)
    loss.backward()
    parameters = adapter.parameters()
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters)
    for parameter in parameters:
        parameter.grad = None

    # train_dreambooth_lora_flux.py, but for its guidance, which every other trainer has at 1.
    with torch.no_grad():
        embeds, pooled, text_ids = pipe.encode_prompt(
            list(prompts), None, max_sequence_length={"dev": 512, "schnell": 256}[kind]
        )
        clean = (pipe.vae.encode(pixels).latent_dist.mode() - pipe.vae.config.shift_factor) * 0.3611
    noise = batch.target + latents.float()
    noisy = (1.0 - level) * clean + level * noise
    rows, columns = 4, 6
    tokens = noisy.view(2, 16, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, rows * columns, 64)
    places = torch.tensor([[0.0, row, column] for row, column in itertools.product(range(rows), range(columns))])
    answer = family.denoiser(
        hidden_states=tokens,
        timestep=torch.full((2,), level),
        guidance=torch.ones(2) if kind == "dev" else None,
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=text_ids,
        img_ids=places,
        return_dict=False,
    )[0]
    answer = answer.view(2, rows, columns, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 2 * rows, 2 * columns)
    expected = torch.nn.functional.mse_loss(answer.float(), noise - clean)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-5)


# --- names that readers accept -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size() -> torch.nn.Module:
    """The real dev model, without weights."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


def linears(network: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}


def wanted(network: torch.nn.Module, targets: str) -> list[str]:
    ends = tuple(f".{suffix}" for suffix in flux1.SPEC.targets[targets])
    return [path for path in linears(network) if f".{path}".endswith(ends)]


def test_the_real_model_has_as_many_weights_as_the_spec_says(full_size: torch.nn.Module) -> None:
    assert sum(parameter.numel() for parameter in full_size.parameters()) == flux1.SPEC.denoiser_parameters


def test_target_presets_of_the_real_model(full_size: torch.nn.Module) -> None:
    in_blocks = {path for path in linears(full_size) if "transformer_blocks." in path}
    assert set(wanted(full_size, "all-linear")) == in_blocks
    assert set(wanted(full_size, "kohya")) == set(wanted(full_size, "ai-toolkit")) == in_blocks
    sizes = {name: len(wanted(full_size, name)) for name in flux1.SPEC.targets}
    assert sizes["attention"] == 19 * 8 + 38 * 3
    assert sizes["diffusers"] == 19 * 12 + 38 * 3
    assert sizes["attention-mlp"] == 19 * 12 + 38 * 5
    assert sizes["all-linear"] == 19 * 14 + 38 * 6


def comfyui_accepts() -> set[str]:
    """The layers under `transformer.` that ComfyUI maps (comfy/utils.py, flux_to_diffusers)."""
    double = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")]
    double += [f"attn.add_{name}_proj" for name in "qkv"] + ["norm1.linear", "norm1_context.linear"]
    double += [f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")]
    single = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear"]
    names = {f"transformer_blocks.{i}.{name}" for i in range(19) for name in double}
    return names | {f"single_transformer_blocks.{i}.{name}" for i in range(38) for name in single}


def kohya_names() -> dict[str, int]:
    """Kohya's names of the block layers, and how many rows each has at width 3072 (networks/lora_flux.py)."""
    width = 3072
    double = {"attn_qkv": 3, "attn_proj": 1, "mlp_0": 4, "mlp_2": 1, "mod_lin": 6}
    single = {"linear1": 7, "linear2": 1, "modulation_lin": 3}
    names = {
        f"lora_unet_double_blocks_{i}_{side}_{name}": rows * width
        for i in range(19)
        for side in ("img", "txt")
        for name, rows in double.items()
    }
    return names | {
        f"lora_unet_single_blocks_{i}_{name}": rows * width for i in range(38) for name, rows in single.items()
    }


def test_comfyui_knows_every_target_by_its_diffusers_name(full_size: torch.nn.Module) -> None:
    names = {flux1.export_name("diffusers", "denoiser", path) for path in wanted(full_size, "all-linear")}
    assert names == {f"transformer.{path}" for path in comfyui_accepts()}


def test_kohyas_names_and_rows_are_those_of_its_own_files(full_size: torch.nn.Module) -> None:
    layers, rows = linears(full_size), {}
    for path in wanted(full_size, "all-linear"):
        name = flux1.export_name("kohya", "denoiser", path)
        if isinstance(name, FusedName):
            assert path in name.rows
            rows[name.name] = sum(layers[row].out_features for row in name.rows)
        else:
            rows[name] = layers[path].out_features
    assert rows == kohya_names()


def test_diffusers_reads_the_fused_rows_of_a_real_width_in_the_same_order(tmp_path: Path) -> None:
    """Each layer gets a number of its own: what diffusers makes of the fused tensor must be in the same places."""
    from diffusers import FluxPipeline

    for path in ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj",
                 "single_transformer_blocks.0.attn.to_q"):  # fmt: skip
        name = flux1.export_name("kohya", "denoiser", path)
        assert isinstance(name, FusedName)
        sizes = [12288 if row.endswith("proj_mlp") else 3072 for row in name.rows]
        up = torch.cat([torch.full((size, 1), float(index)) for index, size in enumerate(sizes)])
        tensors = {f"{name.name}.lora_down.weight": torch.ones(1, 3072), f"{name.name}.lora_up.weight": up}
        state = FluxPipeline.lora_state_dict(tensors | {f"{name.name}.alpha": torch.tensor(1.0)})
        for index, (row, size) in enumerate(zip(name.rows, sizes, strict=True)):
            part = state[f"transformer.{row}.lora_B.weight"]
            assert part.shape == (size, 1)
            assert (part == index).all()


@pytest.mark.parametrize("layout", flux1.SPEC.layouts)
def test_a_file_of_each_layout_loads_into_the_layers_it_was_made_of(
    family: Family, folder: Path, tmp_path: Path, layout: str
) -> None:
    """Also at another width than diffusers' converter has, and with a strength that is only in `.alpha`."""
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    layers, rank, alpha = linears(network), 2, 4.0
    paths, generator = wanted(network, "all-linear"), torch.Generator().manual_seed(1)
    changes: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        name = flux1.export_name(layout, "denoiser", path)
        rows = name.rows if isinstance(name, FusedName) else (path,)
        key = name.name if isinstance(name, FusedName) else name
        if rows[0] != path:
            continue
        down = torch.randn(rank, layers[path].in_features, generator=generator)
        ups = [torch.randn(layers[row].out_features, rank, generator=generator) for row in rows]
        scale = alpha / rank if layout == "kohya" else 1.0
        changes |= {row: scale * up @ down for row, up in zip(rows, ups, strict=True)}
        a, b = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
        tensors |= {f"{key}.{a}.weight": down, f"{key}.{b}.weight": torch.cat(ups)}
        if layout == "kohya":
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    flux1.load_lora(split_files.write(tmp_path / "lora.safetensors", tensors), {"denoiser": network})
    loaded = {path: layer for path, layer in network.named_modules() if hasattr(layer, "lora_A")}
    assert set(loaded) == set(paths)
    for path, layer in loaded.items():
        torch.testing.assert_close(layer.get_delta_weight("default_0"), changes[path], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", flux1.SPEC.layouts)
def test_the_text_encoders_names_are_those_that_comfyui_has_for_clip_l(layout: str) -> None:
    dots = flux1.export_name("diffusers", "text_encoder", "encoder.layers.3.self_attn.q_proj")
    assert dots == "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
    name = flux1.export_name("kohya", "text_encoder", "encoder.layers.3.self_attn.q_proj")
    assert name == "lora_te1_text_model_encoder_layers_3_self_attn_q_proj"
    with pytest.raises(ExportError, match=f"no {layout} name for text_encoder_2"):
        flux1.export_name(layout, "text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q")


def test_bfl_names_with_a_dot_are_never_written() -> None:
    """Why: diffusers loads `diffusion_model.double_blocks…lora_A` without a word and changes nothing."""
    with pytest.raises(ExportError, match="no comfyui name"):
        flux1.export_name("comfyui", "denoiser", "transformer_blocks.0.attn.to_q")


# --- files that people have --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    """ComfyUI's four files."""
    place = tmp_path_factory.mktemp("split")
    clip = {
        f"text_model.{name.removeprefix('text_model.')}": value
        for name, value in split_files.part(folder, "text_encoder").items()
    }
    encoders = (
        split_files.write(place / "clip_l.safetensors", clip),
        split_files.write(place / "t5xxl_fp16.safetensors", split_files.part(folder, "text_encoder_2")),
    )
    return BaseFiles(
        "single_file",
        split_files.write(place / "flux1-dev.safetensors", original_transformer(folder)),
        "flux1-dev.safetensors",
        vae_file=split_files.write(place / "ae.safetensors", split_files.original_autoencoder(folder)),
        encoder_files=encoders,
    )


@pytest.fixture(autouse=True)
def tokenizers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where single files find their tokenizers."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizers" / "clip")
    shutil.copytree(folder / "tokenizer_2", tmp_path / "tokenizers" / "t5")
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(tmp_path / "tokenizers"))


def test_split_files_give_what_the_folder_gives(parts: BaseFiles, family: Family) -> None:
    own = load(parts)
    assert own.identity.variant == "dev"
    assert own.identity.parts_missing == ()
    assert own.identity.details["prompt_numbers"] == family.identity.details["prompt_numbers"]
    assert own.identity.parameters == family.identity.parameters
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(own.encode_images(pixels), family.encode_images(pixels))
    torch.testing.assert_close(predicted(own), predicted(family))
    for key in ("use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
        assert own.noise_schedule[key] == family.noise_schedule[key]


def test_all_parts_in_one_file_give_what_the_folder_gives(
    folder: Path, parts: BaseFiles, family: Family, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    clip_file, t5_file = parts.encoder_files
    pieces = {
        "model.diffusion_model.": original_transformer(folder),
        "vae.": split_files.original_autoencoder(folder),
        "text_encoders.clip_l.transformer.": load_file(clip_file),
        "text_encoders.t5xxl.transformer.": load_file(t5_file),
    }
    weights: dict[str, Any] = {}
    for prefix, values in pieces.items():
        weights |= load_file(split_files.write(tmp_path / "part.safetensors", values, prefix))
    own = load(locate_base(str(split_files.write(tmp_path / "all in one.safetensors", weights))))
    torch.testing.assert_close(predicted(own), predicted(family))


def test_fp8_weights_are_read_plain_and_scaled(folder: Path, parts: BaseFiles, tmp_path: Path) -> None:
    scaled, meant = split_files.in_fp8(original_transformer(folder))
    scaled["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    plain = {name: value.to(torch.float8_e4m3fn) for name, value in original_transformer(folder).items()}
    rounded = {name: value.float() for name, value in plain.items()}
    for stored, expected in ((scaled, meant), (plain, rounded)):
        paths = [split_files.write(tmp_path / f"{i}.safetensors", w) for i, w in enumerate((stored, expected))]
        own, other = (load(dataclasses.replace(parts, path=path)) for path in paths)
        assert own.identity.precision == "fp8"
        torch.testing.assert_close(predicted(own), predicted(other))


def test_a_scaled_fp8_t5_is_read(parts: BaseFiles, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    clip_file, t5_file = parts.encoder_files
    stored, meant = split_files.in_fp8(load_file(t5_file))
    own, other = (
        load(
            dataclasses.replace(parts, encoder_files=(clip_file, split_files.write(tmp_path / name, weights)))
        ).encode_prompts(["red"])[0]
        for name, weights in (("t5xxl_fp8_e4m3fn_scaled.safetensors", stored), ("t5xxl.safetensors", meant))
    )
    torch.testing.assert_close(own["prompt_embeds"], other["prompt_embeds"])


def test_t5_keeps_its_feed_forward_outputs_in_fp32_when_the_rest_is_fp16(parts: BaseFiles, folder: Path) -> None:
    for files in (parts, locate_base(str(folder))):
        encoder = load(files, torch.float16).text_encoders["text_encoder_2"]
        wide = {name for name, parameter in encoder.named_parameters() if parameter.dtype == torch.float32}
        assert wide == {name for name, _ in encoder.named_parameters() if name.endswith("wo.weight")}


def test_the_transformer_in_diffusers_names_is_a_single_file_too(
    folder: Path, parts: BaseFiles, family: Family
) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.testing.assert_close(predicted(load(dataclasses.replace(parts, path=path))), predicted(family))


def test_a_folder_takes_parts_from_files_given_apart(folder: Path, parts: BaseFiles, tmp_path: Path) -> None:
    """The parts of the folder itself are then not read."""
    shutil.copytree(folder, tmp_path / "dev")
    for name in ("vae", "text_encoder", "text_encoder_2"):
        next((tmp_path / "dev" / name).glob("*.safetensors")).unlink()
    files = dataclasses.replace(parts, kind="folder", path=tmp_path / "dev", origin="dev")
    torch.testing.assert_close(predicted(load(files)), predicted(load(parts)))


def test_schnells_file_draws_without_a_shift(schnell: Path, parts: BaseFiles, tmp_path: Path) -> None:
    path = split_files.write(tmp_path / "flux1-schnell.safetensors", original_transformer(schnell))
    own, folder = load(dataclasses.replace(parts, path=path)), load(locate_base(str(schnell)))
    assert own.identity.variant == folder.identity.variant == "schnell"
    for key in ("use_dynamic_shifting", "shift"):
        assert own.noise_schedule[key] == folder.noise_schedule[key]


# --- what a file is ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(full_size: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The original names and shapes of the real dev model."""
    return {name: tuple(value.shape) for name, value in in_original_names(full_size.state_dict()).items()}


def named(folder: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> BaseFiles:
    return BaseFiles("single_file", split_files.header(folder / name, shapes), name)


@pytest.mark.parametrize(
    ("name", "variant", "drawing"),
    [
        ("flux1-dev.safetensors", "dev", (28, 3.5)),
        ("flux1-krea-dev_fp8_scaled.safetensors", "krea", (28, 4.5)),
        ("flux1-dev-kontext_fp8_scaled.safetensors", "kontext", (28, 2.5)),
        ("something.safetensors", "dev", (28, 3.5)),
    ],
)
def test_variants_of_one_architecture_are_guessed_from_the_name(
    tmp_path: Path, shapes: Mapping[str, tuple[int, ...]], name: str, variant: str, drawing: tuple[int, float]
) -> None:
    _, identity = identify_base(named(tmp_path, name, shapes))
    assert (identity.family, identity.variant) == ("flux1", variant)
    assert ("guessed" in identity.label) == (variant != "dev")
    assert "11.90 B" in identity.label
    assert identity.parts_missing == ("vae", "text_encoder", "text_encoder_2")
    assert identity.native_resolution == 1024
    assert (identity.details["draw_steps"], identity.details["draw_guidance"]) == drawing
    assert identity.details["prompt_numbers"] == flux1.SPEC.prompt_numbers
    assert "training_adapter" not in identity.details
    assert variant in flux1.SPEC.uses


def test_schnell_is_told_by_its_missing_guidance(tmp_path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    rest = {name: shape for name, shape in shapes.items() if "guidance_in" not in name}
    _, identity = identify_base(named(tmp_path, "x.safetensors", rest))
    assert identity.variant == "schnell"
    assert identity.details["training_adapter"].startswith("ostris/FLUX.1-schnell-training-adapter/")
    assert identity.details["draw_steps"] == 4
    assert identity.details["architecture"] == "flux-1-schnell"


def test_a_kontext_folder_is_told_by_its_pipeline_and_loads(tmp_path: Path) -> None:
    family = load(locate_base(str(build_tiny_flux1(tmp_path / "x", pipeline="FluxKontextPipeline"))))
    assert family.identity.variant == "kontext"
    assert "guessed" not in family.identity.label
    assert usual_drawing(family) == (28, 2.5)


@pytest.mark.parametrize(("channels", "words"), [(384, "Fill"), (128, "Canny or Depth")])
def test_models_that_edit_pictures_are_refused_by_name(
    tmp_path: Path, shapes: Mapping[str, tuple[int, ...]], channels: int, words: str
) -> None:
    wider = dict(shapes) | {"img_in.weight": (3072, channels)}
    with pytest.raises(BaseModelError, match=words):
        identify_base(named(tmp_path, "x.safetensors", wider))


def test_packed_weights_are_refused(tmp_path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    mark = "double_blocks.0.img_mlp.0.weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(BaseModelError, match="stores its weights packed"):
        identify_base(named(tmp_path, "flux1-dev-bnb-nf4.safetensors", dict(shapes) | {mark: (80,)}))


def test_a_packed_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "nf4")
    config = tmp_path / "nf4" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(BaseModelError, match="stores its weights packed"):
        identify_base(locate_base(str(tmp_path / "nf4")))


def test_missing_parts_are_named_with_the_settings_that_give_them(parts: BaseFiles) -> None:
    alone = dataclasses.replace(parts, vae_file=None, encoder_files=())
    with pytest.raises(BaseModelError, match="has no vae and no text_encoder and no text_encoder_2") as caught:
        load(alone)
    assert "base.text_encoders" in str(caught.value.fix)


def test_a_missing_tokenizer_is_an_error_with_the_command_that_fetches_it(
    parts: BaseFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "tokenizers" / "t5")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(BaseModelError, match="T5") as caught:
        load(parts)
    assert "hf download" in str(caught.value.fix)


@pytest.mark.parametrize("name", ["single_blocks.1.linear2.weight", "double_blocks.0.img_attn.norm.query_norm.scale"])
def test_a_transformer_that_lacks_a_weight_is_refused(
    folder: Path, parts: BaseFiles, tmp_path: Path, name: str
) -> None:
    weights = original_transformer(folder)
    del weights[name]
    path = split_files.write(tmp_path / "x.safetensors", weights)
    with pytest.raises(BaseModelError, match=r"transformer of .* does not fit"):
        load(dataclasses.replace(parts, path=path))


def test_diffusers_own_converter_gives_the_same_names_and_shapes(full_size: torch.nn.Module) -> None:
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as convert

    from lorasmith.engine.families._flux_names import to_diffusers

    original = in_original_names(full_size.state_dict())
    ours = {name: value.shape for name, value in to_diffusers(original).items()}
    assert ours == {name: value.shape for name, value in convert(dict(original)).items()}
    assert ours == {name: value.shape for name, value in full_size.state_dict().items()}
