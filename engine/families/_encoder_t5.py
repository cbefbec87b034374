"""The T5 v1.1 text encoder of single files, with its tokenizer: ComfyUI's `t5xxl_*.safetensors` and all-in-one files.

Raffel et al., arXiv:1910.10683, and google/t5-v1_1-xxl: gated GELU, relative positions, no stored configuration.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families._loading import first_line, freeze, missing_part
from lorasmith.engine.families._weights import FoundWeights, fill_module, find_weights, part_paths, read_weights

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = ("text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "")
"""Where the encoder sits: in ComfyUI's all-in-one files, in older joint text-encoder files, in a file of its own."""
PART = "T5 text encoder"
_SHARED = "shared.weight"
_TIED = "encoder.embed_tokens.weight"
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
_GATE = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
_TOKENIZER_REPOS = (
    ("google/t5-v1_1-xxl", ""),
    ("black-forest-labs/FLUX.1-dev", "tokenizer_2/"),
    ("black-forest-labs/FLUX.1-schnell", "tokenizer_2/"),
    ("black-forest-labs/FLUX.1-Krea-dev", "tokenizer_2/"),
    ("stabilityai/stable-diffusion-3.5-large", "tokenizer_3/"),
    ("stabilityai/stable-diffusion-3.5-medium", "tokenizer_3/"),
    ("lodestones/Chroma1-HD", "tokenizer/"),
)


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether tensor names without prefix are those of a T5 v1.1 encoder (whole T5s and the first T5 are not)."""
    return all(name in tensors for name in (_BIAS, _QUERY, _GATE)) and not any(
        name.startswith(("decoder.", "encoder.block.1.layer.0.SelfAttention.relative_attention_bias"))
        for name in tensors
    )


def find(files: BaseFiles) -> FoundWeights | None:
    """Return where the encoder is in the parts given apart or in the base's own file; torch-free."""
    return find_weights(part_paths(files), PREFIXES, matches)


def config_of(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return the configuration that a T5 v1.1 encoder of these shapes has (google/t5-v1_1-xxl/config.json)."""
    embedding = tensors.get(_SHARED) or tensors[_TIED]
    buckets, heads = tensors[_BIAS].shape
    inner = tensors[_QUERY].shape[0]
    return {
        "vocab_size": embedding.shape[0],
        "d_model": embedding.shape[1],
        "d_kv": inner // heads,
        "d_ff": tensors[_GATE].shape[0],
        "num_layers": len({name.split(".")[2] for name in tensors if name.startswith("encoder.block.")}),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


def load(files: BaseFiles, found: FoundWeights, dtype: torch.dtype) -> Any:
    """Load the encoder in main memory as `dtype`, frozen and in eval mode; every weight must fit."""
    from transformers import T5Config, T5EncoderModel

    weights = {name: value for name, value in read_weights(found, dtype).items() if name != "spiece_model"}
    # One embedding under two names, of which files have either or both.
    weights[_SHARED] = weights[_TIED] = weights[_SHARED if _SHARED in weights else _TIED]
    encoder = fill_module(
        files, PART, lambda **values: T5EncoderModel(T5Config(**values)), config_of(found.tensors), weights, dtype
    )
    # Tied again, or the device would hold the embedding twice.
    encoder.set_input_embeddings(encoder.shared)
    return _with_wide_outputs(encoder, dtype)


def load_folder(files: BaseFiles, part: str, dtype: torch.dtype) -> Any:
    """Load the encoder from the part `part` of a diffusers folder; as `load`."""
    from transformers import T5EncoderModel

    from lorasmith.engine.families._loading import load_part

    return load_part(files, part, T5EncoderModel, dtype)


def require(files: BaseFiles) -> FoundWeights:
    """Return where the encoder is; raises BaseModelError saying how to give one."""
    found = find(files)
    if found is None:
        raise BaseModelError(
            f"{files.origin} has no {PART}.",
            why="It was looked for in base.text_encoders and in the base model's own file.",
            fix="Add a t5xxl file, such as t5xxl_fp16.safetensors, to base.text_encoders.",
        )
    return found


def load_tokenizer(folder: Path | None = None) -> Any:
    """Load T5's tokenizer: from `folder`, else from $LORASMITH_TOKENIZERS/t5 or the Hub's cache.

    Raises BaseModelError with the command that fetches it once.
    """
    from transformers import T5Tokenizer

    place = folder or _known_folder()
    if place is None:
        raise BaseModelError(
            "A single-file base model has no tokenizer, and T5's is not on this machine.",
            why="It was looked for in the Hub's cache.",
            fix="Fetch it once (1 MB): hf download google/t5-v1_1-xxl spiece.model tokenizer_config.json "
            "special_tokens_map.json",
        )
    try:
        return T5Tokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise BaseModelError(f"Cannot load T5's tokenizer from {place}.", why=first_line(error)) from error


def folder_tokenizer(files: BaseFiles, part: str) -> Any:
    """Load T5's tokenizer from the part `part` of a diffusers folder."""
    folder = files.path / part
    if not folder.is_dir():
        raise missing_part(files, part)
    return load_tokenizer(folder)


def _known_folder() -> Path | None:
    told = os.environ.get("LORASMITH_TOKENIZERS")
    if told and (Path(told) / "t5").is_dir():
        return Path(told) / "t5"
    from huggingface_hub import try_to_load_from_cache

    for repo, folder in _TOKENIZER_REPOS:
        for name in ("tokenizer.json", "spiece.model"):
            found = try_to_load_from_cache(repo, folder + name)
            if isinstance(found, str):
                return Path(found).parent
    return None


def _with_wide_outputs(encoder: Any, dtype: torch.dtype) -> Any:
    import torch

    # T5's feed-forward outputs leave the range of fp16; transformers does the same (T5PreTrainedModel).
    if dtype == torch.float16:
        for name, module in encoder.named_modules():
            if name.endswith(".wo"):
                module.to(torch.float32)
    return freeze(encoder)
