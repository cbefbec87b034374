"""Recognizing Chroma's variants from configurations and headers, before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.families import BaseIdentity
from lorasmith.engine.families import _flux_files as own
from lorasmith.engine.families import _flux_names as names
from lorasmith.engine.families._weights import stored_precision

if TYPE_CHECKING:
    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

TOKENS = 512
SCHEDULE: Mapping[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}
"""FLUX.1-schnell's scheduler configuration."""
_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
_VARIANTS = {
    "flash": re.compile(r"flash", re.IGNORECASE),
    "hd": re.compile(r"chroma1?[-_ ]?hd|[-_ ]hd\b", re.IGNORECASE),
    "base": re.compile(r"chroma1?[-_ ]?base|[-_ ]base\b", re.IGNORECASE),
}
_LABELS = {"base": "Chroma Base", "hd": "Chroma HD", "flash": "Chroma Flash", "unknown": "Chroma"}
_SIDES = {"base": 512}
"""Base was trained at 512 pixels (its model card), all others at 1024."""
_FLASH_DRAWING = (16, 1.0)
"""Flash has its guidance baked in and takes 16 steps of a plain solver."""


def identify_folder(files: BaseFiles) -> BaseIdentity | None:
    """Return what a diffusers folder is, or None where its pipeline is another."""
    if files.config("").get("_class_name") != "ChromaPipeline":
        return None
    config, tensors = files.config("transformer"), files.tensors("transformer")
    own.require_readable(files, tensors)
    missing = own.missing_parts(files, _PARTS)
    side = files.config("vae").get("sample_size") or own.NATIVE_SIDE
    side = int(side[0] if isinstance(side, list) else side)
    return _identity(files, tensors, missing, int(config.get("joint_attention_dim", 4096)), side)


def identify_file(files: BaseFiles) -> BaseIdentity | None:
    """Return what one file is; raises BaseModelError for packed weights."""
    found = own.find_transformer(files, "Chroma")
    if found is None:
        return None
    own.require_readable(files, found.tensors)
    width = names.diffusers_shapes(found.tensors)["context_embedder.weight"][1]
    return _identity(files, found.tensors, own.missing_parts(files, _PARTS), width, own.NATIVE_SIDE)


def transformer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the transformer's configuration from the shapes of its weights under diffusers' names; torch-free."""
    hidden, channels = shapes["distilled_guidance_layer.in_proj.weight"]
    return {
        **own.size_config(shapes),
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": names.numbers(shapes, "distilled_guidance_layer.layers."),
    }


def _identity(
    files: BaseFiles, tensors: Mapping[str, TensorInfo], missing: tuple[str, ...], width: int, side: int
) -> BaseIdentity:
    variant, guessed = _variant(files)
    parameters = sum(math.prod(shape) for shape in names.diffusers_shapes(tensors).values())
    precision = stored_precision(tensors)
    count = f"{parameters / 1e9:.2f} B" if parameters >= 5e6 else f"{parameters / 1e6:.2f} M"
    details: dict[str, Any] = {
        "license": files.license(),
        "prompt_numbers": TOKENS * width,
        "architecture": "chroma",
        "ss_base_model_version": "chroma",
    }
    if variant == "flash":
        details["draw_steps"], details["draw_guidance"] = _FLASH_DRAWING
    label = f"{_LABELS[variant]}{guessed}, {precision}, {count}"
    side = min(side, _SIDES.get(variant, side))
    return BaseIdentity("chroma", label, variant, "velocity", side, parameters, precision, missing, details)


def _variant(files: BaseFiles) -> tuple[str, str]:
    """Return the variant that names tell, which is always a guess: all have one architecture."""
    hints = [files.path.name, files.origin, files.metadata().get("modelspec.title", "")]
    text = " ".join(hints)
    found = next((variant for variant, sign in _VARIANTS.items() if sign.search(text)), "")
    return (found, ", guessed from its name") if found else ("unknown", "")
