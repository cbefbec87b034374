"""How programs spell the tensors of a LoRA file: every suffix, what it is, and which layout it belongs to. Torch-free.

A key is the name of a layer and a suffix, e.g. `lora_unet_mid_block_…_to_q` and `.lora_down.weight`. Sources:
ComfyUI comfy/weight_adapter/*.py and comfy/lora.py, LyCORIS lycoris/modules/*.py, diffusers' loaders, peft's
save_and_load.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

DOWN, UP, MID, ALPHA = "down", "up", "mid", "alpha"
DORA_SCALE, MAGNITUDE = "dora_scale", "magnitude"
_PAIRS = (
    ("kohya", ".lora_down.weight", ".lora_up.weight"),
    ("diffusers", ".lora_A.weight", ".lora_B.weight"),
    ("peft", ".lora_A.default.weight", ".lora_B.default.weight"),
    ("old diffusers", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("old diffusers", ".lora.down.weight", ".lora.up.weight"),
    ("old diffusers", "_lora.down.weight", "_lora.up.weight"),
)
_LYCORIS = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("oft_blocks", "rescale", "oft_R.weight", "boft_R", "boft_s", "diff"),
)
"""Their roles are their names."""
SUFFIXES: dict[str, tuple[str, str]] = {
    **{suffix: (layout, role) for layout, *both in _PAIRS for suffix, role in zip(both, (DOWN, UP), strict=True)},
    ".lora_mid.weight": ("kohya", MID),
    ".alpha": ("", ALPHA),
    ".dora_scale": ("", DORA_SCALE),
    ".lora_magnitude_vector": ("", MAGNITUDE),
    ".lora_magnitude_vector.weight": ("", MAGNITUDE),
    ".lora_magnitude_vector.default.weight": ("", MAGNITUDE),
    **{f".{name}": ("LyCORIS", name) for name in _LYCORIS},
}
"""Suffix to (layout, role); the layout is "" where several have the suffix. LyCORIS names its tensors alike in all."""
_BY_LENGTH = sorted(SUFFIXES, key=len, reverse=True)
_ENDS = {suffix.rpartition(".")[2] for suffix in SUFFIXES}
_PREFIXES = (
    (
        r"lora_te1?_|text_encoder\.|text_encoders\.(?:clip_[lh]|qwen[^.]*|gemma[^.]*)\.(?:transformer\.)?",
        "text_encoder",
    ),
    (r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.(?:transformer\.)?", "text_encoder_2"),
    (r"lora_te3_|text_encoder_3\.|text_encoders\.t5xxl\.(?:transformer\.)?", "text_encoder_3"),
    (r"lora_unet_|lora_transformer_|lycoris_(?:unet_|transformer_(?!blocks))?", "denoiser"),
    (r"(?:(?:unet|transformer|diffusion_model|model\.diffusion_model)\.)?base_model\.model\.", "denoiser"),
    (r"unet\.|transformer\.|model\.diffusion_model\.|diffusion_model\.", "denoiser"),
)
"""Beginnings of names and the part of the base model that they mean, the first that fits counts."""


def split_key(key: str) -> tuple[str, str, str] | None:
    """Return (name of the layer, role, layout) of a tensor; None where the key is no LoRA's."""
    if key.rpartition(".")[2] not in _ENDS:
        return None
    for suffix in _BY_LENGTH:
        if key.endswith(suffix):
            layout, role = SUFFIXES[suffix]
            return key.removesuffix(suffix), role, layout
    return None


def group_keys(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Return {name: {role: key}}, {name: layout}, and the keys that belong to no LoRA."""
    modules: dict[str, dict[str, str]] = {}
    layouts: dict[str, str] = {}
    strangers = []
    for key in keys:
        parts = split_key(key)
        if parts is None:
            strangers.append(key)
            continue
        name, role, layout = parts
        modules.setdefault(name, {})[role] = key
        layouts[name] = layouts.get(name) or layout
    return modules, layouts, strangers


def kind_of(roles: Iterable[str]) -> str:
    """Return what tensors with these roles are: lora, dora, loha, lokr, oft, boft, diff, or "" where some are missing.

    DoRA is told by its magnitudes, whatever product they go with; OFT and BOFT in `oft_blocks` only by its shape.
    """
    have = set(roles)
    kinds = (
        ("lora", {DOWN, UP}),
        ("loha", {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        ("lokr", {"lokr_w1", "lokr_w2"}),
        ("lokr", {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
        ("lokr", {"lokr_w1_a", "lokr_w1_b", "lokr_w2"}),
        ("lokr", {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}),
        ("oft", {"oft_blocks"}),
        ("oft", {"oft_R.weight"}),
        ("boft", {"boft_R", "boft_s"}),
        ("diff", {"diff"}),
    )
    kind = next((kind for kind, needed in kinds if needed <= have), "")
    return "dora" if kind and have & {DORA_SCALE, MAGNITUDE} else kind


def split_name(name: str, unknown: str = "denoiser") -> tuple[str, str]:
    """Return (component, rest) of a layer's name, e.g. `lora_te2_x` gives (`text_encoder_2`, `x`).

    A name with none of the known beginnings is mostly the denoiser's, as some trainers write it.
    """
    for sign, component in _PREFIXES:
        if found := re.match(sign, name):
            return component, name[found.end() :]
    return unknown, name


Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the tensors of one layer by role."""


def weight_size(shapes: Shapes) -> tuple[int, int]:
    """Return rows and columns of the weight that is changed, a kernel's places counted as columns; 0: not told."""
    if DOWN in shapes:
        middle = shapes.get(MID, (1, 1))
        return shapes[UP][0], math.prod(shapes[DOWN][1:]) * math.prod(middle[2:])
    if "hada_t1" in shapes:
        return shapes["hada_w1_a"][1], shapes["hada_w1_b"][1] * math.prod(shapes["hada_t1"][2:])
    if "hada_w1_a" in shapes:
        return shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]
    if "diff" in shapes:
        return shapes["diff"][0], math.prod(shapes["diff"][1:])
    if {"lokr_w1", "lokr_w1_a"} & set(shapes):
        return _kronecker_size(shapes)
    if "oft_blocks" in shapes:
        return shapes["oft_blocks"][-3] * shapes["oft_blocks"][-1], 0
    return (shapes["boft_s"][0], math.prod(shapes["boft_R"][1:3])) if "boft_R" in shapes else (0, 0)


def rank_of(shapes: Shapes) -> int:
    """Return the rank, or the size of a rotated block; 0 for kinds that have none."""
    for role, axis in (
        (DOWN, 0),
        ("hada_w1_b", 0),
        ("lokr_w2_b", 0),
        ("lokr_w1_b", 0),
        ("oft_blocks", -1),
        ("boft_R", -1),
    ):
        if role in shapes:
            return shapes[role][axis]
    if "oft_R.weight" in shapes:
        return round((1 + math.sqrt(1 + 8 * shapes["oft_R.weight"][1])) / 2)
    return 0


def _kronecker_size(shapes: Shapes) -> tuple[int, int]:
    first = shapes["lokr_w1"] if "lokr_w1" in shapes else (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    if "lokr_w2" in shapes:
        second = (shapes["lokr_w2"][0], math.prod(shapes["lokr_w2"][1:]))
    elif "lokr_t2" in shapes:
        second = (shapes["lokr_w2_a"][1], shapes["lokr_w2_b"][1] * math.prod(shapes["lokr_t2"][2:]))
    else:
        second = (shapes["lokr_w2_a"][0], shapes["lokr_w2_b"][1])
    return first[0] * second[0], first[1] * second[1]
