"""The Qwen language models that read prompts: Qwen3 (0.6B, 4B, 8B) and Qwen2.5-VL, from folders and single files.

Single files are those of ComfyUI (`qwen_3_4b.safetensors`, `qwen_2.5_vl_7b_fp8_scaled.safetensors`). Constants are
those of the models' own configurations: Qwen/Qwen3-4B, Qwen/Qwen3-8B, Qwen/Qwen2.5-VL-7B-Instruct.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import _language_model as language_model
from lorasmith.engine.families._loading import load_part
from lorasmith.engine.families._weights import FoundWeights, fill_module, find_weights, part_paths, read_weights

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = (
    "text_encoders.qwen3_4b.transformer.model.",
    "text_encoders.qwen3_8b.transformer.model.",
    "text_encoders.qwen3_06b.transformer.model.",
    "model.",
    "",
)
"""Where a Qwen3 sits: in all-in-one files, in a file of its own."""
PREFIXES_QWEN25 = ("text_encoders.qwen25_7b.transformer.model.", "model.language_model.", "model.", "")
"""Where the language model of a Qwen2.5-VL sits; beside it is a picture encoder, which nobody reads here."""
SIZES = {1024: "0.6B", 2048: "1.7B", 2560: "4B", 4096: "8B"}
"""Qwen3's sizes by the width of their hidden states."""
PART = "text_encoder"
_THETA = 1_000_000.0
_TEXT = ("embed_tokens.", "layers.", "norm.")
_QUERY_NORM, _QUERY_BIAS = "layers.0.self_attn.q_norm.weight", "layers.0.self_attn.q_proj.bias"
_QWEN3_REPOS = (
    ("Qwen/Qwen3-4B", ""),
    ("Qwen/Qwen3-8B", ""),
    ("Qwen/Qwen3-0.6B", ""),
    ("Tongyi-MAI/Z-Image-Turbo", "tokenizer/"),
    ("Tongyi-MAI/Z-Image", "tokenizer/"),
    ("black-forest-labs/FLUX.2-klein-base-4B", "tokenizer/"),
    ("black-forest-labs/FLUX.2-klein-4B", "tokenizer/"),
    ("black-forest-labs/FLUX.2-klein-base-9B", "tokenizer/"),
    ("black-forest-labs/FLUX.2-klein-9B", "tokenizer/"),
)
_QWEN25_REPOS = (
    ("Qwen/Qwen-Image", "tokenizer/"),
    ("Qwen/Qwen-Image-2512", "tokenizer/"),
    ("Qwen/Qwen2.5-VL-7B-Instruct", ""),
)
_TOKENIZERS = {"qwen3": _QWEN3_REPOS, "qwen2.5": _QWEN25_REPOS}


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names without prefix are those of a Qwen3 language model of any size; `find` tells sizes apart."""
    return language_model.is_language_model(tensors) and _QUERY_NORM in tensors


def matches_qwen25(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names without prefix are those of the language model inside Qwen2.5-VL: queries have a bias."""
    return language_model.is_language_model(tensors) and _QUERY_BIAS in tensors and _QUERY_NORM not in tensors


def find(files: BaseFiles, width: int = 0) -> FoundWeights | None:
    """Return where a Qwen3 with hidden states of `width` (0: any) is, given apart or in the base; torch-free."""

    def fits(tensors: Mapping[str, TensorInfo]) -> bool:
        return matches(tensors) and width in (0, language_model.width_of(tensors))

    return find_weights(part_paths(files), PREFIXES, fits)


def find_qwen25(files: BaseFiles, width: int = 0) -> FoundWeights | None:
    """Return where the language model of a Qwen2.5-VL is; as `find`."""

    def fits(tensors: Mapping[str, TensorInfo]) -> bool:
        return matches_qwen25(tensors) and width in (0, language_model.width_of(tensors))

    return find_weights(part_paths(files), PREFIXES_QWEN25, fits)


def load(files: BaseFiles, found: FoundWeights, dtype: torch.dtype, layers: int = 0) -> Any:
    """Load a `Qwen3Model` from a single file in main memory as `dtype`, frozen and in eval mode.

    With `layers` only so many layers and no final norm: `hidden_states[k]` for k <= layers are those of the whole
    model, and the last hidden state is `hidden_states[layers]`.
    """
    from transformers import Qwen3Config, Qwen3Model

    def build(**values: Any) -> Any:
        model = Qwen3Model(Qwen3Config(**values))
        return language_model.without_norm(model) if layers else model

    config = {
        **language_model.config_of(found.tensors, layers),
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": _THETA},
        "max_position_embeddings": 40960,
    }
    weights = language_model.read_layers(read_weights(found, dtype), layers)
    return fill_module(files, PART, build, config, weights, dtype)


def load_folder(files: BaseFiles, dtype: torch.dtype, layers: int, part: str = PART) -> Any:
    """Load a `Qwen3Model` from a part of a diffusers folder, with `layers` layers and no final norm; as `load`."""
    from transformers import Qwen3Model

    return language_model.load_folder(files, part, Qwen3Model, layers, dtype)


def load_qwen25(files: BaseFiles, found: FoundWeights, dtype: torch.dtype) -> Any:
    """Load the language model of a Qwen2.5-VL from a single file in main memory as `dtype`, without its eyes."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    sizes = language_model.config_of(found.tensors)
    config = {
        **{name: size for name, size in sizes.items() if name != "head_dim"},
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128_000,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _THETA,
            # Turns of time, height and width; for text they are all the same: 16, 24, 24 of 64.
            "mrope_section": [sizes["head_dim"] // 8, sizes["head_dim"] * 3 // 16, sizes["head_dim"] * 3 // 16],
        },
    }
    weights = {name: value for name, value in read_weights(found, dtype).items() if name.startswith(_TEXT)}
    return fill_module(
        files, PART, lambda **values: Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**values)), config, weights, dtype
    )


def load_qwen25_folder(files: BaseFiles, dtype: torch.dtype, part: str = PART) -> Any:
    """Load the language model of a Qwen2.5-VL from a part of a diffusers folder, without its eyes."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    whole = load_part(files, part, Qwen2_5_VLForConditionalGeneration, dtype)
    return whole.model.language_model


def load_tokenizer(folder: Path | None = None, name: str = "qwen3") -> Any:
    """Load the tokenizer of `qwen3` or `qwen2.5` from `folder`, else $LORASMITH_TOKENIZERS/NAME or the Hub's cache.

    Raises BaseModelError with the command that fetches it once.
    """
    place = folder or language_model.tokenizer_folder(name, _TOKENIZERS[name])
    if place is None:
        repo, inside = _TOKENIZERS[name][0]
        what = f'--include "{inside}*"' if inside else "tokenizer.json tokenizer_config.json vocab.json merges.txt"
        raise BaseModelError(
            f"A single-file base model has no tokenizer, and that of {name} is not on this machine.",
            why=f"It was looked for in $LORASMITH_TOKENIZERS/{name} and in the Hub's cache.",
            fix=f"Fetch it once (11 MB): hf download {repo} {what}",
        )
    return language_model.load_tokenizer(place)
