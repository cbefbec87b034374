"""Stable Diffusion 3.5 in the files that people have: every layout, what each says of itself, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import Family, families, identify_base, present_text_parts, sd35, usual_drawing
from lorasmith.engine.sources import BaseFiles, locate_base
from tests import split_files
from tests.engine.loaded_models import CPU, full_size_sd35, load, pixels, predicted
from tests.tiny_sd35 import FIRST, JOINT, SECOND, TinyFiles, build_tiny_files, build_tiny_sd35, original_name


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    return build_tiny_files(tmp_path_factory.mktemp("sd35"))


@pytest.fixture(scope="module")
def family(files: TinyFiles) -> Family:
    return load(locate_base(str(files.folder)))


@pytest.fixture(scope="module")
def full_size() -> dict[str, Any]:
    return full_size_sd35()


@pytest.mark.parametrize("layout", ["whole", "transformer", "diffusers_transformer"])
def test_every_layout_of_files_gives_the_folders_model(
    layout: str, files: TinyFiles, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(files.folder.parent))
    path = getattr(files, layout)
    located = BaseFiles("single_file", path, path.name)
    if layout != "whole":
        located = BaseFiles("single_file", path, path.name, files.vae, files.encoders)
    single = load(located)
    assert single.identity.parts_missing == ()
    assert single.identity.parameters == family.identity.parameters
    assert single.identity.native_resolution == 1024
    assert single.identity.details["prompt_numbers"] == (77 + 256) * JOINT + FIRST + SECOND
    for part in ("denoiser", *sd35.SPEC.text_parts):
        ours = single.denoiser if part == "denoiser" else single.text_encoders[part]
        theirs = family.denoiser if part == "denoiser" else family.text_encoders[part]
        found, expected = ours.state_dict(), theirs.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    torch.testing.assert_close(single.encode_images(pixels()), family.encode_images(pixels()))
    torch.testing.assert_close(predicted(single), predicted(family))
    assert single.noise_schedule["shift"] == 3.0


def test_fp8_weights_are_scaled_back(files: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(files.folder.parent))
    plain = {name.removeprefix("model.diffusion_model."): value for name, value in load_file(files.transformer).items()}
    stored, meant = split_files.in_fp8(plain)
    path = split_files.write(tmp_path / "fp8.safetensors", stored)
    single = load(BaseFiles("single_file", path, path.name, files.vae, files.encoders))
    assert ", fp8, " in single.identity.label
    ours = single.denoiser.state_dict()["transformer_blocks.1.attn.to_k.weight"]
    assert torch.equal(ours, meant["joint_blocks.1.x_block.attn.qkv.weight"].chunk(3)[1])


def test_a_file_of_its_own_does_not_need_t5_but_the_rest(files: TinyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(files.folder.parent))
    path, clips = files.transformer, files.encoders[1:]
    single = load(BaseFiles("single_file", path, path.name, files.vae, clips))
    assert "without T5" in single.identity.label
    assert len(single.tokenizers) == 2  # type: ignore[attr-defined]
    located = BaseFiles("single_file", path, path.name, None, clips[:1])
    module, identity = identify_base(located)
    assert "vae" in identity.parts_missing
    assert len(identity.parts_missing) == 2
    with pytest.raises(BaseModelError, match="has no vae") as caught:
        module.load(located, identity, CPU, torch.float32)
    assert "base.vae" in caught.value.fix
    assert "base.text_encoders" in caught.value.fix


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_a_weight_that_is_missing_or_left_over_is_named(
    change: str, files: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASMITH_TOKENIZERS", str(files.folder.parent))
    weights, name = load_file(files.transformer), "model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight"
    value = weights.pop(name)
    if change == "left over":
        weights |= {name: value, name.replace("fc1", "fc9"): value}
    path = split_files.write(tmp_path / "broken.safetensors", weights)
    with pytest.raises(BaseModelError, match="does not fit its kind of model") as caught:
        load(BaseFiles("single_file", path, path.name, files.vae, files.encoders))
    assert ("mlp.fc1.weight" if change == "missing" else "mlp.fc9.weight") in caught.value.why


# --- what files are ----------------------------------------------------------------------------------------------


def full_header(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in network.state_dict().items():
        module, _, kind = name.rpartition(".")
        ours = "pos_embed" if name == "pos_embed.pos_embed" else f"{original_name(module)}.{kind}"
        fused = ".qkv." in ours
        shapes[ours] = (value.shape[0] * 3, *value.shape[1:]) if fused else tuple(value.shape)
    return {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}


def test_full_size_files_are_told_apart_with_how_they_draw(full_size: dict[str, Any], tmp_path: Path) -> None:
    cases = (
        ("medium", "sd3.5_medium", "Stable Diffusion 3.5 Medium, bf16, 2.24 B, without T5", (40, 4.5)),
        ("large", "sd3.5_large", "Stable Diffusion 3.5 Large, bf16, 8.06 B, without T5", (28, 3.5)),
        ("large", "sd3.5_large_turbo", "Stable Diffusion 3.5 Large Turbo (by its name), bf16", (4, 1.0)),
    )
    for variant, name, words, drawing in cases:
        path = split_files.header(tmp_path / f"{name}.safetensors", full_header(full_size[variant]))
        identity = sd35.identify(locate_base(str(path)))
        assert identity is not None
        assert identity.label.startswith(words)
        assert identity.variant in sd35.SPEC.uses
        assert identity.prediction == "velocity"
        assert (identity.details["draw_steps"], identity.details["draw_guidance"]) == drawing
        assert identity.details["prompt_numbers"] == sd35.SPEC.prompt_numbers
        assert identity.parts_missing == ("vae", "text_encoder", "text_encoder_2")


def test_no_other_family_takes_it(files: TinyFiles) -> None:
    for path in (files.folder, files.whole, files.transformer, files.diffusers_transformer):
        located = locate_base(str(path))
        assert [name for name, module in families().items() if module.identify(located)] == ["sd35"]


def test_a_folder_that_lost_its_t5_says_so_and_a_small_one_draws_as_the_family(
    files: TinyFiles, family: Family, tmp_path: Path
) -> None:
    assert usual_drawing(family) == (28, 4.5)
    base = shutil.copytree(files.folder, tmp_path / "base")
    shutil.rmtree(base / "text_encoder_3")
    identity = sd35.identify(locate_base(str(base)))
    assert identity is not None
    assert identity.parts_missing == ("text_encoder_3",)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: stabilityai-ai-community\n---\n")
    index = base / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder_3": [None, None]}))
    identity = sd35.identify(locate_base(str(base)))
    assert identity is not None
    assert identity.parts_missing == ()
    assert identity.details["license"] == "stabilityai-ai-community"


def test_what_is_cached_without_t5_is_found_by_the_encoders_that_are_there(tmp_path: Path) -> None:
    located = locate_base(str(build_tiny_sd35(tmp_path / "base", with_t5=False)))
    identity = sd35.identify(located)
    assert identity is not None
    parts = present_text_parts(sd35.SPEC, identity)
    assert parts == ("text_encoder", "text_encoder_2")
    assert len(located.fingerprint(*parts)) == 64
    with pytest.raises(BaseModelError, match="no text_encoder_3"):
        located.fingerprint(*sd35.SPEC.text_parts)
