"""Gemma 2, the language model that reads prompts for Lumina-Image 2.0, from folders and single files.

Single files are ComfyUI's `gemma_2_2b_fp16.safetensors`. Constants are those of google/gemma-2-2b's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import _language_model as language_model
from lorasmith.engine.families._weights import FoundWeights, fill_module, find_weights, part_paths, read_weights

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = ("text_encoders.gemma2_2b.transformer.model.", "gemma2_2b.transformer.model.", "model.", "")
"""Where the language model sits: in ComfyUI's all-in-one files, in a file of its own."""
PART = "text_encoder"
LAYERS = 26
"""Layers of Gemma 2 2B."""
_HEAD = 256
_AFTER, _BEFORE = "layers.0.post_feedforward_layernorm.weight", "layers.0.pre_feedforward_layernorm.weight"
_QUERY, _KEY, _QUERY_NORM = (f"layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "q_norm"))
_REPOS = (
    ("Alpha-VLLM/Lumina-Image-2.0", "tokenizer/"),
    ("neta-art/Neta-Lumina-diffusers", "tokenizer/"),
    ("google/gemma-2-2b", ""),
    ("google/gemma-2-2b-it", ""),
)


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names without prefix are those of a Gemma 2; Gemma 3 has a norm for its queries. Torch-free."""
    inside = language_model.is_language_model(tensors) and _AFTER in tensors and _BEFORE in tensors
    return inside and _QUERY_NORM not in tensors


def find(files: BaseFiles, width: int = 0) -> FoundWeights | None:
    """Return where a Gemma 2 with hidden states of `width` (0: any) is, in files given apart or the base's."""

    def fits(tensors: Mapping[str, TensorInfo]) -> bool:
        return matches(tensors) and width in (0, language_model.width_of(tensors))

    return find_weights(part_paths(files), PREFIXES, fits)


def config_of(tensors: Mapping[str, TensorInfo], layers: int = 0) -> dict[str, Any]:
    """Return the configuration of a Gemma 2 of these shapes with `layers` of its layers (0: all); torch-free."""
    keys = tensors[_KEY].shape[0]
    head = min(_HEAD, keys)
    return {
        **language_model.config_of(tensors, layers),
        "num_attention_heads": tensors[_QUERY].shape[0] // head,
        "num_key_value_heads": keys // head,
        "head_dim": head,
        "query_pre_attn_scalar": head,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
    }


def load(files: BaseFiles, found: FoundWeights, dtype: torch.dtype, layers: int = 0) -> Any:
    """Load a `Gemma2Model` from a single file in main memory as `dtype`, frozen and in eval mode.

    With `layers` only so many layers and no final norm: its last hidden state is `hidden_states[layers]`.
    """
    from transformers import Gemma2Config, Gemma2Model

    def build(**values: Any) -> Any:
        model = Gemma2Model(Gemma2Config(**values))
        return language_model.without_norm(model) if layers else model

    weights = language_model.read_layers(read_weights(found, dtype), layers)
    # ComfyUI's file carries the tokenizer's vocabulary as a tensor.
    weights.pop("spiece_model", None)
    return fill_module(files, PART, build, config_of(found.tensors, layers), weights, dtype)


def load_folder(files: BaseFiles, dtype: torch.dtype, layers: int, part: str = PART) -> Any:
    """Load a `Gemma2Model` from a part of a diffusers folder, with `layers` layers and no final norm; as `load`."""
    from transformers import Gemma2Model

    return language_model.load_folder(files, part, Gemma2Model, layers, dtype)


def load_tokenizer(folder: Path | None = None) -> Any:
    """Load Gemma's tokenizer from `folder`, else $LORASMITH_TOKENIZERS/gemma2 or the Hub's cache.

    Raises BaseModelError with the command that fetches it once.
    """
    place = folder or language_model.tokenizer_folder("gemma2", _REPOS)
    if place is None:
        repo, inside = _REPOS[0]
        raise BaseModelError(
            "A single-file base model has no tokenizer, and Gemma 2's is not on this machine.",
            why="It was looked for in $LORASMITH_TOKENIZERS/gemma2 and in the Hub's cache.",
            fix=f'Fetch it once (34 MB): hf download {repo} --include "{inside}*"',
        )
    return language_model.load_tokenizer(place)
