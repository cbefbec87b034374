"""Beginning a run with the weights of an existing LoRA (adapter.start_from).

Exact where the file's kind and rank are the run's, or its rank is smaller; else the nearest change that the run's kind
can hold: for LoRA the best of its rank (Eckart & Young, 1936), for LoKr the nearest Kronecker product (Van Loan &
Pitsianis, 1993), for DoRA the best of its rank with the lengths of the rows kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorasmith.engine.adapter_combinations import ROTATIONS
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.export.changes import AnyChange, Change, WholeChange, base_weight
from lorasmith.engine.export.layouts import layer_of
from lorasmith.engine.export.rules import Stored, limited_blocks, row_norms
from lorasmith.engine.inspect_file import names as spelled
from lorasmith.engine.lora_files.nearest import nearest_kronecker, nearest_product
from lorasmith.engine.lora_files.reading import Part, StoredPart, read_lora

if TYPE_CHECKING:
    from lorasmith.engine.adapters import Adapter, AdapterModule
    from lorasmith.engine.families import Family

_EXACT = 1e-4
"""Share of a change that may be lost and still be called nothing: files have 16 bits."""
_NAMED = 3


@dataclass
class _Taken:
    """What became of the file's layers: sums of squares of what was wanted and of what is missing."""

    exact: int = 0
    near: int = 0
    wanted: float = 0.0
    lost: float = 0.0
    without: list[str] = field(default_factory=list)

    def add(self, wanted: AnyChange, found: AnyChange) -> None:
        """Count one layer."""
        size, gap = wanted.distance(), wanted.distance(found)
        self.wanted, self.lost = self.wanted + size**2, self.lost + gap**2
        if gap <= _EXACT * size:
            self.exact += 1
        else:
            self.near += 1

    @property
    def error(self) -> float:
        """The share of the whole change that is lost."""
        return math.sqrt(self.lost / self.wanted) if self.wanted else 0.0


def start_adapter(adapter: Adapter, path: Path, family: Family) -> str:
    """Give `adapter` the weights of the LoRA at `path`, and say in words how well that went.

    Raises BaseModelError where the file is no LoRA or one for another base model, and ConfigError where the adapter's
    kind cannot begin with it.
    """
    if any(module.start is not None for module in adapter.modules):
        raise ConfigError(
            "adapter.start_from cannot be combined with an adapter.init that starts from the base's own weights.",
            fix="Set adapter.init to default, or remove adapter.start_from.",
        )
    file = read_lora(path)
    parts = file.parts(family)
    taken = _Taken()
    for module in adapter.modules:
        part = parts.pop((module.component, module.path), None)
        if part is None:
            taken.without.append(module.path)
            continue
        wanted = part.change(family)
        with torch.no_grad():
            _take(module, part, wanted, family)
        taken.add(wanted, _own_change(adapter, module))
    if not taken.exact + taken.near:
        raise ConfigError(
            f"{path.name} has none of the layers that this run adapts.",
            why=f"It changes e.g. {next(iter(parts))[1]}." if parts else "",
            fix="Choose other adapter.targets, or another adapter.start_from.",
        )
    left = [f"{component}.{layer}" for component, layer in parts] + file.unknown_names(family)
    return _words(path, taken, left)


def _words(path: Path, taken: _Taken, left: list[str]) -> str:
    layers = taken.exact + taken.near
    words = f"The LoRA begins with {path.name}: {layers} layers taken over"
    if taken.near:
        words += (
            f", {taken.near} of them as the nearest that this adapter can hold; {taken.error:.1%} of the change is lost"
        )
    else:
        words += " exactly"
    if taken.without:
        words += f". {len(taken.without)} layers are not in the file and begin anew"
    if left:
        named = ", ".join(left[:_NAMED]) + (" …" if len(left) > _NAMED else "")
        words += f". Not taken over, since this run does not adapt them: {len(left)} layers ({named})"
    return f"{words}."


def _own_change(adapter: Adapter, module: AdapterModule) -> AnyChange:
    if module.kind == "lora":
        return Change(module.down.detach().cpu(), module.up.detach().cpu(), module.scale)
    return WholeChange(adapter.delta(module).detach().cpu())


def _take(module: AdapterModule, part: Part, wanted: AnyChange, family: Family) -> None:
    """Give `module` the file's own tensors where they are of its kind and size, else what comes as near as it can."""
    if isinstance(part, StoredPart) and part.whole and _same_kind(module, part.stored):
        _copy(module, part.stored)
    elif module.kind == "lora":
        _set_product(module, wanted)
    elif module.kind == "dora":
        weight = base_weight(layer_of(family, module.component, module.path))
        stored = part.stored if isinstance(part, StoredPart) and part.whole else None
        is_dora = stored is not None and stored.kind == "dora" and spelled.DOWN in stored.tensors
        _set_dora(module, stored.before_lengths(tuple(weight.shape)) if stored and is_dora else wanted, wanted, weight)
    elif module.kind == "loha":
        _set_loha(module, wanted)
    elif module.kind == "lokr":
        _set_lokr(module, wanted)
    else:
        raise _other_rotation(module, part)


def _same_kind(module: AdapterModule, stored: Stored) -> bool:
    own = {name: tuple(tensor.shape) for name, tensor in module.tensors.items()}
    theirs = {role: tuple(tensor.shape) for role, tensor in stored.tensors.items() if role != spelled.ALPHA}
    return module.kind in ("loha", "lokr", *ROTATIONS) and own == theirs


def _other_rotation(module: AdapterModule, part: Part) -> ConfigError:
    """Return the error that a rotation can begin only with one of the same kind and block size."""
    own, theirs = module.tensors["oft_blocks"], None
    if isinstance(part, StoredPart) and part.stored.kind == module.kind:
        theirs = part.stored.tensors.get("oft_blocks")
    if theirs is None or theirs.shape == own.shape:
        why = "It rotates weights, and what is not such a rotation adds to them."
        fix = "Choose adapter.kind = lora, or remove adapter.start_from."
    else:
        why = f"For {module.path} the file has blocks of {theirs.shape[-1]}, and this run of {own.shape[-1]}."
        fix = "Set adapter.block_size to what the file was trained with, or remove adapter.start_from."
    return ConfigError(f"adapter.kind = {module.kind} cannot begin with this LoRA.", why=why, fix=fix)


def _copy(module: AdapterModule, stored: Stored) -> None:
    """Copy tensors of the same kind; where the file's strength is another, one of them makes up for it."""
    if module.kind in ROTATIONS:
        module.tensors["oft_blocks"].copy_(limited_blocks(stored))
        return
    strength = stored.strength / module.scale
    carrier = next((name for name in ("hada_w1_a", "lokr_w1", "lokr_w1_a") if name in module.tensors), "")
    for name, tensor in module.tensors.items():
        tensor.copy_(stored.tensors[name].float() * (strength if name == carrier else 1.0))


def _set_product(module: AdapterModule, change: AnyChange) -> None:
    """Write the best product of the module's rank; what is left of its rank keeps its first values and zeros."""
    rank = module.down.shape[0]
    if isinstance(change, Change) and change.down.shape[0] == rank:
        best = Change(change.down.float(), change.up.float() * change.scale, 1.0)
    else:
        best = nearest_product(change, rank)
    used = best.down.shape[0]
    module.up.zero_()
    module.down[:used] = best.down.reshape(used, *module.down.shape[1:]).to(module.down)
    up = best.up.reshape(module.up.shape[0], used, *module.up.shape[2:])
    module.up[:, :used] = (up / module.scale).to(module.up)


def _set_dora(module: AdapterModule, added: AnyChange, wanted: AnyChange, weight: Tensor) -> None:
    """Write the best product for what is added, and rows as long as those of the wanted weight."""
    _set_product(module, added)
    lengths = row_norms((weight + wanted.written_out().cpu()).double())
    magnitude = module.tensors["lora_magnitude_vector.weight"]
    magnitude.copy_(lengths.reshape(magnitude.shape).to(magnitude))


def _set_loha(module: AdapterModule, change: AnyChange) -> None:
    """Write (A B) ⊙ (ones): the second pair makes a matrix of ones, and the rest of it is free to learn."""
    tensors = module.tensors
    if "hada_t1" in tensors:
        raise ConfigError(
            "adapter.start_from cannot fill the convolutions of a LoHa.", fix="Set adapter.convolutions = false."
        )
    rank = tensors["hada_w1_b"].shape[0]
    best = nearest_product(change, rank)
    used = best.down.shape[0]
    tensors["hada_w1_b"][:used] = best.down.flatten(1).to(tensors["hada_w1_b"])
    tensors["hada_w1_a"].zero_()
    tensors["hada_w1_a"][:, :used] = (best.up.flatten(1) / module.scale).to(tensors["hada_w1_a"])
    tensors["hada_w2_b"].zero_()
    tensors["hada_w2_b"][0] = 1.0
    tensors["hada_w2_a"][:, 0] = 1.0


def _set_lokr(module: AdapterModule, change: AnyChange) -> None:
    """Write the nearest Kronecker product, its second factor as the best product where it has a rank."""
    tensors = module.tensors
    first = tensors.get("lokr_w1")
    whole = tensors.get("lokr_w2")
    if first is None or "lokr_t2" in tensors:
        raise ConfigError("adapter.start_from cannot fill this LoKr.", fix="Set adapter.convolutions = false.")
    out = whole.shape[0] if whole is not None else tensors["lokr_w2_a"].shape[0]
    columns = whole[0].numel() if whole is not None else tensors["lokr_w2_b"].shape[1]
    small, large = nearest_kronecker(change.written_out().flatten(1), tuple(first.shape), (out, columns))
    first.copy_((small / module.scale).to(first))
    if whole is not None:
        whole.copy_(large.reshape(whole.shape).to(whole))
        return
    up, down = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
    best = nearest_product(WholeChange(large), down.shape[0])
    used = best.down.shape[0]
    up.zero_()
    up[:, :used] = best.up.to(up)
    down[:used] = best.down.to(down)
