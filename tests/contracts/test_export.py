"""One body over every family: whatever it adapts, each of its layouts proves, and refuses a file with a wrong key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.engine.adapters import Adapter, attach_adapter
from lorasmith.engine.compatibility import layout_errors
from lorasmith.engine.config import AdapterSettings, ExportSettings, RunConfig
from lorasmith.engine.errors import ExportError
from lorasmith.engine.export import export_lora, verify_export
from lorasmith.engine.export.changes import adaptable_layers
from lorasmith.engine.export.rules import read_changes
from lorasmith.engine.families import Family, FamilySpec, FusedName, families, identify_base
from lorasmith.engine.lora_files import start_adapter
from lorasmith.engine.sources import locate_base, read_header
from tests.tiny import TINY_BUILDERS

RANK = 4
ADAPTERS = {
    "lora": AdapterSettings(rank=RANK, alpha=1.0),
    "lora with mlp": AdapterSettings(rank=RANK, alpha=2.0, targets="attention-mlp"),
    "locon": AdapterSettings(kind="locon", rank=RANK, alpha=8.0, conv_rank=3, conv_alpha=1.5, targets="attention-mlp"),
    "with text encoder": AdapterSettings(rank=RANK, alpha=4.0, text_encoder=True),
}


@pytest.fixture(scope="module", params=sorted(TINY_BUILDERS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY_BUILDERS[request.param](tmp_path_factory.mktemp("contract") / request.param)


def trained(folder: Path, settings: AdapterSettings) -> tuple[Family, Adapter]:
    files = locate_base(str(folder))
    module, identity = identify_base(files)
    if settings.text_encoder and not module.SPEC.trainable_text_encoders:
        pytest.skip("no trainer trains this base model's text encoders")
    family = module.load(files, identity, torch.device("cpu"), torch.float32)
    adapter = attach_adapter(family, settings, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapted in adapter.modules:
            adapted.up.copy_(torch.randn(adapted.up.shape, generator=draw) * 0.01)
    return family, adapter


def test_every_family_has_a_tiny_model_to_prove_its_layouts_with() -> None:
    assert set(families()) == set(TINY_BUILDERS)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_layout_of_the_family_proves(base: Path, tmp_path: Path, kind: str, campaign: bool) -> None:
    if not campaign and kind in ("lora", "locon") and not spec_of(base).conv_targets:
        pytest.skip("without convolutions it is a part of the LoRA with mlp; `make test-all` runs it")
    if ADAPTERS[kind].text_encoder and not spec_of(base).trainable_text_encoders:
        pytest.skip("its text encoders are not trained")
    family, adapter = trained(base, ADAPTERS[kind])
    settings = RunConfig(adapter=ADAPTERS[kind], export=ExportSettings(layouts=list(family.spec.layouts)))  # type: ignore[arg-type]
    assert all("no names" in problem for problem in layout_errors(settings, family.spec))
    layouts = [name for name in family.spec.layouts if not layout_errors(only(settings, name), family.spec)]
    config = RunConfig(export=ExportSettings(layouts=layouts, precision="fp16"))  # type: ignore[arg-type]
    results = export_lora(family, adapter, config, tmp_path, "x", {}, 1)
    assert [result.layout for result in results] == layouts
    for result in results:
        # In sum here, by the reader that knows no families; one by one inside the proof.
        changes = read_changes(load_file(result.path)).values()
        found = sum(float(change.written_out().double().square().sum()) for change in changes)
        exact = sum(float(adapter.delta(module).double().square().sum()) for module in adapter.modules)
        assert found == pytest.approx(exact, rel=2e-3)
        assert exact > 0


def spec_of(base: Path) -> FamilySpec:
    return identify_base(locate_base(str(base)))[0].SPEC


def only(config: RunConfig, layout: str) -> RunConfig:
    return config.model_copy(update={"export": ExportSettings(layouts=[layout])})  # type: ignore[list-item]


def test_the_family_says_which_layouts_store_layers_fused(base: Path) -> None:
    family, _ = trained(base, ADAPTERS["lora"])
    module = families()[family.spec.name]
    paths = [path for path, _ in adaptable_layers(family.denoiser)]
    fused = {
        layout
        for layout in family.spec.layouts
        if any(isinstance(module.export_name(layout, "denoiser", path), FusedName) for path in paths)
    }
    assert fused == set(family.spec.fused_layouts)


@pytest.mark.campaign  # the matrix has a covering part
def test_each_layout_is_read_back_into_the_layers_that_were_trained(base: Path, tmp_path: Path) -> None:
    family, adapter = trained(base, ADAPTERS["lora with mlp"])
    config = RunConfig(export=ExportSettings(layouts=list(family.spec.layouts), precision="fp32"))  # type: ignore[arg-type]
    for result in export_lora(family, adapter, config, tmp_path, "x", {}, 1):
        again, other = trained(base, ADAPTERS["lora with mlp"])
        words = start_adapter(other, result.path, again)
        assert f"{len(other.modules)} layers taken over" in words
        for found, exact in zip(other.modules, adapter.modules, strict=True):
            wanted = adapter.delta(exact)
            assert (other.delta(found) - wanted).norm() <= 1e-4 * wanted.norm(), f"{result.layout}: {words}"


def test_a_file_that_only_looks_right_is_refused_in_every_layout(base: Path, tmp_path: Path) -> None:
    """A renamed key, a wrong prefix, and a strength that only the header tells, which diffusers alone would read."""
    family, adapter = trained(base, ADAPTERS["lora"])
    config = RunConfig(export=ExportSettings(layouts=list(family.spec.layouts), precision="fp32"))  # type: ignore[arg-type]
    for result in export_lora(family, adapter, config, tmp_path, "x", {}, 1):
        tensors, header = load_file(result.path), read_header(result.path)[1]
        last, prefix = sorted(tensors)[-1], next(iter(tensors)).partition("_blocks")[0].partition(".")[0]
        for wrong in (
            {name if name != last else f"x{name}": value for name, value in tensors.items()},
            {name.replace(prefix, "model", 1): value for name, value in tensors.items()},
        ):
            save_file(wrong, result.path)
            with pytest.raises(ExportError, match="unknown key"):
                verify_export(result.path, result.layout, family, adapter)
        weak, told = told_by_header(tensors, header)
        save_file(weak, result.path, told)
        with pytest.raises(ExportError, match=r"another weight change|lacks the key"):
            verify_export(result.path, result.layout, family, adapter)


def told_by_header(
    tensors: dict[str, torch.Tensor], header: dict[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """The file with its strength (alpha 1 of rank 4) nowhere but in the header."""
    if any(name.endswith(".alpha") for name in tensors):
        return {name: value for name, value in tensors.items() if not name.endswith(".alpha")}, None
    weak = {name: value * RANK if name.endswith(".lora_B.weight") else value for name, value in tensors.items()}
    told = json.loads(header.get("lora_adapter_metadata", "{}"))
    changed = {key: 1 if key.endswith(".lora_alpha") else value for key, value in told.items()}
    return weak, header | {"lora_adapter_metadata": json.dumps(changed)} if told else None
