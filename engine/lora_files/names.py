"""Which layer of a base model a name in a LoRA file means, whatever program wrote it.

Names are compared flattened (dots as underscores) and without the beginnings that programs put before them, so that
`lora_unet_mid_block_attentions_0_proj_in`, `unet.mid_block.attentions.0.proj_in` and `lycoris_mid_block_…` are one.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import ExportError
from lorasmith.engine.export.changes import adaptable_layers, weight_shape
from lorasmith.engine.export.layouts import family_module, family_parts
from lorasmith.engine.families import FusedName
from lorasmith.engine.inspect_file.names import split_name

if TYPE_CHECKING:
    from lorasmith.engine.families import Component, Family

_OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Old diffusers' names in CLIP."""
_SGM_LAYERS = (
    ("in_layers_2", "conv1"),
    ("out_layers_3", "conv2"),
    ("emb_layers_1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
    ("downsamplers_0_op", "downsamplers_0_conv"),
    ("time_embed_0", "time_embedding_linear_1"),
    ("time_embed_2", "time_embedding_linear_2"),
    ("label_emb_0_0", "add_embedding_linear_1"),
    ("label_emb_0_2", "add_embedding_linear_2"),
)
_SGM = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb)_")
_FUSED = {"qkv": ("to_q", "to_k", "to_v")}
"""Attention that some programs store as one matrix, also where the family has no layout that does."""
_RENAMED = {"out": "to_out_0"}


@dataclass(frozen=True)
class Target:
    """A layer, and which rows of the stored weight are its own: from `first` on, of `rows_in_all`; 0: all are."""

    component: Component
    path: str
    first: int = 0
    rows_in_all: int = 0


class LayerNames:
    """The layers of a loaded base model by every name that they have in files."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._known: dict[tuple[Component, str], list[Target]] = {}
        self._written: dict[str, list[Target]] = {}
        module = family_module(family)
        for component, root in family_parts(family).items():
            rows = {path: weight_shape(layer)[0] for path, layer in adaptable_layers(root)}
            for path in rows:
                own = [Target(component, path)]
                self._known[component, _flat(component, path)] = own
                for layout in family.spec.layouts:
                    with contextlib.suppress(ExportError):
                        self._add(module.export_name(layout, component, path), component, path, rows)

    def find(self, name: str) -> list[Target]:
        """Return the layers that `name` means: none where it means nothing here, several where it is a fused one."""
        if name in self._written:
            return self._written[name]
        component, rest = split_name(name)
        for spelled in self._spellings(component, rest):
            if found := self._known.get((component, spelled)):
                return found
        return self._find_fused(component, _flat(component, rest))

    def _add(self, name: str | FusedName, component: Component, path: str, rows: dict[str, int]) -> None:
        if isinstance(name, str):
            self._written[name] = [Target(component, path)]
            return
        targets = _rows_of(component, name.rows, rows)
        self._written[name.name] = targets
        own, rest = split_name(name.name)
        self._known.setdefault((own, _flat(own, rest)), targets)

    def _spellings(self, component: Component, rest: str) -> list[str]:
        flat = _flat(component, rest)
        found = [flat]
        if component == "denoiser":
            # Old diffusers: `attn1.processor.to_q`, `attn1.processor.to_out`.
            plain = flat.replace("_processor_", "_")
            found += [plain, f"{plain}_0"]
            if _SGM.match(flat):
                found.append(self._from_sgm(flat))
        else:
            begin, _, end = flat.rpartition("self_attn_")
            found.append(f"{begin}self_attn_{_OLD_ATTENTION.get(end, end)}")
        return found

    def _from_sgm(self, flat: str) -> str:
        """Return the diffusers name of a UNet layer in the original (SGM) spelling, by diffusers' own rule."""
        from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers as map_blocks

        config: Any = getattr(self._family.denoiser, "config", None)
        if not hasattr(config, "layers_per_block"):
            return flat
        try:
            (renamed,) = map_blocks({f"lora_unet_{flat}": None}, config)
        except (ValueError, IndexError, AttributeError):
            return flat
        for old, new in (
            ("input_blocks", "down_blocks"),
            ("middle_block", "mid_block"),
            ("output_blocks", "up_blocks"),
        ):
            renamed = renamed.replace(old, new)
        for old, new in _SGM_LAYERS:
            renamed = re.sub(rf"{old}$", new, renamed)
        return str(renamed).removeprefix("lora_unet_")

    def _find_fused(self, component: Component, flat: str) -> list[Target]:
        for fused, parts in _FUSED.items():
            if flat.endswith(f"_{fused}"):
                found = [self._known.get((component, flat.removesuffix(fused) + part)) for part in parts]
                paths = tuple(targets[0].path for targets in found if targets)
                if len(paths) == len(parts):
                    return _rows_of(component, paths, self._rows(component, paths))
        for other, own in _RENAMED.items():
            if flat.endswith(f"_{other}"):
                return self._known.get((component, flat.removesuffix(other) + own), [])
        return []

    def _rows(self, component: Component, paths: tuple[str, ...]) -> dict[str, int]:
        root = family_parts(self._family)[component]
        return {path: weight_shape(root.get_submodule(path))[0] for path in paths}


def _rows_of(component: Component, paths: tuple[str, ...], rows: dict[str, int]) -> list[Target]:
    total = sum(rows[path] for path in paths)
    targets, first = [], 0
    for path in paths:
        targets.append(Target(component, path, first, total))
        first += rows[path]
    return targets


def _flat(component: Component, path: str) -> str:
    flat = path.replace(".", "_")
    # transformers 5 dropped this level of CLIP's names, which files have.
    return flat if component == "denoiser" else flat.removeprefix("text_model_")
