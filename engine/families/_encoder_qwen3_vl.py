"""The language model inside Qwen3-VL, which reads prompts for Krea 2, from folders and single files.

Without pictures it is a Qwen3 with another base of its positions: the three axes of a position are the same for text.
Single files are ComfyUI's `qwen3vl_4b_*.safetensors`; constants are those of Qwen/Qwen3-VL-4B-Instruct.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import _encoder_qwen as qwen
from lorasmith.engine.families import _language_model as language_model
from lorasmith.engine.families._loading import builds_skeletons, missing_part, without_weights
from lorasmith.engine.families._weights import FoundWeights, fill_module, part_paths, read_weights
from lorasmith.engine.safetensors_header import read_header

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = (
    "text_encoders.qwen3vl_4b.transformer.model.language_model.",
    "text_encoders.qwen3vl_4b.transformer.model.",
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "model.",
)
"""Where the language model sits: in all-in-one files, beside the picture encoder in a file of its own."""
PART = "text_encoder"
_THETA = 5_000_000.0
_EYES = "visual."


def find(files: BaseFiles, width: int = 0) -> list[FoundWeights]:
    """Return the language model of a Qwen3-VL of hidden `width` (0: any) by file; [] where there is none. Torch-free.

    A Qwen3 of the same size has the very same layers, so that what counts is the picture encoder beside it.
    """
    for path in part_paths(files):
        found = _inside([path])
        if found and width in (0, language_model.width_of(_together(found))):
            return found
    return _inside(files.weight_files(PART)) if files.kind == "folder" and not files.encoder_files else []


def load(files: BaseFiles, layers: int, dtype: torch.dtype, width: int = 0) -> Any:
    """Load the first `layers` layers in main memory as `dtype`, frozen, without the final norm and the picture encoder.

    Its `hidden_states[k]` for k <= layers are those of the whole model. Raises BaseModelError where it is missing, has
    fewer layers, or does not fit.
    """
    from transformers import Qwen3Config, Qwen3Model

    found = find(files, width)
    if not found and builds_skeletons() and files.config(PART):
        return _skeleton(files, layers, dtype)
    if not found:
        raise missing_part(files, PART)
    tensors = _together(found)
    if language_model.layer_count(tensors) < layers:
        raise BaseModelError(
            f"The {PART} of {files.origin} has only {language_model.layer_count(tensors)} layers of the {layers} that "
            "are read.",
            fix="Choose the text encoder that this base model was made with, Qwen3-VL 4B.",
        )
    config = {
        **language_model.config_of(tensors, layers),
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": _theta(files)},
        "max_position_embeddings": 262144,
    }
    weights: dict[str, torch.Tensor] = {}
    for part in found:
        weights |= language_model.read_layers(read_weights(part, dtype), layers)
    return fill_module(
        files,
        PART,
        lambda **values: language_model.without_norm(Qwen3Model(Qwen3Config(**values))),
        config,
        weights,
        dtype,
    )


def _skeleton(files: BaseFiles, layers: int, dtype: torch.dtype) -> Any:
    """Build the layers that are read by the configuration alone, where there are no weights to tell the sizes."""
    from accelerate import init_empty_weights
    from transformers import Qwen3Config, Qwen3Model

    text = files.config(PART)["text_config"]
    config = Qwen3Config(**{name: text[name] for name in language_model.SIZES}, max_position_embeddings=262144)
    with init_empty_weights():
        model = language_model.without_norm(Qwen3Model(language_model.cut_config(config, layers)))
    return without_weights(model, dtype)


def load_tokenizer(folder: Path | None = None) -> Any:
    """Load the tokenizer, which Qwen3-VL shares with Qwen3; as `_encoder_qwen.load_tokenizer`."""
    return qwen.load_tokenizer(folder)


def _inside(paths: list[Path]) -> list[FoundWeights]:
    """Return the language model's tensors in files that belong together, under the prefix that they share."""
    headers = {path: read_header(path)[0] for path in paths}
    if not any(_EYES in name for header in headers.values() for name in header):
        return []
    for prefix in PREFIXES:
        found = [FoundWeights(path, prefix, _under(header, prefix)) for path, header in headers.items()]
        if qwen.matches(_together(found)):
            return [part for part in found if part.tensors]
    return []


def _under(header: Mapping[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    inside = {name[len(prefix) :]: info for name, info in header.items() if name.startswith(prefix)}
    return {name: info for name, info in inside.items() if not name.startswith((_EYES, "language_model."))}


def _together(found: list[FoundWeights]) -> dict[str, TensorInfo]:
    return {name: info for part in found for name, info in part.tensors.items()}


def _theta(files: BaseFiles) -> float:
    text = files.config(PART).get("text_config", {})
    told = text.get("rope_parameters") or text
    return float(told.get("rope_theta", _THETA))
