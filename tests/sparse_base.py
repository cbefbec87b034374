"""A full-size base model without its weights: real configurations and headers over files that are all hole.

What reads headers alone (the wizard, `plan`, the forecast) takes it for the real thing; nothing can be trained on it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasmith.engine.families._loading import skeletons
from lorasmith.engine.simulation.references import load_reference, reference_files
from tests.tiny import TINY_BUILDERS

_NAMES = {
    "torch.bfloat16": ("BF16", 2),
    "torch.float16": ("F16", 2),
    "torch.float32": ("F32", 4),
    "torch.int64": ("I64", 8),
}


def build_sparse_base(folder: Path, family: str, name: str, changes: Mapping[str, Mapping[str, Any]] = {}) -> Path:
    """Write the reference model `[memory.NAME]` of a family as a diffusers folder; tokenizers are the tiny model's.

    `changes` are by part what its configuration has otherwise.
    """
    files = reference_files(family, name)
    configs = {part: {**config, **changes.get(part, {})} for part, config in files.configs.items()}
    files = dataclasses.replace(files, configs=configs)
    loaded: Any = load_reference(family, files)
    tiny = folder.with_name(f"{folder.name}-tiny")
    TINY_BUILDERS[family](tiny)
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    denoiser = next(part for part in ("unet", "transformer") if (folder / part).is_dir())
    with skeletons():
        modules = {denoiser: loaded.denoiser, "vae": loaded.load_vae(), **loaded.text_encoders}
    for part, module in modules.items():
        place = folder / part
        place.mkdir(exist_ok=True)
        for old in place.glob("*"):
            old.unlink()
        (place / "config.json").write_text(json.dumps(files.config(part) | _configuration(module)))
        stem = "diffusion_pytorch_model" if hasattr(module, "from_config") else "model"
        _write_hole(place / f"{stem}.safetensors", module)
    return folder


def _configuration(module: Any) -> dict[str, Any]:
    config = module.config
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {key: value for key, value in plain.items() if key != "_reference"}
    return json.loads(json.dumps({"_class_name": type(module).__name__, **kept}, default=str))  # type: ignore[no-any-return]


def _write_hole(path: Path, module: Any) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in module.state_dict().items():
        dtype, size = _NAMES[str(tensor.dtype)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.numel() * size]}
        at += tensor.numel() * size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
