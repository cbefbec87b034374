"""What text encoders that are language models share: sizes read from shapes, layers that nobody reads, tokenizers.

An image model reads hidden states from inside a language model. What lies behind the last one that it reads, with the
final norm and the head that predicts words, is never loaded: that saves a fifth of the memory and of the time.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families._loading import first_line, has_part, load_part, missing_part, read_config

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

HEAD = 128
"""Numbers in an attention head of every language model here; smaller ones have one head for keys and values."""
EMBEDDING = "embed_tokens.weight"
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
"""What a configuration calls the sizes of a language model."""
_QUERY, _KEY = "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight"
_GATE = "layers.0.mlp.gate_proj.weight"
_WORDS = ("lm_head.", "norm.")


def is_language_model(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names without prefix are those of a decoder-only language model in the Llama layout."""
    return all(name in tensors for name in (EMBEDDING, _QUERY, _KEY, _GATE))


def width_of(tensors: Mapping[str, TensorInfo]) -> int:
    """Return how many numbers a hidden state has."""
    return int(tensors[EMBEDDING].shape[1])


def layer_count(tensors: Mapping[str, TensorInfo]) -> int:
    """Return how many layers the tensors make up."""
    return len({name.split(".")[1] for name in tensors if name.startswith("layers.")})


def config_of(tensors: Mapping[str, TensorInfo], layers: int = 0) -> dict[str, Any]:
    """Return the sizes of a language model from its shapes, with `layers` of its layers (0: all); torch-free."""
    norm = tensors.get("layers.0.self_attn.q_norm.weight")
    keys = tensors[_KEY].shape[0]
    head = norm.shape[0] if norm else min(HEAD, keys)
    return {
        "vocab_size": tensors[EMBEDDING].shape[0],
        "hidden_size": width_of(tensors),
        "intermediate_size": tensors[_GATE].shape[0],
        "num_hidden_layers": layers or layer_count(tensors),
        "num_attention_heads": tensors[_QUERY].shape[0] // head,
        "num_key_value_heads": keys // head,
        "head_dim": head,
    }


def read_layers(weights: Mapping[str, torch.Tensor], layers: int = 0) -> dict[str, torch.Tensor]:
    """Return the weights up to `layers` layers (0: all with the final norm), without the head that predicts words."""
    kept = {name: value for name, value in weights.items() if not name.startswith("lm_head.")}
    if not layers:
        return kept
    inside = {name: value for name, value in kept.items() if not name.startswith(_WORDS)}
    return {name: value for name, value in inside.items() if not _behind(name, layers)}


def without_norm(model: Any) -> Any:
    """Return a cut model whose last hidden state is that of its last layer, as inside the whole model."""
    import torch

    model.norm = torch.nn.Identity()
    return model


def cut_config(config: Any, layers: int) -> Any:
    """Return a copy of a language model's configuration with the first `layers` layers only."""
    cut = copy.deepcopy(config)
    kinds = getattr(cut, "layer_types", None)
    if kinds:
        cut.layer_types = list(kinds)[:layers]
    cut.num_hidden_layers = layers
    return cut


def load_folder(files: BaseFiles, part: str, kind: Any, layers: int, dtype: torch.dtype) -> Any:
    """Load the first `layers` layers of a language model of class `kind` from a part of a diffusers folder.

    Returns the model whose `hidden_states[k]` for k <= layers are those of the whole one.
    """
    if not has_part(files, part):
        raise missing_part(files, part)
    config = read_config(files, part, kind.config_class)
    if config.num_hidden_layers < layers:
        raise BaseModelError(
            f"The {part} of {files.origin} has only {config.num_hidden_layers} layers of the {layers} that are read.",
            fix="Choose the text encoder that this base model was made with.",
        )
    return without_norm(load_part(files, part, kind, dtype, cut_config(config, layers)))


def tokenizer_folder(name: str, repos: Sequence[tuple[str, str]]) -> Path | None:
    """Return where a tokenizer is on this machine: $LORASMITH_TOKENIZERS/NAME, else the Hub's cache of `repos`.

    `repos` are pairs of a repository and the folder inside it, e.g. ("Qwen/Qwen3-4B", "").
    """
    told = os.environ.get("LORASMITH_TOKENIZERS")
    if told and (Path(told) / name).is_dir():
        return Path(told) / name
    from huggingface_hub import try_to_load_from_cache

    for repo, folder in repos:
        found = try_to_load_from_cache(repo, f"{folder}tokenizer.json")
        if isinstance(found, str):
            return Path(found).parent
    return None


def load_tokenizer(folder: Path) -> Any:
    """Load a language model's tokenizer with its chat template from a folder, without its picture processor."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BaseModelError(f"Cannot load the tokenizer in {folder}.", why=first_line(error)) from error


def _behind(name: str, layers: int) -> bool:
    return name.startswith("layers.") and int(name.split(".")[1]) >= layers
