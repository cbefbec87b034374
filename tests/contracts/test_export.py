"""One body over every family: whatever it adapts, each of its layouts proves, and refuses a file with a wrong key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.engine.adapters import Adapter, attach_adapter
from lorasmith.engine.config import AdapterSettings, ExportSettings, RunConfig
from lorasmith.engine.errors import ExportError
from lorasmith.engine.export import export_lora, verify_export
from lorasmith.engine.export.rules import read_changes
from lorasmith.engine.families import Family, families, identify_base
from lorasmith.engine.sources import locate_base
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
def test_every_layout_of_the_family_proves(base: Path, tmp_path: Path, kind: str) -> None:
    family, adapter = trained(base, ADAPTERS[kind])
    layouts = list(family.spec.layouts)
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


def test_a_renamed_key_is_refused_in_every_layout(base: Path, tmp_path: Path) -> None:
    family, adapter = trained(base, ADAPTERS["lora"])
    config = RunConfig(export=ExportSettings(layouts=list(family.spec.layouts)))  # type: ignore[arg-type]
    for result in export_lora(family, adapter, config, tmp_path, "x", {}, 1):
        tensors = load_file(result.path)
        key = sorted(tensors)[-1]
        tensors["x" + key] = tensors.pop(key)
        save_file(tensors, result.path)
        with pytest.raises(ExportError, match="unknown key"):
            verify_export(result.path, result.layout, family, adapter)
