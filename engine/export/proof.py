"""The proof of an exported LoRA: the file is opened again and read as other programs read it.

Three steps, each able to refuse the file:
1. every key is one that the family's readers know, none is missing, none is left over;
2. the weight changes, by the rules of ComfyUI and from nothing but the tensors, equal the trained ones; of a name that
   holds several layers, each layer's rows do, and the rows of layers that were not trained are zero;
3. where diffusers loads this kind from this layout, it loads the file into a copy of the base model without weights,
   says nothing, and ends with the same changes. Where it does not, the proof says which reader was checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorasmith.engine.adapter_combinations import ROTATIONS
from lorasmith.engine.compatibility import loads_kind
from lorasmith.engine.errors import ExportError
from lorasmith.engine.export.changes import AnyChange, Change, WholeChange, base_weight, weight_shape
from lorasmith.engine.export.diffusers_check import Place, load_with_diffusers
from lorasmith.engine.export.layouts import (
    Entry,
    entries,
    expected_suffixes,
    known_names,
    layer_of,
    product,
)
from lorasmith.engine.export.rules import Stored, change_of, stored_modules
from lorasmith.engine.quantization import num_weights

if TYPE_CHECKING:
    from lorasmith.engine.adapters import Adapter, AdapterModule
    from lorasmith.engine.families import Family

TOLERANCE = 1e-3
BF16_TOLERANCE = 8e-3
"""bf16 keeps 8 bits: each of the two matrices is off by up to 2**-9, more than TOLERANCE."""
_CANCELLATION = 1e-6
"""What is lost of a changed weight's size when the weight is taken off again in 32 bits."""
_REAL_SHARE = 0.05
"""A base model with fewer of its family's weights than this is one made for tests."""


@dataclass(frozen=True)
class Proof:
    """What was proved: the number of keys, and the modules (`component:path`) whose weight change is zero.

    `readers` says in words whose rules the file was read by.
    """

    keys: int
    unchanged: tuple[str, ...]
    readers: str = ""


@dataclass(frozen=True)
class _Reading:
    """One reader's result for one file."""

    path: Path
    reader: str
    tolerance: float


def verify_export(path: Path, layout: str, family: Family, adapter: Adapter, *, allow_untrained: bool = False) -> int:
    """Prove that the file at `path` holds `adapter` in `layout`, and return the number of its keys.

    Raises ExportError that names the key or module, also for an adapter that changes nothing unless
    `allow_untrained`. The file is left as it is.
    """
    return prove(path, layout, family, adapter, allow_untrained=allow_untrained).keys


def prove(path: Path, layout: str, family: Family, adapter: Adapter, *, allow_untrained: bool = False) -> Proof:
    """Do the three steps of the module's docstring; see `verify_export`."""
    tensors = _read(path)
    held = entries(family, adapter, layout)
    _check_keys(path, tensors, layout, held, known_names(family, layout))
    tolerance = BF16_TOLERANCE if any(t.dtype == torch.bfloat16 for t in tensors.values()) else TOLERANCE
    stored = stored_modules(tensors)
    loaded, readers = _second_reader(path, layout, family, adapter)
    mine = _Reading(path, "ComfyUI's rules give", tolerance)
    theirs = _Reading(path, "diffusers loads", tolerance)
    unchanged = []
    for entry in held:
        rebuilt = _rebuild(family, entry, stored[entry.name])
        if entry.fused:
            _check_untrained_rows(mine, entry, rebuilt)
        for module, first in entry.parts:
            trained = _trained(adapter, module)
            size = trained.distance()
            slack = _slack(family, module)
            found = rebuilt.rows(first, trained.shape[0]) if entry.fused else rebuilt
            _check_change(mine, module.name, trained, size, found, slack)
            if loaded is not None:
                _check_change(theirs, module.name, trained, size, loaded[module.component, module.path], slack)
            if size <= slack:
                unchanged.append(f"{module.component}:{module.path}")
    if len(unchanged) == len(adapter.modules) and not allow_untrained:
        raise ExportError(
            f"{path.name} would change nothing: all {len(unchanged)} modules are as they were before training.",
            why="What was trained is still zero.",
            fix="Train for more steps, or raise optimizer.learning_rate.",
        )
    return Proof(len(tensors), tuple(unchanged), readers)


def _second_reader(
    path: Path, layout: str, family: Family, adapter: Adapter
) -> tuple[dict[Place, AnyChange] | None, str]:
    """Return what diffusers loads by layer, or None where it cannot, and in words who has read the file."""
    kinds = {module.kind for module in adapter.modules}
    if not all("diffusers" in loads_kind(family.spec, kind, layout) for kind in kinds):
        known = all(loads_kind(family.spec, kind, layout) for kind in kinds)
        whose = "ComfyUI's rules" if known else "the rules of its tensors, though no known program has these names"
        return None, f"{whose}; diffusers does not load {' and '.join(sorted(kinds))} from this layout"
    trained = {(module.component, module.path) for module in adapter.modules}
    try:
        found = load_with_diffusers(path, family, {component for component, _ in trained})
    except ExportError as error:
        # Some of its converters assert the sizes of the real model.
        if _is_real(family) or not isinstance(error.__cause__, AssertionError):
            raise
        return None, "ComfyUI's rules; diffusers loads this layout at the real base model's size only"
    # A fused name brings in the layers that lie between trained ones, unchanged.
    extra = [place for place in found.keys() - trained if found[place].distance() > 0]
    if strangers := sorted({*extra, *(trained - found.keys())}):
        component, layer = strangers[0]
        raise ExportError(f"diffusers loads {path.name} into other modules than were trained: {component}:{layer}.")
    return found, "ComfyUI's rules and diffusers' loader"


def _is_real(family: Family) -> bool:
    return num_weights(family.denoiser) > _REAL_SHARE * family.spec.denoiser_parameters


def _rebuild(family: Family, entry: Entry, stored: Stored) -> AnyChange:
    module = entry.module
    if entry.fused:
        return change_of(stored)
    if not stored.needs_weight:
        return change_of(stored, shape=weight_shape(layer_of(family, module.component, module.path)))
    return change_of(stored, _weight(family, module))


def _weight(family: Family, module: AdapterModule) -> torch.Tensor:
    return base_weight(layer_of(family, module.component, module.path))


def _trained(adapter: Adapter, module: AdapterModule) -> AnyChange:
    """Return what was trained: the product itself for a LoRA, which need not be written out."""
    return product(module) if module.kind == "lora" else WholeChange(adapter.delta(module).detach().float().cpu())


def _slack(family: Family, module: AdapterModule) -> float:
    """Return how far off a change may be that is the difference of two weights in 32 bits; 0 for products."""
    if module.kind not in ("dora", *ROTATIONS):
        return 0.0
    return _CANCELLATION * float(torch.linalg.vector_norm(_weight(family, module)))


def _read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is what torch raises where it opens the file
        raise ExportError(f"Cannot read {path.name} again.", why=str(error), fix="Check the disk.") from error


def _check_keys(path: Path, tensors: dict[str, torch.Tensor], layout: str, held: list[Entry], known: set[str]) -> None:
    unknown_modules = sorted({entry.name for entry in held} - known)
    if unknown_modules:
        raise ExportError(f"{path.name}: {unknown_modules[0]} is no name that this base model's readers know.")
    expected = {entry.name + suffix for entry in held for suffix in expected_suffixes(entry, layout)}
    left_over, missing = sorted(set(tensors) - expected), sorted(expected - set(tensors))
    if left_over:
        raise ExportError(
            f"{path.name} has the unknown key {left_over[0]} ({len(left_over)} in all).",
            why=f"{missing[0]} is missing." if missing else "No trained module has that name.",
        )
    if missing:
        raise ExportError(f"{path.name} lacks the key {missing[0]} ({len(missing)} in all).")


def _check_untrained_rows(reading: _Reading, entry: Entry, found: AnyChange) -> None:
    if found.shape[0] != entry.rows:
        raise ExportError(f"{reading.path.name}: {entry.name} has {found.shape[0]} rows, the layers {entry.rows}.")
    free = torch.ones(entry.rows, dtype=torch.bool)
    for module, first in entry.parts:
        free[first : first + module.up.shape[0]] = False
    assert isinstance(found, Change)
    if Change(found.down, found.up[free], found.scale).distance() > 0:
        raise ExportError(f"{reading.path.name}: {entry.name} changes a layer that was not trained.")


def _check_change(
    reading: _Reading, name: str, trained: AnyChange, size: float, found: AnyChange, slack: float
) -> None:
    if trained.shape != found.shape:
        raise ExportError(f"{reading.path.name}: {name} has shape {found.shape}, trained {trained.shape}.")
    gap = trained.distance(found)
    if gap <= slack:
        return
    error = gap / size if size else (math.inf if gap else 0.0)
    # Written so that NaN fails too.
    if not error <= reading.tolerance:
        raise ExportError(
            f"{reading.path.name}: {reading.reader} another weight change for {name} than was trained.",
            why=f"They differ by {error:.2g} of its size; {reading.tolerance:.0e} is allowed.",
            fix="Set export.precision to fp32; if that does not help, please report it.",
        )
