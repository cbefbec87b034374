"""What a LoRA file is: layout, likely base, ranks, alphas, metadata and what is wrong with it. Torch-free.

Only `with_norms` needs torch. Strength below means the factor that readers multiply `up @ down` with: alpha / rank
where the file has `.alpha` tensors, 1 where it has none (comfy/weight_adapter/lora.py, A1111 network_lora.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.inspect_file import names as spelled
from lorasmith.engine.inspect_file.bases import guess_base
from lorasmith.engine.safetensors_header import read_values
from lorasmith.engine.sources import TensorInfo, read_header

HEADER_LIMIT = 1 << 20
"""ComfyUI shows no metadata of files with longer headers."""
_PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}
_KINDS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "boft": "BOFT",
    "diff": "whole difference",
}


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer: its name in the file, component, kind, sizes, and its alpha where the file has one.

    `keys` are its tensors' by role. `rank`, `inputs` and `outputs` are 0 where there is none, or they are not told.
    """

    name: str
    component: str
    layout: str
    kind: str
    rank: int
    inputs: int
    outputs: int
    convolution: bool
    alpha: float | None
    keys: Mapping[str, str]

    @property
    def strength(self) -> float:
        """The factor that readers apply; alpha counts for nothing where there is no rank, and is a limit in OFT."""
        rotates = self.kind in ("oft", "boft")
        return 1.0 if self.alpha is None or not self.rank or rotates else self.alpha / self.rank


@dataclass(frozen=True)
class LoraReport:
    """What `inspect_lora` found; counts are modules, `norms` is {name: ‖ΔW‖} where asked for."""

    name: str
    bytes: int
    layout: str
    kind: str
    base: str
    base_source: str
    precision: str
    keys: int
    parameters: int
    components: dict[str, int]
    ranks: dict[str, int]
    alphas: dict[str, int]
    trigger: str
    title: str
    metadata: dict[str, str]
    warnings: tuple[str, ...]
    norms: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return dataclasses.asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Return the report as (label, words) for people."""
        modules = sum(self.components.values())
        rows = [
            ("file", f"{self.name}, {self.bytes / 1e6:.1f} MB, {self.precision}"),
            ("layout", f"{self.layout}, {self.kind}"),
            ("base model", f"{self.base} ({self.base_source})"),
            ("modules", f"{modules} in {self.keys} keys: " + _counts(self.components)),
            ("parameters", f"{self.parameters:,}"),
            ("rank", _counts(self.ranks)),
            ("alpha", _counts(self.alphas)),
            ("trigger", self.trigger or "not stated"),
        ]
        if self.norms:
            values = sorted(self.norms.values())
            rows.append(
                ("size of change", f"{values[0]:.3g} to {values[-1]:.3g}, median {values[len(values) // 2]:.3g}")
            )
        return rows + [("warning", warning) for warning in self.warnings]


def inspect_lora(path: Path, *, with_norms: bool = False) -> LoraReport:
    """Describe the LoRA file at `path`; `with_norms` also reads its weights, with torch.

    Raises BaseModelError where it is no safetensors file or holds no LoRA.
    """
    tensors, metadata = read_header(path)
    modules, rest = _modules(path, tensors)
    if not modules:
        raise BaseModelError(
            f"{path.name} is no LoRA file.",
            why=f"None of its {len(tensors)} tensors has the name of a LoRA weight.",
            fix="Give the LoRA's own .safetensors file.",
        )
    base, source = guess_base(modules, metadata)
    norms = _norms(path, modules) if with_norms else None
    layouts = sorted({module.layout for module in modules})
    formats = Counter(info.dtype for info in tensors.values() if math.prod(info.shape) > 1)
    return LoraReport(
        name=path.name,
        bytes=path.stat().st_size,
        layout="mixed" if len(layouts) > 1 else layouts[0],
        kind=_kinds(modules),
        base=base,
        base_source=source,
        precision=" and ".join(_PRECISIONS.get(dtype, dtype) for dtype in sorted(formats)),
        keys=len(tensors),
        parameters=sum(math.prod(info.shape) for key, info in tensors.items() if not key.endswith(".alpha")),
        components=dict(Counter(module.component for module in modules)),
        ranks=_tally(str(module.rank) if module.rank else "none" for module in modules),
        alphas=_tally("none (strength 1)" if m.alpha is None else f"{m.alpha:g}" for m in modules),
        trigger=_trigger(metadata),
        title=metadata.get("modelspec.title") or metadata.get("ss_output_name", ""),
        metadata=metadata,
        warnings=tuple(_warnings(path, metadata, modules, rest) + _norm_warnings(norms)),
        norms=norms,
    )


def _modules(path: Path, tensors: Mapping[str, TensorInfo]) -> tuple[list[LoraModule], list[str]]:
    """Return the modules of which all tensors are there, and the keys that belong to none."""
    modules = []
    groups, layouts, rest = spelled.group_keys(tensors)
    for name, keys in groups.items():
        shapes = {role: tuple(tensors[key].shape) for role, key in keys.items()}
        kind = spelled.kind_of(shapes)
        if not kind or any(len(shape) < 2 for role, shape in shapes.items() if role in (spelled.DOWN, spelled.UP)):
            rest += keys.values()
            continue
        if kind == "oft" and len(shapes.get("oft_blocks", ())) == 4:
            kind = "boft"
        alpha = read_values(path, keys[spelled.ALPHA])[0] if spelled.ALPHA in keys else None
        outputs, inputs = spelled.weight_size(shapes)
        modules.append(
            LoraModule(
                name=name,
                component=spelled.split_name(name, unknown="unknown")[0],
                layout=layouts[name] or "LyCORIS",
                kind=kind,
                rank=spelled.rank_of(shapes),
                inputs=inputs,
                outputs=outputs,
                convolution=any(len(shape) == 4 for role, shape in shapes.items() if role != "oft_blocks"),
                alpha=alpha,
                keys=keys,
            )
        )
    return modules, rest


def _kinds(modules: list[LoraModule]) -> str:
    kinds = sorted({_KINDS[module.kind] for module in modules} - {"LoRA"})
    if not kinds:
        # proj_in and proj_out are 1x1 convolutions that plain LoRAs of SD 1.x adapt too.
        locon = any(module.convolution and not re.search(r"proj_(in|out)$", module.name) for module in modules)
        return "LoCon" if locon else "LoRA"
    return " and ".join(kinds)


def _trigger(metadata: Mapping[str, str]) -> str:
    for key in ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words"):
        if metadata.get(key, "").strip():
            return metadata[key].strip()
    return ""


def _warnings(path: Path, metadata: Mapping[str, str], modules: list[LoraModule], rest: Sequence[str]) -> list[str]:
    found = []
    if len({module.layout for module in modules}) > 1:
        found.append("The file mixes key layouts; most programs load only one of them.")
    found += _alpha_warnings(metadata, modules)
    odd = [module for module in modules if not 1 / 64 <= module.strength <= 4]
    if odd:
        found.append(f"{len(odd)} modules have an unusual strength, e.g. {odd[0].name}: {odd[0].strength:g}.")
    if rest:
        found.append(f"{len(rest)} keys belong to no complete module, e.g. {sorted(rest)[0]}.")
    found += [words for sign, words in _TRAPS if any(sign(module) for module in modules)]
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > HEADER_LIMIT:
            found.append("The header is over 1 MiB, so ComfyUI shows none of its metadata.")
    return found


def _alpha_warnings(metadata: Mapping[str, str], modules: list[LoraModule]) -> list[str]:
    found = []
    products = [module for module in modules if module.kind in ("lora", "dora")]
    without = [module for module in products if module.alpha is None]
    if without and len(without) < len(products):
        found.append(f"{len(without)} of {len(products)} modules have no alpha, the others have: strengths differ.")
    elif without and any(module.layout == "kohya" for module in products):
        found.append(
            "There are no .alpha tensors, so every program loads it at strength 1; check that alpha was the rank."
        )
    if "diffusers" in {module.layout for module in products} and len(without) < len(products):
        found.append("It has .alpha beside lora_A and lora_B, which diffusers refuses for most base models.")
    return found + _header_alpha_warning(metadata, bool(without))


_TRAPS: tuple[tuple[Callable[[LoraModule], bool], str], ...] = (
    (
        lambda module: spelled.DORA_SCALE in module.keys,
        "Its DoRA lengths are dora_scale, which ComfyUI and Forge read; diffusers drops them for most base models.",
    ),
    (
        lambda module: spelled.MAGNITUDE in module.keys,
        "Its DoRA lengths are lora_magnitude_vector, which only diffusers and peft read.",
    ),
    (
        lambda module: "oft_blocks" in module.keys,
        "Its rotations are oft_blocks, which ComfyUI and A1111 read; Forge and diffusers do not.",
    ),
    (
        lambda module: "oft_R.weight" in module.keys or "boft_R" in module.keys,
        "Its rotations have peft's names, which no program for pictures reads.",
    ),
)
"""What a file has that some programs do not read; see `engine.compatibility`."""


def _header_alpha_warning(metadata: Mapping[str, str], no_alpha: bool) -> list[str]:
    try:
        values = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        differing = [
            k for k in values if k.endswith(".lora_alpha") and values[k] != values[k.removesuffix("lora_alpha") + "r"]
        ]
    except (ValueError, TypeError, AttributeError, KeyError):
        return ["lora_adapter_metadata in its header cannot be read; diffusers will refuse the file."]
    if differing and no_alpha:
        return ["Its alpha is only in the header: diffusers uses it, ComfyUI and Forge load it at strength 1."]
    return []


def _norms(path: Path, modules: list[LoraModule]) -> dict[str, float]:
    """Return the Frobenius norm of each LoRA module's weight change without building it: ‖UD‖² = tr(UᵀU · DDᵀ).

    Other kinds are left out: most of their changes depend on the base model's weight.
    """
    import torch
    from safetensors import safe_open

    norms = {}
    with safe_open(path, "pt") as file:
        for module in modules:
            if module.kind != "lora" or spelled.MID in module.keys:
                continue
            down = file.get_tensor(module.keys[spelled.DOWN]).double().flatten(1)
            up = file.get_tensor(module.keys[spelled.UP]).double().flatten(1)
            square = torch.sum((up.T @ up) * (down @ down.T))
            # Rounding can make a zero slightly negative; NaN must stay NaN.
            norms[module.name] = module.strength * math.sqrt(
                value if (value := float(square)) > 0 or value != value else 0
            )
    return norms


def _norm_warnings(norms: Mapping[str, float] | None) -> list[str]:
    if norms is None:
        return []
    broken = [name for name, value in norms.items() if not math.isfinite(value)]
    zero = [name for name, value in norms.items() if value == 0]
    found = [f"{len(broken)} modules hold NaN or infinite numbers, e.g. {broken[0]}."] if broken else []
    return found + ([f"{len(zero)} of {len(norms)} modules change nothing, e.g. {zero[0]}."] if zero else [])


def _tally(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" if len(counts) > 1 else name for name, count in counts.items()) or "none"
