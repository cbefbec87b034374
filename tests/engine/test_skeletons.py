"""Base models as skeletons: what loading builds, without a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import Family, identify_base
from lorasmith.engine.families._loading import builds_skeletons, skeletons
from lorasmith.engine.sources import BaseFiles, locate_base
from tests import split_files
from tests.original_flux import original_transformer
from tests.tiny import TINY_BUILDERS
from tests.tiny_flux2 import build_tiny_flux2_dev
from tests.tiny_ldm import build_tiny_checkpoint

META, CPU = torch.device("meta"), torch.device("cpu")
BUILDERS = {**TINY_BUILDERS, "flux2 dev": build_tiny_flux2_dev}
Table = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def load(files: BaseFiles, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Family:
    module, identity = identify_base(files)
    return module.load(files, identity, device, dtype)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No weight can be read."""
    import safetensors
    import safetensors.torch

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("a weight file was opened")

    for place, name in ((safetensors, "safe_open"), (safetensors.torch, "load_file"), (torch, "load")):
        monkeypatch.setattr(place, name, refuse)
    with skeletons():
        yield


def parts_of(family: Any) -> dict[str, nn.Module]:
    return {"denoiser": family.denoiser, "vae": family._vae, **family.text_encoders}


def weights_of(module: nn.Module) -> Table:
    return {name: (tuple(value.shape), value.dtype) for name, value in module.state_dict().items()}


def require_alike(skeleton: Family, loaded: Family) -> None:
    for name, part in parts_of(loaded).items():
        bare = parts_of(skeleton)[name]
        assert {tensor.device.type for tensor in (*bare.parameters(), *bare.buffers())} == {"meta"}
        assert weights_of(bare) == weights_of(part)
        numbers = [sum(weight.numel() for weight in module.parameters()) for module in (bare, part)]
        assert numbers[0] == numbers[1], f"{name}: tied weights count once"
        kinds = [[type(module) for module in whole.modules()] for whole in (bare, part)]
        assert kinds[0] == kinds[1]
        assert not any(weight.requires_grad for weight in bare.parameters())
        modes = [[module.training for module in whole.modules()] for whole in (bare, part)]
        assert modes[0] == modes[1]


@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_folder_gives_the_same_networks_without_a_weight(name: str, tmp_path: Path, request: Any) -> None:
    files = locate_base(str(BUILDERS[name](tmp_path / "base")))
    loaded = load(files, CPU)
    request.getfixturevalue("no_weights")
    require_alike(load(files, META), loaded)


def split_base(family: str, folder: Path, place: Path) -> BaseFiles:
    encoder = split_files.part(folder, "text_encoder")
    if family == "chroma":
        return BaseFiles(
            "single_file",
            split_files.write(place / "Chroma1-HD.safetensors", original_transformer(folder)),
            "Chroma1-HD.safetensors",
            vae_file=split_files.write(place / "ae.safetensors", split_files.original_autoencoder(folder)),
            encoder_files=(split_files.write(place / "t5xxl.safetensors", encoder),),
        )
    stored, _ = split_files.in_fp8(split_files.part(folder, "transformer"))
    return BaseFiles(
        "single_file",
        split_files.write(place / "z_image_fp8.safetensors", stored),
        "z_image_fp8.safetensors",
        vae_file=split_files.write(place / "ae.safetensors", split_files.original_autoencoder(folder)),
        encoder_files=(split_files.write(place / "qwen_3_4b.safetensors", encoder, "model."),),
    )


@pytest.mark.parametrize("family", ["chroma", "z_image"])
def test_single_files_give_the_same_networks_by_their_headers(
    family: str, tmp_path: Path, request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = TINY_BUILDERS[family](tmp_path / "base")
    monkeypatch.setattr(f"lorasmith.engine.families.{family}.load_tokenizers", lambda files: [])
    files = split_base(family, folder, tmp_path)
    loaded = load(files, CPU)
    request.getfixturevalue("no_weights")
    require_alike(load(files, META), loaded)


def test_a_checkpoint_in_the_original_layout_gives_the_same_networks(tmp_path: Path, request: Any) -> None:
    _, path = build_tiny_checkpoint(tmp_path)
    files = locate_base(str(path))
    module, identity = identify_base(files)
    request.getfixturevalue("no_weights")
    skeleton = module.load(files, identity, META, torch.float32)
    tensors = {
        name: info.shape for name, info in files.tensors("").items() if name.startswith("model.diffusion_model.")
    }
    assert sum(weight.numel() for weight in skeleton.denoiser.parameters()) == identity.parameters
    assert len(skeleton.denoiser.state_dict()) == len(tensors)


def test_a_file_whose_shapes_do_not_fit_is_refused(tmp_path: Path, request: Any) -> None:
    folder = TINY_BUILDERS["z_image"](tmp_path / "base")
    with_weights = split_base("z_image", folder, tmp_path)
    shapes = {name: info.shape for name, info in with_weights.tensors("").items()}
    shapes["cap_embedder.1.weight"] = (7, 7)
    wrong = split_files.header(tmp_path / "wrong.safetensors", shapes)
    request.getfixturevalue("no_weights")
    with pytest.raises(BaseModelError, match=r"The transformer of .* does not fit"):
        load(dataclasses.replace(with_weights, path=wrong), META)


def test_weights_are_read_again_behind_the_context() -> None:
    with skeletons():
        assert builds_skeletons()
    assert not builds_skeletons()
    with pytest.raises(RuntimeError), skeletons():
        raise RuntimeError
    assert not builds_skeletons()
