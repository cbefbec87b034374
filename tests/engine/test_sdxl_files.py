"""Stable Diffusion XL in the files that people have: every layout, what each says of itself, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import Family, families, identify_base, sdxl
from lorasmith.engine.sources import BaseFiles, locate_base
from tests import split_files
from tests.engine.loaded_models import CPU, full_size_sdxl, load, pixels, predicted
from tests.tiny_sdxl import FIRST, SECOND, build_tiny_sdxl, tiny_clip
from tests.tiny_sdxl_files import TinyFiles, build_tiny_files, sdxl_unet_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    return build_tiny_files(tmp_path_factory.mktemp("sdxl-files"))


@pytest.fixture(scope="module")
def full_size() -> dict[str, torch.nn.Module]:
    return full_size_sdxl()


def same_weights(own: Family, other: Family) -> None:
    for part in ("denoiser", *sdxl.SPEC.text_parts):
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


def test_parts_of_another_model_are_refused_before_anything_is_loaded(files: TinyFiles, tmp_path: Path) -> None:
    first, second = files.encoders
    other = split_files.write(tmp_path / "clip_h.safetensors", tiny_clip(48, projected=True).state_dict())
    wide = load_file(files.vae) | {"decoder.conv_in.weight": torch.zeros(8, 16, 3, 3)}
    vae = split_files.write(tmp_path / "ae.safetensors", wide)
    for located, words in (
        (BaseFiles("single_file", files.unet, "unet", files.vae, (first, other)), "clip_h.safetensors and clip_l"),
        (BaseFiles("single_file", files.unet, "unet", vae, (first, second)), "autoencoder in ae.safetensors"),
        (BaseFiles("folder", files.folder, "folder", vae), "autoencoder in ae.safetensors"),
    ):
        with pytest.raises(BaseModelError, match=f"{words}.* belongs? to another base model"):
            load(located)


def test_a_damaged_unet_is_refused_with_the_weight_that_lacks(
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


def test_a_folder_tells_its_scheduler_license_and_pipeline(folder: Path, tmp_path: Path) -> None:
    zero_snr = build_tiny_sdxl(tmp_path / "v", "v_prediction", zero_snr=True)
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
