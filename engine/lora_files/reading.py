"""Reading a LoRA of any layout back into weight changes by component and layer.

Read are kohya's names (Stable Diffusion XL's in its original spelling and FLUX's fused layers included), those of
diffusers, old and new, peft, ComfyUI and LyCORIS, for LoRA, LoCon, DoRA, LoHa, LoKr, OFT, BOFT and whole differences.
What no rule here knows is given to diffusers' own loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.engine.errors import BaseModelError, ExportError
from lorasmith.engine.export.changes import AnyChange, base_weight, weight_shape
from lorasmith.engine.export.diffusers_check import Place, load_with_diffusers
from lorasmith.engine.export.layouts import family_parts, layer_of
from lorasmith.engine.export.rules import Stored, change_of, stored_modules
from lorasmith.engine.inspect_file import inspect_lora
from lorasmith.engine.lora_files.names import LayerNames, Target

if TYPE_CHECKING:
    from torch import Tensor

    from lorasmith.engine.families import Family

_STRANGE_SHARE = 0.5
"""A file of which more names than this mean nothing in the base model is for another one."""


@dataclass
class LoraFile:
    """A LoRA file that was read: what it stores under each name."""

    path: Path
    modules: dict[str, Stored]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def placed(self, family: Family) -> dict[Place, StoredPart]:
        """Return what is stored for each layer of the base model.

        Raises BaseModelError in one sentence where the LoRA is for another base model.
        """
        names = LayerNames(family)
        found: dict[Place, StoredPart] = {}
        strangers = []
        for name, stored in self.modules.items():
            targets = names.find(name)
            if not targets:
                strangers.append(name)
            for target in targets:
                self._require_fit(family, stored, target)
                found[target.component, target.path] = StoredPart(stored, target)
        if len(strangers) > _STRANGE_SHARE * len(self.modules):
            raise self._other_base(family, f"Its {strangers[0]} is no layer of it.")
        return found

    def parts(self, family: Family) -> dict[Place, Part]:
        """Return what the file has for each layer, by the rules here or by diffusers' loader; raises as `placed`."""
        try:
            return dict(self.placed(family))
        except BaseModelError:
            loaded = self._by_diffusers(family)
            if loaded is None:
                raise
            return {place: LoadedPart(change) for place, change in loaded.items()}

    def changes(self, family: Family) -> dict[Place, AnyChange]:
        """Return the weight change of each layer, in the shape of its weight; raises as `placed`."""
        return {place: part.change(family) for place, part in self.parts(family).items()}

    def unknown_names(self, family: Family) -> list[str]:
        """Return the names that are no layer of the base model, or of a part that is not in memory."""
        names = LayerNames(family)
        return [name for name in self.modules if not names.find(name)]

    def _by_diffusers(self, family: Family) -> dict[Place, AnyChange] | None:
        """Return what diffusers' loader makes of the file; None where it refuses it or finds nothing in it."""
        try:
            found = load_with_diffusers(self.path, family, set(family_parts(family)))
        except ExportError:
            return None
        return found or None

    def _require_fit(self, family: Family, stored: Stored, target: Target) -> None:
        shape = weight_shape(layer_of(family, target.component, target.path))
        rows, columns = stored.size()
        expected = 1
        for side in shape[1:]:
            expected *= side
        wrong_rows = rows and rows != (target.rows_in_all or shape[0])
        if wrong_rows or (columns and columns != expected):
            raise self._other_base(
                family, f"Its {stored.name} is {rows} x {columns}, the layer {shape[0]} x {expected}."
            )

    def _other_base(self, family: Family, why: str) -> BaseModelError:
        base = inspect_lora(self.path).base
        whose = f"a LoRA for {base}" if base != "unknown" else "a LoRA for another base model"
        return BaseModelError(
            f"{self.path.name} is {whose}, not for {family.identity.label}.",
            why=why,
            fix="Choose a LoRA that was trained for this base model.",
        )


@dataclass(frozen=True)
class StoredPart:
    """What a file stores for one layer: its own tensors, or rows of a fused layer's."""

    stored: Stored
    target: Target

    @property
    def whole(self) -> bool:
        """Whether the tensors are this layer's alone."""
        return not self.target.rows_in_all

    def change(self, family: Family) -> AnyChange:
        """Return the weight change of the layer."""
        layer = layer_of(family, self.target.component, self.target.path)
        shape = weight_shape(layer)
        if self.whole:
            return change_of(self.stored, base_weight(layer) if self.stored.needs_weight else None, shape)
        if self.stored.needs_weight:
            return change_of(self.stored.sliced(self.target.first, shape[0]), base_weight(layer))
        return change_of(self.stored).rows(self.target.first, shape[0])


@dataclass(frozen=True)
class LoadedPart:
    """What diffusers loaded for one layer."""

    loaded: AnyChange

    def change(self, family: Family) -> AnyChange:
        """Return the weight change of the layer."""
        return self.loaded


Part = StoredPart | LoadedPart
"""What a file has for one layer."""


def read_lora(path: Path) -> LoraFile:
    """Read the LoRA at `path`; raises BaseModelError where it is none, or not whole."""
    from safetensors import SafetensorError, safe_open

    report = inspect_lora(path)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BaseModelError(f"Cannot read {path.name}.", why=str(error)) from error
    modules = stored_modules(tensors)
    if broken := sorted(name for name, stored in modules.items() if not stored.kind):
        raise BaseModelError(
            f"{path.name} is damaged: {broken[0]} lacks some of its tensors.",
            why=f"It has only {', '.join(modules[broken[0]].tensors)}.",
        )
    return LoraFile(path, modules, report.metadata)
