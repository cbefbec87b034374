"""Tiny models in the file layouts that people have: one file a part as ComfyUI splits them, or all parts in one.

Names are written out here once more, from the original code's side, so that tests do not check a converter against
itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.tiny_ldm import _vae_name, _vae_value

FP8_SCALE = 0.25


def part(folder: Path, name: str) -> dict[str, Any]:
    """The weights of one part of a diffusers folder."""
    from safetensors.torch import load_file

    weights: dict[str, Any] = {}
    for path in sorted((folder / name).glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def original_autoencoder(folder: Path) -> dict[str, Any]:
    """The autoencoder of a diffusers folder in the names of the original code, as in `ae.safetensors`."""
    return {_vae_name(name): _vae_value(name, value) for name, value in part(folder, "vae").items()}


def fused(weights: Mapping[str, Any], names: tuple[str, ...], into: str) -> dict[str, Any]:
    """Put layers one under the other into one: `names` are the ends of their paths, `into` the end of the new one."""
    import torch

    begins = [name.removesuffix(f"{names[0]}.weight") for name in weights if name.endswith(f".{names[0]}.weight")]
    rest = {name: value for name, value in weights.items() if not name.endswith(tuple(f".{n}.weight" for n in names))}
    return rest | {
        f"{begin}{into}.weight": torch.cat([weights[f"{begin}{n}.weight"] for n in names]) for begin in begins
    }


def in_fp8(weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Store matrices as ComfyUI's scaled fp8; returns what is stored, and what it means in fp32."""
    import torch

    stored, meant = dict(weights), dict(weights)
    for name, value in weights.items():
        if value.ndim == 2 and name.endswith(".weight"):
            stored[name] = (value / FP8_SCALE).to(torch.float8_e4m3fn)
            stored[f"{name.removesuffix('.weight')}.scale_weight"] = torch.tensor(FP8_SCALE)
            meant[name] = stored[name].float() * FP8_SCALE
    return stored, meant


def write(path: Path, weights: Mapping[str, Any], prefix: str = "", metadata: Mapping[str, str] | None = None) -> Path:
    """Write weights with `prefix` before each name."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {prefix + name: value.clone().contiguous() for name, value in weights.items()}, path, dict(metadata or {})
    )
    return path


def header(path: Path, tensors: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a file with the header of tensors of these shapes in bf16, and no numbers behind it worth reading."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, shape in tensors.items():
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, 0]}
    text = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path
