"""Files of every adapter kind: what readers make of them, by formulas written out here, and fused names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.engine.adapters import Adapter, attach_adapter
from lorasmith.engine.config import AdapterSettings, ExportSettings, RunConfig
from lorasmith.engine.errors import ConfigError, ExportError
from lorasmith.engine.export import MAX_HEADER_BYTES, export_lora, require_exportable, verify_export
from lorasmith.engine.export.changes import Change, base_weight
from lorasmith.engine.export.layouts import build_tensors, entries, layer_of
from lorasmith.engine.export.rules import Stored, change_of, read_changes
from lorasmith.engine.families import Family, FusedName, sd15
from tests.engine.running import load_tiny

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True, "alpha": 2.0},
    "pissa": {"init": "pissa"},
    "dora": {"kind": "dora", "alpha": 2.0},
    "dora conv": {"kind": "dora", "convolutions": True, "conv_rank": 2},
    "loha": {"kind": "loha", "alpha": 2.0},
    "lokr": {"kind": "lokr", "alpha": 2.0, "lokr_factor": 4},
    "lokr full": {"kind": "lokr", "alpha": 2.0, "lokr_full": True},
    "lokr conv": {"kind": "lokr", "convolutions": True, "conv_rank": 1, "conv_alpha": 2.0},
    "oft": {"kind": "oft", "block_size": 4},
    "boft": {"kind": "boft", "block_size": 4},
    "oft conv": {"kind": "oft", "block_size": 6, "convolutions": True},
    "boft conv": {"kind": "boft", "block_size": 2, "convolutions": True},
}


def moved(family: Family, kind: str, size: float = 0.05) -> Adapter:
    """An adapter of which every number is away from where it began."""
    adapter = attach_adapter(family, AdapterSettings(**{"rank": 4, "alpha": 4.0, **KINDS[kind]}), seed=1)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in adapter.modules:
            for tensor in module.tensors.values():
                tensor.add_(torch.randn(tensor.shape, generator=draw) * size)
    return adapter


def files_of(family: Family, adapter: Adapter, folder: Path) -> dict[str, Path]:
    layouts: Any = list(family.spec.layouts)
    config = RunConfig(export=ExportSettings(layouts=layouts, precision="fp16"))
    return {result.layout: result.path for result in export_lora(family, adapter, config, folder, "x", {}, 1)}


PROVED = [
    pytest.param(
        kind, marks=pytest.mark.campaign if kind in ("dora conv", "lokr conv", "lokr full", "boft conv") else ()
    )
    for kind in KINDS
]


@pytest.mark.parametrize("kind", PROVED)
def test_every_kind_proves_in_every_layout(tiny_sd15: Path, tmp_path: Path, kind: str) -> None:
    family = load_tiny(tiny_sd15)
    adapter = moved(family, kind)
    paths = files_of(family, adapter, tmp_path)
    for layout, path in paths.items():
        # Another number in one tensor is found, whatever the kind.
        tensors = load_file(path)
        key = next(key for key, tensor in tensors.items() if tensor.numel() > 1 and not key.endswith("dora_scale"))
        tensors[key] = tensors[key] + 0.3
        save_file(tensors, tmp_path / "changed.safetensors")
        with pytest.raises(ExportError, match="another weight change"):
            verify_export(tmp_path / "changed.safetensors", layout, family, adapter)


def loha(t: dict[str, Tensor], weight: Tensor) -> Tensor:
    product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    return product * t["alpha"] / t["hada_w1_b"].shape[0]


def lokr(t: dict[str, Tensor], weight: Tensor) -> Tensor:
    second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    strength = 1.0 if "lokr_w2" in t else t["alpha"] / t["lokr_w2_b"].shape[0]
    out = torch.zeros(weight.shape)
    rows, columns = second.shape
    for i in range(t["lokr_w1"].shape[0]):
        for j in range(t["lokr_w1"].shape[1]):
            out[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = t["lokr_w1"][i, j] * second * strength
    return out


def comfyui_dora(t: dict[str, Tensor], weight: Tensor) -> Tensor:
    # Divided by the length of the unchanged row: comfy/weight_adapter/base.py.
    changed = weight + t["lora_up.weight"] @ t["lora_down.weight"] * t["alpha"] / t["lora_down.weight"].shape[0]
    return changed * t["dora_scale"] / weight.norm(dim=1, keepdim=True) - weight


def rotations(t: dict[str, Tensor]) -> Tensor:
    skew = t["oft_blocks"] - t["oft_blocks"].transpose(-1, -2)
    if 0 < t["alpha"] < skew.norm():
        skew = skew * t["alpha"] / skew.norm()
    eye = torch.eye(skew.shape[-1])
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def comfyui_oft(t: dict[str, Tensor], weight: Tensor) -> Tensor:
    """Output m of block k becomes the sum over n of R[k, n, m] times output n: comfy/weight_adapter/oft.py."""
    matrix = torch.block_diag(*[turn.T for turn in rotations(t)])
    return (matrix @ weight.flatten(1)).reshape(weight.shape) - weight


def comfyui_boft(t: dict[str, Tensor], weight: Tensor) -> Tensor:
    """Stage i turns blocks made of pairs of outputs 2^i · b / 2 apart: comfy/weight_adapter/boft.py."""
    outputs = weight.shape[0]
    matrix = torch.eye(outputs)
    for stage, blocks in enumerate(rotations(t)):
        stride = 2**stage * blocks.shape[-1] // 2
        firsts = [row for row in range(outputs) if row // stride % 2 == 0]
        order = [row for first in firsts for row in (first, first + stride)]
        place = torch.eye(outputs)[order]
        matrix = place.T @ torch.block_diag(*blocks) @ place @ matrix
    return (matrix @ weight.flatten(1)).reshape(weight.shape) - weight


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("loha", loha),
        ("lokr", lokr),
        ("lokr full", lokr),
        ("dora", comfyui_dora),
        ("oft conv", comfyui_oft),
        ("boft conv", comfyui_boft),
    ],
)
def test_the_written_out_formula_of_other_programs_gives_what_was_trained(
    tiny_sd15: Path, kind: str, formula: Callable[[dict[str, Tensor], Tensor], Tensor]
) -> None:
    family = load_tiny(tiny_sd15)
    adapter = moved(family, kind)
    tensors = build_tensors(family, adapter, "kohya", torch.float32)
    for module in adapter.modules[:6]:
        name = str(sd15.export_name("kohya", module.component, module.path))
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        exact = adapter.delta(module)
        found = formula(own, base_weight(layer_of(family, module.component, module.path)))
        torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-4)


def test_lengths_of_dora_have_the_shape_that_comfyui_takes_for_rows(tiny_sd15: Path) -> None:
    family = load_tiny(tiny_sd15)
    tensors = build_tensors(family, moved(family, "dora"), "kohya", torch.float16)
    scales = {key: tensor for key, tensor in tensors.items() if key.endswith(".dora_scale")}
    assert scales
    for key, tensor in scales.items():
        assert tensor.shape == (tensors[key.replace("dora_scale", "lora_up.weight")].shape[0], 1)
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize(("shape", "formula"), [((2, 4, 4), comfyui_oft), ((2, 2, 4, 4), comfyui_boft)])
def test_rotations_of_outputs_are_read_as_comfyui_means_them(
    shape: tuple[int, ...], formula: Callable[[dict[str, Tensor], Tensor], Tensor], alpha: float
) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, blocks = torch.randn(8, 6, generator=draw), torch.randn(shape, generator=draw)
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(alpha)}
    found = change_of(Stored("x", tensors), weight).written_out()
    torch.testing.assert_close(found.float(), formula(tensors, weight), atol=1e-4, rtol=1e-4)
    scaled = change_of(Stored("x", {**tensors, "rescale": torch.full((8, 1), 2.0)}), weight).written_out()
    torch.testing.assert_close(scaled + weight, 2.0 * (found + weight))


def test_rotations_of_inputs_are_read_as_peft_means_them() -> None:
    from peft import OFTConfig, get_peft_model

    draw = torch.Generator().manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 6))
    weight = base[0].weight.detach().clone()
    model = get_peft_model(base, OFTConfig(target_modules=["0"], r=0, oft_block_size=4, use_cayley_neumann=False))
    layer: Any = base[0]
    numbers = layer.oft_R["default"].weight
    with torch.no_grad():
        numbers.copy_(torch.randn(numbers.shape, generator=draw))
    merged = model.merge_and_unload()[0].weight  # type: ignore[operator]
    found = change_of(Stored("x", {"oft_R.weight": numbers.detach()}), weight).written_out()
    torch.testing.assert_close((weight + found).float(), merged.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stages", [1, 2])
def test_butterflies_of_inputs_are_the_products_of_pefts_matrices(stages: int) -> None:
    draw = torch.Generator().manual_seed(0)
    blocks, lengths = torch.randn(stages, 4, 4, 4, generator=draw), torch.rand(6, 1, generator=draw) + 0.5
    product, weight = torch.eye(16), torch.randn(6, 16, generator=draw)
    for stage in range(stages):
        skew = 0.5 * (blocks[stage] - blocks[stage].transpose(1, 2))
        turned = torch.block_diag(*[(torch.eye(4) - s) @ torch.linalg.inv(torch.eye(4) + s) for s in skew])
        order = BOFTLayer.block_butterfly_perm(None, 16, 4 // 2**stage, 2, stages - 1)
        matrix = BOFTLayer.perm2mat(None, order)
        product = matrix @ turned @ matrix.T @ product
    found = change_of(Stored("x", {"boft_R": blocks, "boft_s": lengths}), weight).written_out()
    torch.testing.assert_close((weight + found).float(), lengths * (weight @ product.T), rtol=1e-4, atol=1e-5)


def test_two_large_products_with_a_small_difference_survive_16_bits(tiny_sd15: Path) -> None:
    # PiSSA's change is B A - B0 A0, each far larger than the difference.
    family = load_tiny(tiny_sd15)
    adapter = moved(family, "pissa", size=1e-3)
    changes = read_changes(build_tensors(family, adapter, "kohya", torch.float16))
    for module in adapter.modules:
        found, exact = changes[str(sd15.export_name("kohya", module.component, module.path))], adapter.delta(module)
        assert isinstance(found, Change)
        assert found.down.shape[0] == 8
        assert (found.written_out() - exact).norm() <= 1e-3 * exact.norm()


@pytest.fixture
def fused(tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """The tiny base with queries, keys and values of self-attention stored as one, in the kohya layout."""
    plain = sd15.export_name

    def export_name(layout: str, component: str, module: str) -> str | FusedName:
        block, _, part = module.rpartition(".")
        if layout == "kohya" and block.endswith("attn1") and part in ("to_q", "to_k", "to_v"):
            rows = tuple(f"{block}.{name}" for name in ("to_q", "to_k", "to_v"))
            return FusedName(f"lora_unet_{block.replace('.', '_')}_qkv", rows)
        return plain(layout, component, module)

    monkeypatch.setattr(sd15, "export_name", export_name)
    return load_tiny(tiny_sd15)


def test_fused_layers_are_stacked_exactly_and_missing_ones_are_zero_rows(fused: Family) -> None:
    adapter = attach_adapter(fused, AdapterSettings(rank=2, alpha=1.0, exclude=["attn1.to_k"]), seed=1)
    with torch.no_grad():
        for module in adapter.modules:
            module.up.normal_()
    tensors = build_tensors(fused, adapter, "kohya", torch.float32)
    changes = read_changes(tensors)
    name = next(entry.name for entry in entries(fused, adapter, "kohya") if entry.fused)
    found = changes[name].written_out()
    query = next(module for module in adapter.modules if module.path.endswith("attn1.to_q"))
    value = next(module for module in adapter.modules if module.path == query.path.replace("to_q", "to_v"))
    rows = query.up.shape[0]
    assert found.shape == (3 * rows, query.down.shape[1])
    torch.testing.assert_close(found[:rows], adapter.delta(query))
    assert found[rows : 2 * rows].abs().max() == 0
    torch.testing.assert_close(found[2 * rows :], adapter.delta(value))


def test_the_proof_of_a_fused_file_finds_a_wrong_row(
    fused: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.engine.export.proof.loads_kind", lambda spec, kind, layout: ("ComfyUI",))
    adapter = attach_adapter(fused, AdapterSettings(rank=2, alpha=1.0, exclude=["attn1.to_k"]), seed=1)
    with torch.no_grad():
        for module in adapter.modules:
            module.up.normal_()
    tensors = build_tensors(fused, adapter, "kohya", torch.float32)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    assert verify_export(path, "kohya", fused, adapter) == len(tensors)
    key = next(key for key in tensors if key.endswith("_qkv.lora_up.weight"))
    rows = tensors[key].shape[0] // 3
    for row, words in ((0, "another weight change"), (rows, "a layer that was not trained")):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed[key][row] += 1.0
        save_file(changed, path)
        with pytest.raises(ExportError, match=words):
            verify_export(path, "kohya", fused, adapter)


def test_kinds_that_cannot_be_fused_are_refused_before_the_training(fused: Family) -> None:
    adapter = attach_adapter(fused, AdapterSettings(kind="loha", rank=2, alpha=1.0), seed=1)
    with pytest.raises(ConfigError, match="kohya layout cannot hold a loha"):
        require_exportable(fused, adapter, RunConfig(export=ExportSettings(layouts=["kohya"])))
    require_exportable(fused, adapter, RunConfig(export=ExportSettings(layouts=["diffusers"])))


def test_a_header_that_would_be_too_long_goes_without_its_tags(tiny_sd15: Path, tmp_path: Path) -> None:
    family = load_tiny(tiny_sd15)
    adapter = moved(family, "rslora")
    long = {"ss_tag_frequency": "x" * (MAX_HEADER_BYTES + 10), "ss_seed": "5"}
    config = RunConfig(export=ExportSettings(layouts=["kohya"]))
    (result,) = export_lora(family, adapter, config, tmp_path, "x", long, 1)
    head = result.path.read_bytes()[: 8 + 4000]
    assert int.from_bytes(head[:8], "little") < MAX_HEADER_BYTES
    assert b"ss_seed" in head
    assert b"ss_tag_frequency" not in head


def test_a_change_is_truncated_to_the_nearest_of_its_rank() -> None:
    draw = torch.Generator().manual_seed(0)
    change = Change(torch.randn(6, 10, generator=draw), torch.randn(8, 6, generator=draw), 0.5)
    exact = change.written_out()
    torch.testing.assert_close(change.balanced().written_out(), exact, atol=1e-5, rtol=1e-5)
    values = torch.linalg.svdvals(exact)
    near = change.balanced(2)
    assert near.down.shape == (2, 10)
    gap = float((near.written_out() - exact).norm())
    assert gap == pytest.approx(float(values[2:].square().sum().sqrt()), rel=1e-4)
