"""What the tensors of a LoRA file do to a weight, by the rules of the programs that read them.

Knows nothing of families and headers. Every rule is the formula of ComfyUI (comfy/weight_adapter/: lora, loha, lokr,
oft, boft, base), which A1111 and Forge share for LoRA, LoHa and LoKr, and A1111 for OFT and BOFT without a limit; those
of `lora_magnitude_vector`, `oft_R` and `boft_R` are peft's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.engine.errors import ExportError
from lorasmith.engine.export.changes import AnyChange, Change, WholeChange
from lorasmith.engine.inspect_file import names as spelled


@dataclass(frozen=True)
class Stored:
    """The tensors that a file has for one name, by their role (`inspect_file.names`)."""

    name: str
    tensors: Mapping[str, Tensor]
    layout: str = ""

    @property
    def kind(self) -> str:
        """lora, dora, loha, lokr, oft, boft, diff, or "" where tensors are missing."""
        kind = spelled.kind_of(self.tensors)
        blocks = self.tensors.get("oft_blocks")
        return "boft" if kind == "oft" and blocks is not None and blocks.dim() == 4 else kind

    @property
    def needs_weight(self) -> bool:
        """Whether the change depends on the weight that is changed."""
        return self.kind in ("dora", "oft", "boft")

    @property
    def strength(self) -> float:
        """What readers multiply the product of the tensors by: alpha / rank, or 1 where either is not told."""
        whole = "lokr_w1" in self.tensors and "lokr_w2" in self.tensors
        rank = 0 if whole or self.kind in ("oft", "boft", "diff") else self._rank()
        return 1.0 if self.alpha is None or not rank else self.alpha / rank

    def _rank(self) -> int:
        return spelled.rank_of({role: tuple(tensor.shape) for role, tensor in self.tensors.items()})

    def before_lengths(self, shape: tuple[int, ...]) -> AnyChange:
        """Return what a DoRA adds before its rows are stretched, for a weight of `shape`."""
        return _shaped(_added(self), shape)

    def size(self) -> tuple[int, int]:
        """Return rows and columns of the weight that is changed, a kernel's places counted as columns; 0: not told."""
        return spelled.weight_size({role: tuple(tensor.shape) for role, tensor in self.tensors.items()})

    def sliced(self, first: int, count: int) -> Stored:
        """Return a DoRA of `count` rows from `first` on, as ComfyUI applies a fused one to a part of a layer."""
        rows = {
            role: tensor[first : first + count]
            for role, tensor in self.tensors.items()
            if role in (spelled.UP, spelled.DORA_SCALE, spelled.MAGNITUDE)
        }
        return Stored(self.name, {**self.tensors, **rows}, self.layout)

    @property
    def alpha(self) -> float | None:
        """The file's `.alpha` for this name."""
        alpha = self.tensors.get(spelled.ALPHA)
        return None if alpha is None else float(alpha)


def stored_modules(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Sort the tensors of a file by the name that they belong to; keys of no LoRA are left out."""
    modules, layouts, _ = spelled.group_keys(tensors)
    return {
        name: Stored(name, {role: tensors[key] for role, key in keys.items()}, layouts[name])
        for name, keys in modules.items()
    }


def read_changes(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> dict[str, AnyChange]:
    """Return the weight change of every name in a file.

    `weights` are those that are changed, by the same names: what DoRA, OFT and BOFT do depends on them.
    """
    return {name: change_of(stored, (weights or {}).get(name)) for name, stored in stored_modules(tensors).items()}


def change_of(stored: Stored, weight: Tensor | None = None, shape: tuple[int, ...] | None = None) -> AnyChange:
    """Return what `stored` adds to `weight`, which is needed for kinds that depend on it, in its `shape`.

    Raises ExportError where tensors are missing or do not fit the weight.
    """
    kind = stored.kind
    if not kind or (stored.needs_weight and weight is None):
        raise ExportError(f"The tensors of {stored.name} are not whole.", why=f"There is {', '.join(stored.tensors)}.")
    try:
        if kind in ("oft", "boft"):
            assert weight is not None
            return WholeChange(_rotated(stored, weight.double()) - weight.double())
        change = _added(stored)
        if shape is None and weight is not None:
            shape = tuple(weight.shape)
        if shape is not None:
            change = _shaped(change, shape)
        return _decomposed(stored, change, weight) if kind == "dora" and weight is not None else change
    except (RuntimeError, ValueError, IndexError) as error:
        raise ExportError(f"The tensors of {stored.name} do not fit together.", why=str(error)) from error


def _shaped(change: AnyChange, shape: tuple[int, ...]) -> AnyChange:
    """Give the change the shape of its weight: 1x1 convolutions are stored as matrices by some, and the reverse."""
    if change.shape == shape or math.prod(change.shape) != math.prod(shape) or change.shape[0] != shape[0]:
        return change
    if isinstance(change, WholeChange):
        return WholeChange(change.weight.reshape(shape))
    return Change(change.down.reshape(change.down.shape[0], *shape[1:]), change.up, change.scale)


def _added(stored: Stored) -> AnyChange:
    """Return the change that is added before any decomposition."""
    t = stored.tensors
    if spelled.DOWN in t:
        return _product(stored)
    if "hada_w1_a" in t:
        product = _factor(t, "hada_w1_a", "hada_w1_b", "hada_t1") * _factor(t, "hada_w2_a", "hada_w2_b", "hada_t2")
        return WholeChange(product * stored.strength)
    if "diff" in t:
        return WholeChange(t["diff"].float())
    return _kronecker(stored)


def _product(stored: Stored) -> Change:
    """LoRA: up @ down × alpha / rank; with a middle (Tucker) down is first carried through it."""
    down, up, middle = stored.tensors[spelled.DOWN], stored.tensors[spelled.UP], stored.tensors.get(spelled.MID)
    strength = stored.strength
    if middle is not None:
        down = torch.einsum("ab...,bi->ai...", middle.float(), down.float().flatten(1))
    return Change(down, up, strength)


def _factor(t: Mapping[str, Tensor], first: str, second: str, core: str) -> Tensor:
    """Return a @ b, or the Tucker product Σ core[i, j, …] a[i, out] b[j, in]."""
    a, b = t[first].float(), t[second].float()
    return torch.einsum("ij...,jr,ip->pr...", t[core].float(), b, a) if core in t else a @ b


def _kronecker(stored: Stored) -> WholeChange:
    """LoKr: w1 ⊗ w2, each whole or a product; alpha counts only where one of them is a product."""
    t = stored.tensors
    first = t["lokr_w1"].float() if "lokr_w1" in t else t["lokr_w1_a"].float() @ t["lokr_w1_b"].float()
    second = t["lokr_w2"].float() if "lokr_w2" in t else _factor(t, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    first = first.reshape(*first.shape, *[1] * (second.dim() - first.dim()))
    return WholeChange(torch.kron(first, second.contiguous()) * stored.strength)


def _decomposed(stored: Stored, change: AnyChange, weight: Tensor) -> WholeChange:
    """DoRA: the changed weight, each row (or column) brought to a learned length.

    peft divides by the length of the changed row. For `dora_scale` (out, 1) ComfyUI and Forge divide by that of the
    *unchanged* row instead; for (1, in) by that of the changed column.
    """
    weight = weight.double()
    changed = weight + change.written_out().double()
    if spelled.MAGNITUDE in stored.tensors:
        length, wanted = row_norms(changed), stored.tensors[spelled.MAGNITUDE].double().flatten()
        return WholeChange(changed * spread(wanted / length, weight.dim()) - weight)
    wanted = stored.tensors[spelled.DORA_SCALE].double()
    if wanted.shape[0] == weight.shape[0]:
        return WholeChange(changed * spread(wanted.flatten() / row_norms(weight), weight.dim()) - weight)
    columns = torch.linalg.vector_norm(changed.transpose(0, 1).flatten(1), dim=1)
    return WholeChange(changed * (wanted.flatten() / columns).reshape(1, -1, *[1] * (weight.dim() - 2)) - weight)


def row_norms(weight: Tensor) -> Tensor:
    """Return the length of each row (out,); 1 for rows of zeros, which no division needs."""
    norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return torch.where(norms == 0, torch.ones_like(norms), norms)


def spread(rows: Tensor, dimensions: int) -> Tensor:
    """Return one number a row (out,) in the shape (out, 1, …)."""
    return rows.reshape(-1, *[1] * (dimensions - 1))


def _rotated(stored: Stored, weight: Tensor) -> Tensor:
    """Return the rotated weight, in 64 bits."""
    t = stored.tensors
    if "oft_R.weight" in t:
        return _turn_inputs(peft_rotation(t["oft_R.weight"].double()), weight)
    if "boft_R" in t:
        turned = (weight.flatten(1) @ peft_butterfly(t["boft_R"].double()).T).reshape(weight.shape)
        return turned * spread(t["boft_s"].double().flatten(), weight.dim())
    return _turn_outputs(stored, weight)


def _turn_outputs(stored: Stored, weight: Tensor) -> Tensor:
    """LyCORIS' rotations R = (I + Q)(I - Q)⁻¹, Q = B - Bᵀ: Diag-OFT turns blocks of rows by Rᵀ, BOFT in stages by R."""
    blocks = limited_blocks(stored).double()
    skew = blocks - blocks.transpose(-1, -2)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    turn = (eye + skew) @ torch.linalg.inv(eye - skew)
    if blocks.dim() == 3:
        parts = weight.reshape(blocks.shape[0], blocks.shape[1], -1)
        turned = torch.einsum("knm,kni->kmi", turn, parts).reshape(weight.shape)
    else:
        turned = weight.flatten(1)
        for level in range(turn.shape[0]):
            turned = _butterfly(turn[level], turned, 2**level * (turn.shape[-1] // 2))
        turned = turned.reshape(weight.shape)
    rescale = stored.tensors.get("rescale")
    return turned if rescale is None else turned * spread(rescale.double().flatten(), weight.dim())


def limited_blocks(stored: Stored) -> Tensor:
    """Return `oft_blocks` B, made smaller where B - Bᵀ is longer than the file's alpha, the limit of ComfyUI."""
    blocks, alpha = stored.tensors["oft_blocks"].float(), stored.alpha or 0.0
    length = torch.linalg.vector_norm(blocks - blocks.transpose(-1, -2))
    return blocks * (alpha / length) if 0 < alpha < length else blocks


def _butterfly(turn: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Turn groups of outputs that lie `stride` apart; `turn` (groups, size, size), `weight` (out, in)."""
    outputs, inputs = weight.shape
    apart = weight.reshape(-1, 2, stride, inputs).transpose(1, 2).reshape(-1, turn.shape[-1], inputs)
    turned = torch.einsum("bij,bjn->bin", turn, apart)
    return turned.reshape(-1, stride, 2, inputs).transpose(1, 2).reshape(outputs, inputs)


def _turn_inputs(turn: Tensor, weight: Tensor) -> Tensor:
    """peft's OFT: x is turned block by block before the layer, so W becomes W Rᵀ; `turn` (blocks, size, size)."""
    parts = weight.flatten(1).reshape(weight.shape[0], turn.shape[0], turn.shape[1])
    return torch.einsum("okc,kbc->okb", parts, turn).reshape(weight.shape)


def _cayley(skew: Tensor) -> Tensor:
    """Return (I - S)(I + S)⁻¹."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    turned: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return turned


def peft_rotation(numbers: Tensor) -> Tensor:
    """Return the rotations (blocks, size, size) of `oft_R` (blocks, size · (size - 1) / 2).

    The numbers are the upper triangle of a skew matrix, of which the exact Cayley transform is taken (peft with
    `use_cayley_neumann` off).
    """
    size = round((1 + math.sqrt(1 + 8 * numbers.shape[1])) / 2)
    rows, columns = torch.triu_indices(size, size, 1)
    skew = torch.zeros(numbers.shape[0], size, size, dtype=numbers.dtype)
    skew[:, rows, columns] = numbers
    return _cayley(skew - skew.transpose(1, 2))


def peft_butterfly(blocks: Tensor) -> Tensor:
    """Return the rotation (in, in) of `boft_R` (stages, blocks, size, size): each stage's blocks in its own order."""
    from peft.tuners.boft.layer import BOFTLayer

    stages, num, size, _ = blocks.shape
    inputs = num * size
    turn = torch.eye(inputs, dtype=blocks.dtype)
    for stage in range(stages):
        order = BOFTLayer.block_butterfly_perm(None, inputs, num // 2**stage, size // 2, stages - 1)
        place = torch.eye(inputs, dtype=blocks.dtype)[order]
        skew = 0.5 * (blocks[stage] - blocks[stage].transpose(1, 2))
        blocks_in_a_row = torch.block_diag(*_cayley(skew))  # type: ignore[no-untyped-call]
        turn = place @ blocks_in_a_row @ place.T @ turn
    return turn
