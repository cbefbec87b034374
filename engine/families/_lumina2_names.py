"""The layers of Lumina-Image 2.0's transformer in diffusers' names and in the original ones, as ComfyUI has them.

The original keeps to_q, to_k and to_v of a layer in one `qkv`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorasmith.engine.families import FusedName

if TYPE_CHECKING:
    import torch

_BLOCK = re.compile(r"(?P<block>(?:layers|noise_refiner|context_refiner)\.\d+)\.(?P<inside>.+)")
_IN_BLOCKS = {
    "attn": "attention",
    "attn.to_out.0": "attention.out",
    "attn.norm_q": "attention.q_norm",
    "attn.norm_k": "attention.k_norm",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "norm1.linear": "adaLN_modulation.1",
    "norm1.norm": "attention_norm1",
    "norm2": "attention_norm2",
}
_OUTSIDE = {
    "time_caption_embed.caption_embedder.0": "cap_embedder.0",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_UNREAD = ("norm_final.weight",)
"""Is in the original files, and nothing reads it."""


def original_name(path: str) -> str | FusedName:
    """Return the original name of the module that diffusers calls `path`."""
    match = _BLOCK.fullmatch(path)
    if match is None:
        return _OUTSIDE.get(path, path)
    block, inside = match["block"], match["inside"]
    if inside in _QKV:
        return FusedName(f"{block}.attention.qkv", tuple(f"{block}.{name}" for name in _QKV))
    if block.startswith("context_refiner") and inside == "norm1":  # has no modulation, so its norm lies open
        return f"{block}.attention_norm1"
    return f"{block}.{_IN_BLOCKS.get(inside, inside)}"


def to_diffusers(weights: Mapping[str, torch.Tensor], queries: int) -> dict[str, torch.Tensor]:
    """Rename weights with original names; `queries` are the rows of to_q, and to_k and to_v share what is left."""
    import torch

    renamed: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        if name in _UNREAD:
            continue
        path, _, kind = name.rpartition(".")
        if path.endswith(".attention.qkv"):
            block, rest = path.removesuffix("attention.qkv"), (value.shape[0] - queries) // 2
            parts = torch.split(value, [queries, rest, rest])
            renamed |= {f"{block}{own}.{kind}": part.clone() for own, part in zip(_QKV, parts, strict=True)}
        else:
            renamed[f"{_diffusers_name(path)}.{kind}"] = value
    return renamed


def _diffusers_name(path: str) -> str:
    match = _BLOCK.fullmatch(path)
    if match is None:
        return _OUTSIDE_BACK.get(path, path)
    block, inside = match["block"], match["inside"]
    if block.startswith("context_refiner") and inside == "attention_norm1":
        return f"{block}.norm1"
    return f"{block}.{_IN_BLOCKS_BACK.get(inside, inside)}"


_IN_BLOCKS_BACK = {theirs: own for own, theirs in _IN_BLOCKS.items()}
_OUTSIDE_BACK = {theirs: own for own, theirs in _OUTSIDE.items()}
