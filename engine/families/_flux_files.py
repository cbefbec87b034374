"""The files of FLUX.1 and Chroma: a diffusers folder, one original file with or without the other parts, fp8 or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import _autoencoder as autoencoder
from lorasmith.engine.families import _encoder_clip as clip
from lorasmith.engine.families import _encoder_t5 as t5
from lorasmith.engine.families import _flux_names as names
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families._weights import PRECISIONS, FoundWeights, fill_module, find_weights, read_weights

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Where the transformer lies in all-in-one files, and in one of its own."""
CHANNELS = 64
"""Input channels of a text-to-image transformer: 16 latent channels, 2 x 2 places side by side."""
NATIVE_SIDE = 1024
_LEARNED = {
    "FLUX.1": ("vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight"),
    "Chroma": ("distilled_guidance_layer.in_proj.weight",) * 2,
}
_BLOCKS = (
    ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight", "txt_in.weight"),
    (
        *("transformer_blocks.0.attn.add_q_proj.weight", "single_transformer_blocks.0.proj_mlp.weight"),
        *("x_embedder.weight", "context_embedder.weight"),
    ),
)
"""Layers that both families have: in the original names, and in those of diffusers."""
# 384 and 128 channels: FLUX.1-Fill-dev and -Canny/Depth-dev's transformer/config.json.
_EDITORS = {384: "FLUX.1 Fill, made for inpainting", 128: "FLUX.1 Canny or Depth, made for guiding pictures"}


def matcher(family: str) -> Callable[[Mapping[str, TensorInfo]], bool]:
    """Return what tells the transformer of `FLUX.1` or `Chroma` from its names without prefix; torch-free."""
    return lambda tensors: any(
        all(name in tensors and len(tensors[name].shape) == 2 for name in (sign, *blocks))
        for sign, blocks in zip(_LEARNED[family], _BLOCKS, strict=True)
    )


def find_transformer(files: BaseFiles, family: str) -> FoundWeights | None:
    """Return where the transformer is in a base that is one file; torch-free."""
    if files.kind != "single_file":
        return None
    return find_weights([files.path], PREFIXES, matcher(family))


def require_readable(files: BaseFiles, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise BaseModelError where weights are packed in a number format that only its own library reads (nf4, int4)."""
    blocks = {name for names_of_blocks in _BLOCKS for name in names_of_blocks}
    strange = [name for name in tensors if name in blocks and tensors[name].dtype not in PRECISIONS]
    packed = any(".quant_state." in name for name in tensors) or files.config("transformer").get("quantization_config")
    if strange or packed:
        raise BaseModelError(
            f"{files.origin} stores its weights packed, which lorasmith cannot read.",
            why=f"{strange[0]} is {tensors[strange[0]].dtype}." if strange else "A quantization library made them.",
            fix="Choose the bf16, fp16 or fp8 file of this model.",
        )


def require_text_to_image(files: BaseFiles, channels: int) -> None:
    """Raise BaseModelError by name for transformers that read a picture or mask beside the noise."""
    if channels in _EDITORS:
        raise BaseModelError(
            f"{files.origin} is {_EDITORS[channels]}, which cannot be trained as a text-to-image model.",
            why=f"Its transformer reads {channels} channels instead of {CHANNELS}.",
            fix="Choose FLUX.1 dev, Krea or schnell; a LoRA that was trained on dev can be tried on it.",
        )


def missing_parts(files: BaseFiles, folder_parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the parts, by their names in a diffusers folder, that are neither there nor given apart; torch-free.

    Two text encoders are CLIP-L and T5, one is T5. A file needs no tokenizers.
    """
    two = "text_encoder_2" in folder_parts
    given = {"vae": autoencoder.find(files), "text_encoder_2" if two else "text_encoder": t5.find(files)}
    if two:
        given["text_encoder"] = clip.find_sizes(files).get("L")
    if files.kind == "single_file":
        return tuple(part for part in folder_parts if part in given and not given[part])
    return tuple(part for part in folder_parts if not given.get(part) and not _in_folder(files, part))


def refuse_missing(files: BaseFiles, parts: tuple[str, ...]) -> None:
    """Raise BaseModelError for parts that the files lack, with the setting that gives each."""
    if not parts:
        return
    raise BaseModelError(
        f"{files.origin} has no {' and no '.join(parts)}.",
        fix="Choose a complete base model, or give the parts apart: ae.safetensors as base.vae, and the text encoders' "
        "files as base.text_encoders.",
    )


def _in_folder(files: BaseFiles, part: str) -> bool:
    folder: Path = files.path / part
    return folder.is_dir() if part.startswith("tokenizer") else bool(files.weight_files(part))


def size_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the sizes of a transformer from the shapes of its weights under diffusers' names; torch-free.

    Rotary positions take 16, 56 and 56 of a head's 128 numbers (flux/util.py); other widths in these proportions.
    """
    width, channels = shapes["x_embedder.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    side = head * 7 // 16
    return {
        "in_channels": channels,
        "num_layers": names.numbers(shapes, "transformer_blocks."),
        "num_single_layers": names.numbers(shapes, "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "axes_dims_rope": (head - 2 * side, side, side),
    }


def load_transformer(files: BaseFiles, family: str, kind: Any, config_of: Any, dtype: torch.dtype) -> Any:
    """Load the transformer of a folder or of one file in main memory as `dtype`, frozen and in eval mode.

    `config_of(shapes)` gives the configuration of diffusers' class `kind`.
    """
    if files.kind == "folder":
        return loading.load_part(files, "transformer", kind, dtype)
    found = find_transformer(files, family)
    if found is None:
        raise BaseModelError(f"{files.origin} holds no {family} transformer.", why=files.describe())
    try:
        config = config_of(names.diffusers_shapes(found.tensors))
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise BaseModelError(
            f"The transformer of {files.origin} does not fit its kind of model.",
            why=f"Its sizes cannot be read from {error}.",
            fix="Download it again, or choose another base model.",
        ) from error
    weights = names.to_diffusers(read_weights(found, dtype))
    return fill_module(files, "transformer", kind, config, weights, dtype)


def load_vae(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the autoencoder given apart, that of the folder or that inside the file, frozen and in eval mode."""
    found = autoencoder.find(files)
    if found is not None:
        return autoencoder.load(files, found, autoencoder.FLUX_SCALING, dtype)
    if files.kind == "single_file":
        raise loading.missing_part(files, "vae")
    from diffusers import AutoencoderKL

    return loading.load_part(files, "vae", AutoencoderKL, dtype)


def load_t5(files: BaseFiles, part: str, dtype: torch.dtype) -> Any:
    """Load T5 given apart, that of the folder's `part`, or that inside the file."""
    if files.kind == "folder" and t5.find(files) is None:
        return t5.load_folder(files, part, dtype)
    return t5.load(files, t5.require(files), dtype)


def load_clip(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load CLIP-L given apart, that of the folder, or that inside the file."""
    found = clip.find_sizes(files).get("L")
    if found is not None:
        return clip.load(files, found, dtype, part="text_encoder")
    if files.kind == "single_file":
        raise BaseModelError(
            f"{files.origin} has no CLIP-L text encoder.",
            why="It was looked for in base.text_encoders and in the base model's own file.",
            fix="Add clip_l.safetensors to base.text_encoders.",
        )
    return clip.load_folder(files, "text_encoder", dtype, projected=False)
