"""The tensors of an exported file: which names a layout has, and what is written under each.

    kohya       lora_unet_down_blocks_0_….lora_down.weight   .lora_up.weight   .alpha     strength = alpha / rank
    diffusers   unet.down_blocks.0.….lora_A.weight           .lora_B.weight               strength = 1: folded into B
    comfyui     diffusion_model.blocks.0.….lora_A.weight     .lora_B.weight               strength = 1: folded into B

Names come from the family. No reader needs the header: ComfyUI and Forge ignore it, so the strength is in the tensors
of every layout. LoHa, LoKr, OFT and BOFT have LyCORIS' own tensor names in all of them. rsLoRA is a LoRA with another
alpha; PiSSA, OLoRA and LoftQ are exported as the change from the base model that they are, B A - B₀ A₀ of twice the
rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorasmith.engine.adapter_combinations import ROTATIONS
from lorasmith.engine.errors import ExportError
from lorasmith.engine.export.changes import Change, adaptable_layers, base_weight, weight_shape
from lorasmith.engine.export.rules import row_norms, spread
from lorasmith.engine.families import FusedName, families

if TYPE_CHECKING:
    from lorasmith.engine.adapters import Adapter, AdapterModule
    from lorasmith.engine.families import Component, Family, FamilyModule

KOHYA, DIFFUSERS, COMFYUI = "kohya", "diffusers", "comfyui"
ALPHA, DORA_SCALE, MAGNITUDE = ".alpha", ".dora_scale", ".lora_magnitude_vector"
_PAIRS = {
    KOHYA: (".lora_down.weight", ".lora_up.weight"),
    DIFFUSERS: (".lora_A.weight", ".lora_B.weight"),
    COMFYUI: (".lora_A.weight", ".lora_B.weight"),
}
"""Suffixes of the down (rank, in, …) and up (out, rank, …) matrices in each layout."""
_CARRIES_STRENGTH = {"loha": ("hada_w1_a",), "lokr": ("lokr_w1", "lokr_w1_a")}
"""The tensor that the strength is multiplied into where no alpha tells it."""


@dataclass(frozen=True)
class Entry:
    """One name of a layout and what is stored under it: `parts` are the trained modules and their first rows.

    `rows` is how many rows the weight of that name has; 0 where it is a single layer's own.
    """

    name: str
    parts: tuple[tuple[AdapterModule, int], ...]
    rows: int = 0

    @property
    def fused(self) -> bool:
        """Whether the layout stores this layer together with others."""
        return self.rows > 0

    @property
    def module(self) -> AdapterModule:
        """The module, or the first of several."""
        return self.parts[0][0]


def family_module(family: Family) -> FamilyModule:
    """Return the module that a loaded family belongs to."""
    return families()[family.spec.name]


def family_parts(family: Family) -> dict[Component, torch.nn.Module]:
    """Return the parts that are in memory and can be adapted."""
    return {"denoiser": family.denoiser, **family.text_encoders}


def layer_of(family: Family, component: Component, path: str) -> torch.nn.Module:
    """Return a layer of the base model, or the adapter's around it."""
    return family_parts(family)[component].get_submodule(path)


def entries(family: Family, adapter: Adapter, layout: str) -> list[Entry]:
    """Return what a file in `layout` holds, in the adapter's order.

    Raises ExportError where two modules share a name, or where a kind cannot be stored fused with other layers.
    """
    export_name = family_module(family).export_name
    found: dict[str, Entry] = {}
    for module in adapter.modules:
        name = export_name(layout, module.component, module.path)
        if isinstance(name, str):
            if name in found:
                raise ExportError(f"Two modules have the name {name} in the {layout} layout.", why="The map is wrong.")
            found[name] = Entry(name, ((module, 0),))
            continue
        if module.kind != "lora":
            raise ExportError(
                f"The {layout} layout cannot hold a {module.kind} of this base model.",
                why=f"It stores {module.path} fused with other layers as {name.name}, which only a LoRA allows.",
                fix=f"Choose another of export.layouts: {', '.join(family.spec.layouts)}; or adapter.kind = lora.",
            )
        firsts, total = _row_starts(family, module.component, name)
        before = found[name.name].parts if name.name in found else ()
        found[name.name] = Entry(name.name, (*before, (module, firsts[module.path])), total)
    return list(found.values())


def _row_starts(family: Family, component: Component, name: FusedName) -> tuple[dict[str, int], int]:
    """Return where each layer's rows begin in the fused weight, and how many there are in all."""
    starts, total = {}, 0
    for path in name.rows:
        starts[path] = total
        total += weight_shape(layer_of(family, component, path))[0]
    return starts, total


def known_names(family: Family, layout: str) -> set[str]:
    """Return the name in `layout` of every linear and convolution layer of the parts that are in memory.

    Parts that the layout has no names for are left out.
    """
    export_name = family_module(family).export_name
    names = set()
    for component, root in family_parts(family).items():
        try:
            for path, _ in adaptable_layers(root):
                name = export_name(layout, component, path)
                names.add(name if isinstance(name, str) else name.name)
        except ExportError:
            continue
    return names


def expected_suffixes(entry: Entry, layout: str) -> set[str]:
    """Return the suffixes of the keys that `entry` has in `layout`."""
    module = entry.module
    alpha = {ALPHA} if layout == KOHYA else set()
    if module.kind in ("lora", "dora"):
        dora = {MAGNITUDE if layout == DIFFUSERS else DORA_SCALE} if module.kind == "dora" else set()
        return {*_PAIRS[layout], *alpha, *dora}
    if module.kind in ROTATIONS:
        alpha = {ALPHA}
    return {f".{name}" for name in module.tensors} | alpha


def build_tensors(family: Family, adapter: Adapter, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a file in `layout` on the CPU; `.alpha` and DoRA's lengths are always fp32."""
    tensors: dict[str, Tensor] = {}
    for entry in entries(family, adapter, layout):
        for suffix, tensor in _entry_tensors(family, entry, layout, dtype):
            tensors[entry.name + suffix] = tensor.contiguous()
    return tensors


def _entry_tensors(family: Family, entry: Entry, layout: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    module = entry.module
    if module.kind not in ("lora", "dora"):
        yield from _named_tensors(module, layout, dtype)
        return
    change = fused_change(entry) if entry.fused else product(module)
    down, up, strength = change.down, change.up, change.scale
    if layout == KOHYA:
        yield ALPHA, torch.tensor(strength * down.shape[0])
    else:
        up = up * strength
    if module.kind == "dora":
        yield _length(module, layout, change, lambda: base_weight(layer_of(family, module.component, module.path)))
    yield from zip(_PAIRS[layout], rounded_pair(down, up, dtype), strict=True)


def product(module: AdapterModule) -> Change:
    """Return the change of a LoRA (of a DoRA: before its rows are stretched) on the CPU in fp32."""
    down, up = _plain(module.down), _plain(module.up)
    if module.start is None:
        return Change(down, up, module.scale)
    first_down, first_up = (_plain(module.start[name]) for name in ("lora_A.weight", "lora_B.weight"))
    return Change(torch.cat([down, first_down]), torch.cat([up, -first_up], dim=1), module.scale).balanced()


def fused_change(entry: Entry) -> Change:
    """Return the change of several layers that lie one under the other: downs stacked, ups along a diagonal.

    Rows of layers that are not trained are zero.
    """
    changes = [(product(module), first) for module, first in entry.parts]
    down = torch.cat([change.down for change, _ in changes])
    up = torch.zeros(entry.rows, down.shape[0])
    column = 0
    for change, first in changes:
        rows, rank = change.up.shape[:2]
        up[first : first + rows, column : column + rank] = change.up.flatten(1) * change.scale
        column += rank
    return Change(down, up, 1.0)


def _length(module: AdapterModule, layout: str, change: Change, weight: Callable[[], Tensor]) -> tuple[str, Tensor]:
    """Return the key and tensor that tell how long each row of a DoRA becomes.

    diffusers and peft: the length itself. ComfyUI and Forge: a factor that they divide by the length of the *unchanged*
    row and multiply the changed row with (`rules._decomposed`), so it is length · ‖W‖ / ‖W + ΔW‖, as (out, 1, …).
    """
    wanted = _plain(module.tensors["lora_magnitude_vector.weight"])
    if layout == DIFFUSERS:
        return MAGNITUDE, wanted
    base = weight().double()
    factor = wanted.double().flatten() * row_norms(base) / row_norms(base + change.written_out().double())
    return DORA_SCALE, spread(factor, base.dim()).float()


def _named_tensors(module: AdapterModule, layout: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a kind that LyCORIS has names for, with its strength where readers look for it."""
    whole = "lokr_w1" in module.tensors and "lokr_w2" in module.tensors
    folded = 1.0 if layout == KOHYA and not whole else module.scale
    carrier = next((name for name in _CARRIES_STRENGTH.get(module.kind, ()) if name in module.tensors), "")
    for name, tensor in module.tensors.items():
        yield f".{name}", _rounded(_plain(tensor) * (folded if name == carrier else 1.0), dtype)
    if module.kind in ROTATIONS:
        # Their alpha is a limit on the rotation, and 0 is none; ComfyUI needs the key for BOFT.
        yield ALPHA, torch.tensor(0.0)
    elif layout == KOHYA:
        # Two whole factors are read at strength 1, whatever alpha says.
        yield ALPHA, torch.tensor(float(module.rank) if whole else module.scale * _rank(module))


def _rank(module: AdapterModule) -> int:
    """Return the rank that readers divide alpha by."""
    names = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((module.tensors[name].shape[0] for name in names if name in module.tensors), module.rank)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()


_ROUNDING_LOSS = 4e-4
"""Share of a matrix that fp16 may lose; its half unit in the last place is 2**-11 = 4.9e-4."""


def rounded_pair(down: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return both matrices in `dtype`, their product kept as well as that allows."""
    plain = down.to(dtype), up.to(dtype)
    if dtype != torch.float16 or max(_loss(down, plain[0]), _loss(up, plain[1])) <= _ROUNDING_LOSS:
        return plain
    # A barely trained up matrix lies below fp16's range. Moving a power of two between the two keeps their product
    # exactly and brings both into range.
    ratio = float(down.abs().max()) / max(float(up.abs().max()), 1e-38)
    factor = 2.0 ** round(math.log2(max(ratio, 1e-38)) / 2)
    return (down / factor).to(dtype), (up * factor).to(dtype)


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in `dtype`, or in fp32 where fp16's range would lose what little was trained."""
    rounded = tensor.to(dtype)
    return tensor if dtype == torch.float16 and _loss(tensor, rounded) > _ROUNDING_LOSS else rounded


def _loss(exact: Tensor, rounded: Tensor) -> float:
    norm = float(exact.norm())
    return float((exact - rounded.float()).norm()) / norm if norm > 0 else 0.0
