"""Sizes that follow from settings and headers alone: the adapter and the base's weights. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.engine import adapter_layers

if TYPE_CHECKING:
    from lorasmith.engine.config import AdapterSettings
    from lorasmith.engine.families import FamilySpec
    from lorasmith.engine.sources import BaseFiles, TensorInfo

_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
_DENOISER_PARTS = ("unet", "transformer")
_SINGLE_FILE_PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class AdaptedLayer:
    """The weight shape of a layer, and how it is adapted."""

    shape: tuple[int, ...]
    plan: adapter_layers.LayerPlan


AdaptedLayers = Mapping[tuple[str, str], AdaptedLayer]
"""The layers to adapt by (component, path)."""


def adapted_layers(settings: AdapterSettings, spec: FamilySpec, files: BaseFiles) -> AdaptedLayers | None:
    """Return the layers to adapt, or None where headers do not tell.

    A single file in the original layout names convolutions, text encoders and blocks in ways that only loading
    translates.
    """
    single = files.kind == "single_file"
    convolutions = settings.kind == "locon" or settings.convolutions
    translated = convolutions or settings.text_encoder or adapter_layers.has_patterns(settings)
    if (single and translated) or settings.targets not in spec.targets:
        return None
    parts = {"denoiser": denoiser_tensors(files)}
    if settings.text_encoder:
        parts |= {part: files.tensors(part) for part in spec.trainable_text_encoders}
    layers: dict[tuple[str, str], AdaptedLayer] = {}
    for component, tensors in parts.items():
        shapes = _layer_shapes(tensors)
        for path, plan in adapter_layers.plan_layers(shapes, spec, settings, component).items():
            layers[component, path] = AdaptedLayer(shapes[path], plan)
    return layers or None


def unfound_patterns(settings: AdapterSettings, spec: FamilySpec, files: BaseFiles) -> list[str]:
    """Return a sentence with its fix for each pattern that is found in no layer, as far as headers tell."""
    if not adapter_layers.has_patterns(settings) or files.kind == "single_file":
        return []
    candidates = adapted_layers(adapter_layers.without_patterns(settings), spec, files)
    return adapter_layers.unfound_patterns(candidates, spec, settings) if candidates else []


def denoiser_tensors(files: BaseFiles) -> dict[str, TensorInfo]:
    """Return the header of the denoiser by tensor name; {} where it is not found."""
    if files.kind == "single_file":
        tensors = files.tensors("")
        own = {n.removeprefix(_SINGLE_FILE_PREFIX): t for n, t in tensors.items() if n.startswith(_SINGLE_FILE_PREFIX)}
        return own or tensors
    return next((tensors for part in _DENOISER_PARTS if (tensors := files.tensors(part))), {})


def _layer_shapes(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Return the weight shapes of what may be linear and convolution layers, by path."""
    layers = {name.removesuffix(".weight"): info.shape for name, info in tensors.items() if name.endswith(".weight")}
    return {path: shape for path, shape in layers.items() if len(shape) in (2, 4)}


def num_parameters(layers: AdaptedLayers, settings: AdapterSettings) -> int:
    """Return how many numbers the adapter of these layers has."""
    return sum(
        math.prod(shape)
        for layer in layers.values()
        for shape in adapter_layers.tensor_shapes(layer.shape, layer.plan, settings).values()
    )


def weights_bytes(files: BaseFiles) -> dict[str, int]:
    """Return the bytes of the weights in each part of the base model, or in its one file."""
    parts = [""] if files.kind == "single_file" else [part for part in files.config("") if not part.startswith("_")]
    sizes = {part or files.path.name: _total_bytes(files.tensors(part)) for part in parts}
    return {part: size for part, size in sizes.items() if size}


def _total_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(math.prod(info.shape) * _DTYPE_BYTES.get(info.dtype, 1) for info in tensors.values())
