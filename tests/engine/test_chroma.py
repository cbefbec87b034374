"""Chroma: what its reference computes, masks under gradient checkpointing, and the files that people have."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorasmith.engine.adapters import attach_adapter
from lorasmith.engine.block_checkpointing import checkpoint_blocks
from lorasmith.engine.config import AdapterSettings, ObjectiveSettings
from lorasmith.engine.errors import BaseModelError, ExportError
from lorasmith.engine.families import (
    Conditioning,
    DrawSettings,
    Family,
    FusedName,
    PictureRequest,
    chroma,
    identify_base,
    usual_drawing,
)
from lorasmith.engine.objectives import build_objective
from lorasmith.engine.sources import BaseFiles, locate_base
from tests import split_files
from tests.original_flux import in_original_names, original_transformer
from tests.tiny_chroma import build_tiny_chroma

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a much longer prompt of a square"]


def load(files: BaseFiles, dtype: torch.dtype = torch.float32) -> Family:
    module, identity = identify_base(files)
    return module.load(files, identity, CPU, dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_chroma(tmp_path_factory.mktemp("chroma") / "tiny")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import ChromaPipeline

    pipe = ChromaPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    return load(locate_base(str(folder)))


def encoded(family: Family) -> Conditioning:
    return family.collate(family.encode_prompts(PROMPTS))


def predicted(family: Family) -> torch.Tensor:
    noisy = torch.randn((2, 16, 8, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return family.predict(noisy, torch.tensor([700.0, 300.0]), encoded(family))


def as_the_script_encodes(pipeline: Any, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """All 512 tokens of each prompt, and which of them count: its own and the first of padding."""
    embeds, _, mask, *_ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return embeds, mask.bool()


# --- what the reference computes ---------------------------------------------------------------------------------


def test_prompts_keep_their_own_tokens_and_one_of_padding(family: Family, pipeline: Any) -> None:
    prompts = ["a red circle", "", "red " * 600]
    embeds, masks = as_the_script_encodes(pipeline, prompts)
    for own, row, mask in zip(family.encode_prompts(prompts), embeds, masks, strict=True):
        torch.testing.assert_close(own["prompt_embeds"], row[mask], rtol=1e-4, atol=1e-4)
    lengths = [len(own["prompt_embeds"]) for own in family.encode_prompts(prompts)]
    assert lengths[2] == 512
    assert lengths[1] == 2


def test_only_prompts_of_different_length_need_a_mask(family: Family) -> None:
    red, blue, long = family.encode_prompts(["a red circle", "a blue circle", PROMPTS[1]])
    assert set(family.collate([red, blue])) == {"prompt_embeds"}
    mask = family.collate([red, long])["prompt_mask"]
    assert mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [len(red["prompt_embeds"]), len(long["prompt_embeds"])]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_of_the_diffusers_pipeline_with_masks_that_mask(
    family: Family, pipeline: Any, guidance: float
) -> None:
    wanted, mask = as_the_script_encodes(pipeline, PROMPTS)
    unwanted, negative_mask = as_the_script_encodes(pipeline, ["a blue square", ""])
    expected = pipeline(
        prompt_embeds=wanted,
        prompt_attention_mask=mask,
        negative_prompt_embeds=unwanted,
        negative_prompt_attention_mask=negative_mask,
        num_inference_steps=3,
        guidance_scale=guidance,
        height=64,
        width=96,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
    ).images
    positive, negative = family.encode_prompts(PROMPTS), family.encode_prompts(["a blue square", ""])
    requests = [PictureRequest(positive[i], negative[i], 7 + i) for i in range(2)]
    for own, other in zip(family.draw(requests, DrawSettings(3, guidance, 64, 96)), expected, strict=True):
        assert np.abs(np.asarray(own).astype(int) - np.asarray(other).astype(int)).max() <= 1


def adapted(folder: Path) -> tuple[Family, list[torch.nn.Parameter]]:
    family = load(locate_base(str(folder)))
    adapter = attach_adapter(family, AdapterSettings(rank=4, alpha=2.0, targets="attention-mlp"), seed=1)
    for index, module in enumerate(adapter.modules):
        torch.nn.init.normal_(module.up, std=0.1, generator=torch.Generator().manual_seed(index))
    return family, adapter.parameters()


def take_gradients(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    gradients = []
    for parameter in parameters:
        assert parameter.grad is not None
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients


def test_loss_and_gradients_are_those_of_the_reference(folder: Path, pipeline: Any) -> None:
    family, parameters = adapted(folder)
    pixels = torch.rand((2, 3, 64, 96), generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents, level = family.encode_images(pixels), 0.3
    objective = build_objective(family, ObjectiveSettings(), seed=0)
    batch = objective.at(latents, level, [5, 6])
    loss = objective.loss(family.predict(batch.noisy, batch.timesteps, encoded(family)), batch)
    loss.backward()
    gradients = take_gradients(parameters)

    # All 512 tokens with the mask, straight from the model's own code: padding but the first is no key for anyone.
    with torch.no_grad():
        embeds, mask = as_the_script_encodes(pipeline, PROMPTS)
        clean = (pipeline.vae.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611
    noise = batch.target + latents.float()
    noisy = (1.0 - level) * clean + level * noise
    rows, columns = 4, 6
    tokens = noisy.view(2, 16, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, rows * columns, 64)
    places = torch.tensor([[0.0, row, column] for row, column in itertools.product(range(rows), range(columns))])
    answer = family.denoiser(
        hidden_states=tokens,
        timestep=torch.full((2,), level),
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(512, 3),
        img_ids=places,
        attention_mask=torch.cat([mask, torch.ones(2, rows * columns, dtype=torch.bool)], dim=1),
        return_dict=False,
    )[0]
    answer = answer.view(2, rows, columns, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 2 * rows, 2 * columns)
    expected = torch.nn.functional.mse_loss(answer.float(), noise - clean)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for gradient, other in zip(gradients, take_gradients(parameters), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5)


def test_checkpointing_keeps_the_mask_even_if_another_batch_comes_between(folder: Path) -> None:
    """diffusers alone leaves it out of the single blocks: the gradients are others then."""
    family, parameters = adapted(folder)
    noisy = torch.randn((2, 16, 8, 8), generator=torch.Generator().manual_seed(3))
    level, mixed = torch.tensor([700.0, 300.0]), encoded(family)
    others = family.collate(family.encode_prompts([PROMPTS[1] * 2, "red"]))

    def gradients() -> list[torch.Tensor]:
        first = family.predict(noisy, level, mixed).square().mean()
        second = family.predict(noisy, level, others).square().mean()
        (first + second).backward()
        return take_gradients(parameters)

    plain = gradients()
    checkpointed = checkpoint_blocks(family, 1.0)
    for gradient, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    checkpointed.undo()
    network: Any = family.denoiser
    tokens = family.packed(noisy)  # type: ignore[attr-defined]
    mask = torch.cat([mixed["prompt_mask"], torch.ones(tokens.shape[:2], dtype=torch.bool)], dim=1)
    values = family.positions(8, 8, mixed["prompt_embeds"].shape[1])  # type: ignore[attr-defined]
    values |= {"encoder_hidden_states": mixed["prompt_embeds"], "attention_mask": mask, "return_dict": False}
    with_mask = network(hidden_states=tokens, timestep=level / 1000, **values)[0]
    network.enable_gradient_checkpointing()
    without = network(hidden_states=tokens, timestep=level / 1000, **values)[0]
    network.disable_gradient_checkpointing()
    assert (without - with_mask).abs().max() > 1e-6, "diffusers has mended it; nothing here depends on its own any more"


# --- names that readers accept -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size() -> torch.nn.Module:
    """The real model, without weights."""
    from diffusers import ChromaTransformer2DModel

    with torch.device("meta"):
        return ChromaTransformer2DModel()


def linears(network: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}


def wanted(network: torch.nn.Module, targets: str) -> list[str]:
    ends = tuple(f".{suffix}" for suffix in chroma.SPEC.targets[targets])
    return [path for path in linears(network) if f".{path}".endswith(ends)]


def test_the_real_model_and_its_targets_are_as_the_spec_says(full_size: torch.nn.Module) -> None:
    assert sum(parameter.numel() for parameter in full_size.parameters()) == chroma.SPEC.denoiser_parameters
    in_blocks = {path for path in linears(full_size) if "transformer_blocks." in path}
    assert set(wanted(full_size, "all-linear")) == in_blocks
    assert len(wanted(full_size, "attention")) == 19 * 8 + 38 * 3
    assert len(wanted(full_size, "diffusers")) == 19 * 12 + 38 * 3


def test_kohyas_names_and_rows_are_those_of_its_own_files(full_size: torch.nn.Module) -> None:
    """As networks/lora_flux.py names Chroma's blocks, which have no modulation; ComfyUI knows its own names so."""
    layers, rows = linears(full_size), {}
    for path in wanted(full_size, "all-linear"):
        name = chroma.export_name("kohya", "denoiser", path)
        if isinstance(name, FusedName):
            assert path in name.rows
            rows[name.name] = sum(layers[row].out_features for row in name.rows)
        else:
            rows[name] = layers[path].out_features
    double = {"attn_qkv": 3, "attn_proj": 1, "mlp_0": 4, "mlp_2": 1}
    expected = {
        f"lora_unet_double_blocks_{i}_{side}_{name}": 3072 * parts
        for i in range(19)
        for side in ("img", "txt")
        for name, parts in double.items()
    }
    expected |= {f"lora_unet_single_blocks_{i}_linear1": 3072 * 7 for i in range(38)}
    expected |= {f"lora_unet_single_blocks_{i}_linear2": 3072 for i in range(38)}
    assert rows == expected


def test_diffusers_names_are_the_paths_themselves_and_there_is_none_for_t5() -> None:
    assert chroma.export_name("diffusers", "denoiser", "a.b") == "transformer.a.b"
    with pytest.raises(ExportError, match="no diffusers name for text_encoder"):
        chroma.export_name("diffusers", "text_encoder", "encoder.block.0")


def test_diffusers_own_converter_gives_the_same_names_and_shapes(full_size: torch.nn.Module) -> None:
    from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers as convert

    from lorasmith.engine.families._flux_names import to_diffusers

    original = in_original_names(full_size.state_dict())
    ours = {name: value.shape for name, value in to_diffusers(original).items()}
    assert ours == {name: value.shape for name, value in convert(dict(original)).items()}
    assert ours == {name: value.shape for name, value in full_size.state_dict().items()}


# --- files that people have --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    """ComfyUI's three files."""
    place = tmp_path_factory.mktemp("split")
    return BaseFiles(
        "single_file",
        split_files.write(place / "Chroma1-HD.safetensors", original_transformer(folder)),
        "Chroma1-HD.safetensors",
        vae_file=split_files.write(place / "ae.safetensors", split_files.original_autoencoder(folder)),
        encoder_files=(split_files.write(place / "t5xxl.safetensors", split_files.part(folder, "text_encoder")),),
    )


@pytest.fixture(autouse=True)
def tokenizers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where single files find their tokenizer."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizers" / "t5")
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(tmp_path / "tokenizers"))


def test_split_files_give_what_the_folder_gives(parts: BaseFiles, family: Family) -> None:
    own = load(parts)
    assert own.identity.variant == "hd"
    assert own.identity.details["prompt_numbers"] == family.identity.details["prompt_numbers"]
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(own.encode_images(pixels), family.encode_images(pixels))
    torch.testing.assert_close(predicted(own), predicted(family))
    assert own.noise_schedule["shift"] == family.noise_schedule["shift"] == 1.0


def test_all_parts_in_one_fp8_file(folder: Path, parts: BaseFiles, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    files = []
    for kind, weights in enumerate(split_files.in_fp8(original_transformer(folder))):
        pieces = {
            "model.diffusion_model.": weights,
            "vae.": split_files.original_autoencoder(folder),
            "text_encoders.t5xxl.transformer.": split_files.part(folder, "text_encoder"),
        }
        whole: dict[str, Any] = {}
        for prefix, values in pieces.items():
            whole |= load_file(split_files.write(tmp_path / "part.safetensors", values, prefix))
        files.append(split_files.write(tmp_path / f"chroma {kind}.safetensors", whole))
    quantized, meant = (load(locate_base(str(path))) for path in files)
    assert quantized.identity.precision == "fp8"
    torch.testing.assert_close(predicted(quantized), predicted(meant))


def test_missing_parts_are_named_and_refused(parts: BaseFiles) -> None:
    alone = dataclasses.replace(parts, vae_file=None, encoder_files=())
    with pytest.raises(BaseModelError, match="has no vae and no text_encoder"):
        load(alone)


# --- what a file is ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(full_size: torch.nn.Module) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in in_original_names(full_size.state_dict()).items()}


@pytest.mark.parametrize(
    ("name", "variant", "side"),
    [
        ("Chroma1-HD.safetensors", "hd", 1024),
        ("Chroma1-Base.safetensors", "base", 512),
        ("Chroma1-HD-Flash.safetensors", "flash", 1024),
        ("chroma-unlocked-v48.safetensors", "unknown", 1024),
    ],
)
def test_variants_are_guessed_from_the_name(
    tmp_path: Path, shapes: Mapping[str, tuple[int, ...]], name: str, variant: str, side: int
) -> None:
    files = BaseFiles("single_file", split_files.header(tmp_path / name, shapes), name)
    _, identity = identify_base(files)
    assert (identity.family, identity.variant, identity.native_resolution) == ("chroma", variant, side)
    assert ("guessed" in identity.label) == (variant != "unknown")
    assert "8.90 B" in identity.label
    assert identity.parts_missing == ("vae", "text_encoder")
    assert variant in chroma.SPEC.uses


def test_flash_draws_in_few_steps_without_guidance(family: Family, parts: BaseFiles) -> None:
    flash = dataclasses.replace(parts, origin="lodestones/Chroma1-Flash")
    _, identity = identify_base(flash)
    assert (identity.details["draw_steps"], identity.details["draw_guidance"]) == (16, 1.0)
    assert usual_drawing(family) == (40, 3.0)


def test_pixel_space_chroma_is_not_taken_for_it(tmp_path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Chroma1-Radiance draws pixels, without an autoencoder: its first layer is `img_in_patch`."""
    radiance = {name: shape for name, shape in shapes.items() if not name.startswith(("img_in.", "final_layer."))}
    radiance |= {"img_in_patch.weight": (3072, 3, 16, 16), "nerf_final_layer_conv.conv.weight": (3, 64, 3, 3)}
    files = BaseFiles("single_file", split_files.header(tmp_path / "radiance.safetensors", radiance), "radiance")
    with pytest.raises(BaseModelError, match="no base model that lorasmith knows"):
        identify_base(files)
