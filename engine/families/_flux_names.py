"""The names of FLUX.1's and Chroma's layers in the original files and in diffusers, and what lies fused in the former.

Black Forest Labs' code stores query, key and value as one `qkv`, and with them the feed-forward's first layer of a
single block as `linear1` (flux/modules/layers.py); diffusers has a layer for each. The names are those of ComfyUI's,
Forge's and Kohya's LoRA files too, so that both directions come from this one table. diffusers' own converter is for
the width 3072 alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorasmith.engine.families import FusedName
from lorasmith.engine.safetensors_header import TensorInfo

if TYPE_CHECKING:
    from pathlib import Path

    import torch

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE: Mapping[str, tuple[str, ...]] = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "modulation.lin": ("norm.linear",),
}
_OUTSIDE: Mapping[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
}
_SWAPPED = "final_layer.adaLN_modulation.1"
"""The original has shift before scale, diffusers scale before shift."""
_CONVERTED_WIDTH = 3072
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
_DIFFUSERS_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")
_GUIDE = re.compile(r"distilled_guidance_layer\.(layers|norms)\.(\d+)(?:\.(in|out)_layer)?")
_TO_DOUBLE = {part: (name, parts) for name, parts in _DOUBLE.items() for part in parts}
_TO_SINGLE = {part: (name, parts) for name, parts in _SINGLE.items() for part in parts}
_TO_OUTSIDE = {theirs: name for name, theirs in _OUTSIDE.items()}


def diffusers_paths(module: str) -> tuple[str, ...]:
    """Return the layers of diffusers that lie one under the other in a layer of the original; () where unknown."""
    if match := _BLOCK.fullmatch(module):
        table, begin = (
            (_DOUBLE, "transformer_blocks") if match[1] == "double" else (_SINGLE, "single_transformer_blocks")
        )
        return tuple(f"{begin}.{match[2]}.{part}" for part in table.get(match[3], ()))
    if match := _GUIDE.fullmatch(module):
        end = {"in": ".linear_1", "out": ".linear_2", None: ""}[match[3]]
        return (f"distilled_guidance_layer.{match[1]}.{match[2]}{end}",)
    return (_OUTSIDE[module],) if module in _OUTSIDE else ()


def original_name(path: str) -> str | FusedName:
    """Return the layer of the original in which a layer of diffusers lies; its own path where the original has none."""
    match = _DIFFUSERS_BLOCK.fullmatch(path)
    if match is None:
        return _TO_OUTSIDE.get(path, path)
    single, number, part = match[1], match[2], match[3]
    table, begin = (_TO_SINGLE, "single_blocks") if single else (_TO_DOUBLE, "double_blocks")
    if part not in table:
        return path
    name, parts = table[part]
    if len(parts) == 1:
        return f"{begin}.{number}.{name}"
    return FusedName(f"{begin}.{number}.{name}", tuple(path.removesuffix(part) + other for other in parts))


def kohya_name(path: str) -> str | FusedName:
    """Return the layer's name in Kohya's files: the original one with `_` for each dot, behind `lora_unet_`."""
    original = original_name(path)
    if isinstance(original, FusedName):
        return FusedName(f"lora_unet_{original.name.replace('.', '_')}", original.rows)
    return f"lora_unet_{original.replace('.', '_')}"


def is_original(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names are those of the original rather than of diffusers."""
    return "img_in.weight" in tensors


def diffusers_shapes(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor under its name in diffusers, from a header of either; torch-free."""
    if not is_original(tensors):
        return {name: tuple(info.shape) for name, info in tensors.items()}
    width = tensors["img_in.weight"].shape[0]
    return {
        renamed: (rows, *info.shape[1:]) if info.shape else ()
        for name, info in tensors.items()
        for renamed, rows in _parts(name, info.shape[0] if info.shape else 1, width)
    }


def to_diffusers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a denoiser under diffusers' names, split where the original has them fused.

    Unknown names stay as they are, so that loading strictly tells of them.
    """
    import torch

    if "img_in.weight" not in weights:
        return dict(weights)
    width = weights["img_in.weight"].shape[0]
    converted: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        parts = _parts(name, value.shape[0] if value.ndim else 1, width)
        if name.startswith(_SWAPPED):
            value = value.roll(value.shape[0] // 2, 0)
        if len(parts) == 1:
            converted[parts[0][0]] = value
            continue
        rows = torch.split(value, [count for _, count in parts])
        converted |= {renamed: row for (renamed, _), row in zip(parts, rows, strict=True)}
    return converted


def row_counts(paths: Sequence[str], rows: int, width: int) -> list[int]:
    """Return how many of `rows` belong to each layer of a fused one: `width` each, and to `proj_mlp` what is left."""
    counts = [width] * len(paths)
    counts[-1] = rows - width * (len(paths) - 1)
    return counts


def lora_state(path: Path, pipeline: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None, Any]:
    """Return a LoRA file's tensors as `pipeline.lora_state_dict` converts them, with alphas and header metadata.

    That method splits Kohya's `linear1` for the width 3072 alone; in other files the layer is split here. It has 7
    times the width: query, key, value and a feed-forward of four times the width.
    """
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path)
    ups = [name for name in tensors if name.endswith("_linear1.lora_up.weight")]
    if all(tensors[name].shape[0] == 7 * _CONVERTED_WIDTH for name in ups):
        state, alphas, metadata = pipeline.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            local_files_only=True,
            return_alphas=True,
            return_lora_metadata=True,
        )
        return dict(state), alphas, metadata
    split: dict[str, torch.Tensor] = {}
    for name in ups:
        module = name.removesuffix(".lora_up.weight")
        up, down = tensors.pop(name), tensors.pop(f"{module}.lora_down.weight")
        alpha = tensors.pop(f"{module}.alpha", None)
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        number = module.removeprefix("lora_unet_single_blocks_").removesuffix("_linear1")
        paths = diffusers_paths(f"single_blocks.{number}.linear1")
        rows_of = torch.split(up, row_counts(paths, up.shape[0], up.shape[0] // 7))
        for layer, rows in zip(paths, rows_of, strict=True):
            split |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": rows * scale}
    rest = pipeline.lora_state_dict(tensors) if tensors else {}
    return {**rest, **split}, None, None


def _parts(name: str, rows: int, width: int) -> list[tuple[str, int]]:
    module, _, kind = name.rpartition(".")
    paths = diffusers_paths(module)
    if not paths:
        return [(name, rows)]
    kind = "weight" if kind == "scale" else kind
    return list(zip([f"{path}.{kind}" for path in paths], row_counts(paths, rows, width), strict=True))


def numbers(shapes: Mapping[str, tuple[int, ...]], begin: str) -> int:
    """Return how many blocks of a kind there are: the distinct numbers after `begin`, e.g. `transformer_blocks.`."""
    return len(set(_numbers(shapes, begin)))


def _numbers(shapes: Mapping[str, tuple[int, ...]], begin: str) -> Iterator[str]:
    return (name[len(begin) :].split(".")[0] for name in shapes if name.startswith(begin))
