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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.safetensors_header import read_values
from lorasmith.engine.sources import TensorInfo, read_header

HEADER_LIMIT = 1 << 20
"""ComfyUI shows no metadata of files with longer headers."""
_PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}
_PAIRS = (
    ("kohya", ".lora_down.weight", ".lora_up.weight"),
    ("diffusers", ".lora_A.weight", ".lora_B.weight"),
    ("peft", ".lora_A.default.weight", ".lora_B.default.weight"),
    ("old diffusers", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("old diffusers", ".lora.down.weight", ".lora.up.weight"),
    ("old diffusers", "_lora.down.weight", "_lora.up.weight"),
)
_OTHER_KINDS = {
    ".hada_w1_a": "LoHa",
    ".lokr_w1": "LoKr",
    ".lokr_w1_a": "LoKr",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".oft_blocks": "OFT",
}
_COMPONENTS = (
    (r"lora_te1?_|text_encoder\.|text_encoders\.clip_l\.", "text_encoder"),
    (r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.", "text_encoder_2"),
    (r"lora_te3_|text_encoder_3\.|text_encoders\.t5xxl\.", "text_encoder_3"),
    (r"lora_unet_|unet\.|transformer\.|diffusion_model\.|lora_transformer_|lycoris_", "denoiser"),
)
_UNET_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
"""Width of the text embedding that cross-attention reads."""
_STATED = (
    (r"stable-diffusion-xl|sdxl", "SDXL"),
    (r"stable-diffusion-3|\bsd3", "Stable Diffusion 3"),
    (r"stable-diffusion-v2|sd_v2", "Stable Diffusion 2.x"),
    (r"stable-diffusion-v1|sd_v1", "Stable Diffusion 1.x"),
    (r"flux-?2", "FLUX.2"),
    (r"flux", "FLUX.1"),
    (r"qwen", "Qwen-Image"),
    (r"z-?image", "Z-Image"),
)
_KEY_SIGNS = (
    (r"(double_blocks|single_transformer_blocks)[._]\d+.*(to_qkv_mlp_proj|linear_in)", "FLUX.2"),
    (r"(double_blocks|single_blocks|single_transformer_blocks)[._]", "FLUX"),
    (r"joint_blocks[._]", "Stable Diffusion 3"),
    (r"(transformer_blocks|blocks)[._]\d+[._](img_mlp|img_mod|txt_mlp|txt_mod)", "Qwen-Image"),
    (r"layers[._]\d+[._](attention|feed_forward)", "Z-Image"),
)


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer: its name in the file, component, shapes, and its alpha where the file has one."""

    name: str
    component: str
    layout: str
    rank: int
    inputs: int
    outputs: int
    convolution: bool
    alpha: float | None

    @property
    def strength(self) -> float:
        """The factor that readers apply."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


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
    modules = _modules(path, tensors)
    kinds = sorted({kind for key in tensors for suffix, kind in _OTHER_KINDS.items() if key.endswith(suffix)})
    if not modules and not kinds:
        raise BaseModelError(
            f"{path.name} is no LoRA file.",
            why=f"None of its {len(tensors)} tensors has the name of a LoRA weight.",
            fix="Give the LoRA's own .safetensors file.",
        )
    base, source = _guess_base(modules, tensors, metadata)
    norms = _norms(path, modules) if with_norms else None
    layouts = sorted({module.layout for module in modules})
    formats = Counter(info.dtype for info in tensors.values() if math.prod(info.shape) > 1)
    return LoraReport(
        name=path.name,
        bytes=path.stat().st_size,
        layout="mixed" if len(layouts) > 1 else (layouts or ["LyCORIS"])[0],
        kind=" and ".join(kinds) or ("LoCon" if any(_is_locon(module) for module in modules) else "LoRA"),
        base=base,
        base_source=source,
        precision=" and ".join(_PRECISIONS.get(dtype, dtype) for dtype in sorted(formats)),
        keys=len(tensors),
        parameters=sum(math.prod(info.shape) for key, info in tensors.items() if not key.endswith(".alpha")),
        components=dict(Counter(module.component for module in modules)),
        ranks=_tally(str(module.rank) for module in modules),
        alphas=_tally("none (strength 1)" if m.alpha is None else f"{m.alpha:g}" for m in modules),
        trigger=_trigger(metadata),
        title=metadata.get("modelspec.title") or metadata.get("ss_output_name", ""),
        metadata=metadata,
        warnings=tuple(_warnings(path, tensors, metadata, modules, kinds) + _norm_warnings(norms)),
        norms=norms,
    )


def _modules(path: Path, tensors: Mapping[str, TensorInfo]) -> list[LoraModule]:
    modules = []
    for key, info in tensors.items():
        pair = next(((layout, down, up) for layout, down, up in _PAIRS if key.endswith(down)), None)
        if pair is None:
            continue
        name = key.removesuffix(pair[1])
        up = tensors.get(name + pair[2])
        if up is None or len(info.shape) < 2 or len(up.shape) < 2:
            continue
        alpha = read_values(path, f"{name}.alpha")[0] if f"{name}.alpha" in tensors else None
        convolution = len(info.shape) == 4
        inputs = math.prod(info.shape[1:])
        modules.append(
            LoraModule(name, _component(name), pair[0], info.shape[0], inputs, up.shape[0], convolution, alpha)
        )
    return modules


def _component(name: str) -> str:
    return next((component for sign, component in _COMPONENTS if re.match(sign, name)), "unknown")


def _is_locon(module: LoraModule) -> bool:
    # proj_in and proj_out are 1x1 convolutions that plain LoRAs of SD 1.x adapt too.
    return module.convolution and not re.search(r"proj_(in|out)$", module.name)


def _guess_base(
    modules: list[LoraModule], tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[str, str]:
    for module in modules:
        if re.search(r"attn2[._]to_[kv]$", module.name) and module.component == "denoiser":
            label = _UNET_WIDTHS.get(module.inputs)
            return (label, "by its shapes") if label else (f"a UNet with text width {module.inputs}", "by its shapes")
    for key in ("modelspec.architecture", "ss_base_model_version"):
        stated = metadata.get(key, "").lower()
        label = next((label for sign, label in _STATED if stated and re.search(sign, stated)), "")
        if label:
            return label, f"as {key} says"
    for sign, label in _KEY_SIGNS:
        if any(re.search(sign, key) for key in tensors):
            return label, "by its keys"
    return "unknown", "no sign of any"


def _trigger(metadata: Mapping[str, str]) -> str:
    for key in ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words"):
        if metadata.get(key, "").strip():
            return metadata[key].strip()
    return ""


def _warnings(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    modules: list[LoraModule],
    kinds: list[str],
) -> list[str]:
    found = []
    if len({module.layout for module in modules}) > 1:
        found.append("The file mixes key layouts; most programs load only one of them.")
    without = [module for module in modules if module.alpha is None]
    if without and len(without) < len(modules):
        found.append(f"{len(without)} of {len(modules)} modules have no alpha, the others have: strengths differ.")
    elif without and any(module.layout == "kohya" for module in modules):
        found.append(
            "There are no .alpha tensors, so every program loads it at strength 1; check that alpha was the rank."
        )
    if "diffusers" in {module.layout for module in modules} and len(without) < len(modules):
        found.append("It has .alpha beside lora_A and lora_B, which diffusers refuses for most base models.")
    found += _header_alpha_warning(metadata, bool(without))
    odd = [module for module in modules if not 1 / 64 <= module.strength <= 4]
    if odd:
        found.append(f"{len(odd)} modules have an unusual strength, e.g. {odd[0].name}: {odd[0].strength:g}.")
    if not kinds:
        found += _leftover_warning(tensors, modules)
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > HEADER_LIMIT:
            found.append("The header is over 1 MiB, so ComfyUI shows none of its metadata.")
    return found


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


def _leftover_warning(tensors: Mapping[str, TensorInfo], modules: list[LoraModule]) -> list[str]:
    suffixes = {layout: (down, up) for layout, down, up in _PAIRS}
    used = {module.name + suffix for module in modules for suffix in suffixes[module.layout]}
    used |= {module.name + suffix for module in modules for _, down, up in _PAIRS for suffix in (down, up, ".alpha")}
    left_over = sorted(set(tensors) - used)
    return [f"{len(left_over)} keys belong to no complete module, e.g. {left_over[0]}."] if left_over else []


def _norms(path: Path, modules: list[LoraModule]) -> dict[str, float]:
    """Return the Frobenius norm of each module's weight change without building it: ‖UD‖² = tr(UᵀU · DDᵀ)."""
    import torch
    from safetensors import safe_open

    suffixes = {layout: [] for layout, *_ in _PAIRS}  # type: dict[str, list[tuple[str, str]]]
    for layout, down, up in _PAIRS:
        suffixes[layout].append((down, up))
    norms = {}
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        for module in modules:
            down_suffix, up_suffix = next(p for p in suffixes[module.layout] if module.name + p[0] in keys)
            down = file.get_tensor(module.name + down_suffix).double().flatten(1)
            up = file.get_tensor(module.name + up_suffix).double().flatten(1)
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
