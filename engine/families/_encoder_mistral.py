"""The Mistral Small 3 language model that reads FLUX.2 dev's prompts, from folders and single files.

Single files are those of ComfyUI (`mistral_3_small_flux2_bf16.safetensors`, fp8 too), which carry their tokenizer as a
tensor. Constants are those of mistralai/Mistral-Small-3.1-24B-Instruct-2503's configuration.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import _language_model as language_model
from lorasmith.engine.families._loading import first_line, has_part, load_part, missing_part, read_config
from lorasmith.engine.families._weights import FoundWeights, fill_module, find_weights, part_paths, read_weights

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = (
    "text_encoders.mistral3_24b.transformer.model.",
    "model.language_model.",
    "language_model.model.",
    "model.",
    "",
)
"""Where the language model sits: in all-in-one files, beside a picture encoder, in a file of its own."""
PART = "text_encoder"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set text %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for block in message.content %}{{ block.text }}{% endfor %}{% endif %}{% endset %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)
"""How Mistral Small 3 is addressed (its own template without tools and pictures), where a tokenizer does not say."""
_TEKKEN = "tekken_model"
_SPECIAL = {f"{use}_token": word for use, word in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"), ("unk", "<unk>"))}
_REPOS = (
    ("black-forest-labs/FLUX.2-dev", "tokenizer/"),
    ("diffusers/FLUX.2-dev-bnb-4bit", "tokenizer/"),
    ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", ""),
    ("mistralai/Mistral-Small-3.2-24B-Instruct-2506", ""),
)


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names without prefix are those of a Mistral: without Qwen's norms of queries and without biases."""
    unlike = ("layers.0.self_attn.q_norm.weight", "layers.0.self_attn.q_proj.bias")
    return language_model.is_language_model(tensors) and not any(name in tensors for name in unlike)


def find(files: BaseFiles, width: int = 0) -> FoundWeights | None:
    """Return where a Mistral with hidden states of `width` (0: any) is, given apart or in the base; torch-free."""

    def fits(tensors: Mapping[str, TensorInfo]) -> bool:
        return matches(tensors) and width in (0, language_model.width_of(tensors))

    return find_weights(part_paths(files), PREFIXES, fits)


def load(files: BaseFiles, found: FoundWeights, dtype: torch.dtype, layers: int) -> Any:
    """Load the first `layers` layers of a `MistralModel` from a single file, without its final norm.

    Files that were made for FLUX.2 hold no more than its 30 layers.
    """
    from transformers import MistralConfig, MistralModel

    config = {
        **language_model.config_of(found.tensors, layers),
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000_000.0},
        "max_position_embeddings": 131072,
        "sliding_window": None,
    }
    weights = language_model.read_layers(read_weights(found, dtype), layers)

    def build(**values: Any) -> Any:
        return language_model.without_norm(MistralModel(MistralConfig(**values)))

    return fill_module(files, PART, build, config, weights, dtype)


def load_folder(files: BaseFiles, dtype: torch.dtype, layers: int) -> Any:
    """Load the first `layers` layers of the language model from a diffusers folder, without its picture encoder."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    if not has_part(files, PART):
        raise missing_part(files, PART)
    config = read_config(files, PART, Mistral3Config)
    if config.text_config.num_hidden_layers < layers:
        raise BaseModelError(
            f"The {PART} of {files.origin} has only {config.text_config.num_hidden_layers} layers of {layers}.",
            fix="Choose the text encoder that this base model was made with.",
        )
    config.text_config = language_model.cut_config(config.text_config, layers)
    whole = load_part(files, PART, Mistral3ForConditionalGeneration, dtype, config)
    return language_model.without_norm(whole.model.language_model)


def load_tokenizer(folder: Path | None = None, found: FoundWeights | None = None) -> Any:
    """Load the tokenizer: from `folder`, the tensor in a file, $LORASMITH_TOKENIZERS/mistral, or the Hub's cache.

    A plain tokenizer with the chat template; the processor that the folder names would need torchvision. Raises
    BaseModelError with the command that fetches it once.
    """
    if folder is None and found is not None:
        tokenizer = _from_file(found)
        if tokenizer is not None:
            return _prepared(tokenizer)
    place = folder or language_model.tokenizer_folder("mistral", _REPOS)
    if place is None:
        raise BaseModelError(
            "The text encoder's file has no tokenizer, and Mistral's is not on this machine.",
            why="It was looked for in the file, in $LORASMITH_TOKENIZERS/mistral and in the Hub's cache.",
            fix='Fetch it once (17 MB): hf download black-forest-labs/FLUX.2-dev --include "tokenizer/*"',
        )
    from transformers import PreTrainedTokenizerFast

    try:
        # Not AutoTokenizer: the class that the configuration names would split words as older models did.
        return _prepared(PreTrainedTokenizerFast.from_pretrained(place, local_files_only=True))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BaseModelError(f"Cannot load the tokenizer in {place}.", why=first_line(error)) from error


def _prepared(tokenizer: Any) -> Any:
    # FLUX.2 was trained with padding before the prompt, which the tokenizer's class once brought along.
    tokenizer.padding_side = "left"
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _from_file(found: FoundWeights) -> Any:
    """Return the tokenizer that ComfyUI's files hold as the bytes of a tekken.json; None where there is none."""
    from safetensors import safe_open
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.mistral.tokenizer import MistralConverter

    with safe_open(found.path, framework="np") as source, tempfile.TemporaryDirectory() as folder:
        if _TEKKEN not in set(source.keys()):
            return None
        path = Path(folder) / "tekken.json"
        path.write_bytes(source.get_tensor(_TEKKEN).tobytes())
        try:
            words = MistralConverter(str(path)).converted()
        except (ImportError, KeyError, ValueError):  # an older format, for which there is no reader here
            return None
    return PreTrainedTokenizerFast(tokenizer_object=words, **_SPECIAL)
