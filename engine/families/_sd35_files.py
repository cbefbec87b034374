"""Stable Diffusion 3.5 in files: recognizing it before anything is loaded, and its networks in main memory.

A diffusers folder; one original file with or without the other parts in it; parts given apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import BaseIdentity, Component
from lorasmith.engine.families import _autoencoder as autoencoder
from lorasmith.engine.families import _encoder_clip as clip
from lorasmith.engine.families import _encoder_t5 as t5
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families._part_checks import require_fitting
from lorasmith.engine.families._weights import FoundWeights, fill_module, find_weights, read_weights, stored_precision

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

CLIP_TOKENS, T5_TOKENS = 77, 256
"""256 is what diffusers' pipeline gives T5 (`max_sequence_length`); the model was trained with 77 to 256."""
CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"
SCHEDULE: Mapping[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
"""stabilityai/stable-diffusion-3.5-large/scheduler/scheduler_config.json."""
_SCALING = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
"""stabilityai/stable-diffusion-3.5-large/vae/config.json."""
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_PARTS = ("transformer", "vae", *CLIPS)
_HEAD = 64
_SIDE = 1024
_LABELS = {
    "medium": "Stable Diffusion 3.5 Medium",
    "large": "Stable Diffusion 3.5 Large",
    "large-turbo": "Stable Diffusion 3.5 Large Turbo (by its name)",
    "3.0-medium": "Stable Diffusion 3 Medium",
    "custom": "Stable Diffusion 3.5 of another size",
}
# From the models' own cards; Turbo is made for few steps without guidance.
_DRAWING = {"medium": (40, 4.5), "large": (28, 3.5), "large-turbo": (4, 1.0), "3.0-medium": (28, 7.0)}
_ARCHITECTURES = {"medium": "5-medium", "large": "5-large", "large-turbo": "5-large", "3.0-medium": "medium"}


@dataclass(frozen=True)
class TransformerShape:
    """What the header of a transformer tells; `dual` are the blocks with a second attention over the picture."""

    width: int
    head: int
    patch: int
    latent_channels: int
    blocks: int
    dual: tuple[int, ...]
    normalized: bool
    joint: int
    captions: int
    pooled: int
    places: int
    original_names: bool


@dataclass(frozen=True)
class _Names:
    """How one layout names the layers that tell the sizes."""

    patches: str
    joint: str
    pooled: str
    places: str
    blocks: str
    norm: str


_ORIGINAL = _Names(
    "x_embedder.proj.weight",
    "context_embedder.weight",
    "y_embedder.mlp.0.weight",
    "pos_embed",
    "joint_blocks.",
    "x_block.attn.ln_q.weight",
)
_DIFFUSERS = _Names(
    "pos_embed.proj.weight",
    "context_embedder.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "pos_embed.pos_embed",
    "transformer_blocks.",
    "attn.norm_q.weight",
)


def transformer_shape(tensors: Mapping[str, TensorInfo]) -> TransformerShape | None:
    """Return the shape of a transformer of Stable Diffusion 3 or 3.5, names without prefix; None where it is none."""
    for names in (_ORIGINAL, _DIFFUSERS):
        wanted = (names.patches, names.joint, names.pooled, names.places)
        patches, joint, pooled, places = (tensors.get(name) for name in wanted)
        if not (patches and joint and pooled and places):
            continue
        if [len(info.shape) for info in (patches, joint, pooled, places)] != [4, 2, 2, 3]:
            continue
        layers = [name for name in tensors if name.startswith(names.blocks) and name.split(".")[1].isdigit()]
        blocks = {int(name.split(".")[1]) for name in layers}
        dual = {int(name.split(".")[1]) for name in layers if ".attn2." in name}
        norm = tensors.get(f"{names.blocks}0.{names.norm}")
        if not blocks:
            continue
        return TransformerShape(
            width=patches.shape[0],
            head=norm.shape[0] if norm else _HEAD,
            patch=patches.shape[2],
            latent_channels=patches.shape[1],
            blocks=max(blocks) + 1,
            dual=tuple(sorted(dual)),
            normalized=norm is not None,
            joint=joint.shape[1],
            captions=joint.shape[0],
            pooled=pooled.shape[1],
            places=math.isqrt(places.shape[1]),
            original_names=names is _ORIGINAL,
        )
    return None


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return which Stable Diffusion 3 or 3.5 model the files are, or None; reads headers and configurations only."""
    if files.kind == "folder" and files.config("").get("_class_name") != "StableDiffusion3Pipeline":
        return None
    tensors: Mapping[str, TensorInfo]
    if files.kind == "folder":
        config, tensors = files.config("transformer"), files.tensors("transformer")
        side = int(config.get("sample_size") or _SIDE // 8) * 8
        joint, pooled = int(config.get("joint_attention_dim", 4096)), int(config.get("pooled_projection_dim", 2048))
        blocks, dual = int(config.get("num_layers", 0)), len(config.get("dual_attention_layers") or ())
        normalized = config.get("qk_norm") is not None
    else:
        found = find_transformer(files)
        shape = transformer_shape(found.tensors) if found else None
        if found is None or shape is None:
            return None
        tensors, side, joint, pooled = found.tensors, _SIDE, shape.joint, shape.pooled
        blocks, dual, normalized = shape.blocks, len(shape.dual), shape.normalized
    missing, has_t5 = _missing_parts(files)
    variant = _variant(files, blocks, dual, normalized)
    # The table of places is computed, not learnt.
    tables = (_ORIGINAL.places, _DIFFUSERS.places)
    parameters = sum(math.prod(info.shape) for name, info in tensors.items() if name not in tables)
    precision = stored_precision(tensors)
    count = f"{parameters / 1e9:.2f} B" if parameters >= 5e6 else f"{parameters / 1e6:.2f} M"
    reads = [] if has_t5 else ["without T5: prompts are read by CLIP alone"]
    label = ", ".join([_LABELS[variant], precision, count, *reads])
    details: dict[str, Any] = {
        "license": files.license(),
        "prompt_numbers": (_clip_tokens(files) + T5_TOKENS) * joint + pooled,
        "text_parts": (*CLIPS, T5) if has_t5 else CLIPS,
        "architecture": f"stable-diffusion-3-{_ARCHITECTURES.get(variant, '5')}",
        "ss_base_model_version": f"sd3-{_ARCHITECTURES.get(variant, '5')}",
    }
    if variant in _DRAWING:
        details["draw_steps"], details["draw_guidance"] = _DRAWING[variant]
    return BaseIdentity("sd35", label, variant, "velocity", side, parameters, precision, missing, details)


def find_transformer(files: BaseFiles) -> FoundWeights | None:
    """Return where the transformer of a single-file base is; torch-free."""
    return find_weights([files.path], _PREFIXES, lambda tensors: transformer_shape(tensors) is not None)


def _clip_tokens(files: BaseFiles) -> int:
    return min(CLIP_TOKENS, int(files.config("text_encoder").get("max_position_embeddings", CLIP_TOKENS)))


def _variant(files: BaseFiles, blocks: int, dual: int, normalized: bool) -> str:
    """Tell the variants apart by depth; only its name tells Turbo, which has Large's shapes."""
    if not normalized:
        return "3.0-medium" if blocks == 24 and not dual else "custom"
    if blocks == 38 and not dual:
        return "large-turbo" if "turbo" in files.origin.lower() else "large"
    return "medium" if (blocks, dual) == (24, 13) else "custom"


def _missing_parts(files: BaseFiles) -> tuple[tuple[str, ...], bool]:
    """Return the parts that are neither there nor given apart, and whether there is T5, which may lack."""
    sizes = clip.find_sizes(files)
    given: dict[str, Any] = {"vae": autoencoder.find(files), CLIPS[0]: sizes.get("L"), CLIPS[1]: sizes.get("G")}
    third = t5.find(files) is not None
    if files.kind == "single_file":
        return tuple(part for part, found in given.items() if not found), third
    missing = [part for part in _PARTS if not given.get(part) and not files.weight_files(part)]
    numbers = ["", "_2"]
    # The index says whether the folder is meant to have T5.
    if files.config("").get(T5, [None])[0]:
        missing += [] if third or files.weight_files(T5) else [T5]
        third = True
        numbers.append("_3")
    missing += [f"tokenizer{n}" for n in numbers if not (files.path / f"tokenizer{n}").is_dir()]
    return tuple(missing), third


def require_parts(files: BaseFiles, identity: BaseIdentity, latent_channels: int) -> None:
    """Raise BaseModelError naming the parts that are missing or belong to another model, and how to give them."""
    if identity.parts_missing:
        raise BaseModelError(
            f"{files.origin} has no {' and no '.join(identity.parts_missing)}.",
            fix="Choose a complete base model, or give the parts apart: the autoencoder as base.vae; "
            "clip_l.safetensors, clip_g.safetensors and, if wanted, t5xxl_fp16.safetensors as base.text_encoders.",
        )
    found = find_transformer(files) if files.kind == "single_file" else None
    shape = transformer_shape(found.tensors) if found else None
    require_fitting(files, latent_channels=latent_channels, clip_width=shape.pooled if shape else 0)


def load_transformer(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the transformer in main memory; every weight must fit, and none may be left over."""
    from diffusers import SD3Transformer2DModel

    if files.kind == "folder":
        return loading.load_part(files, "transformer", SD3Transformer2DModel, dtype)
    found = find_transformer(files)
    shape = transformer_shape(found.tensors) if found else None
    if found is None or shape is None:
        raise loading.missing_part(files, "transformer")
    weights = read_weights(found, dtype)
    if shape.original_names:
        weights = _converted(files, weights)
    config = {
        "sample_size": _SIDE // 8,
        "patch_size": shape.patch,
        "in_channels": shape.latent_channels,
        "out_channels": shape.latent_channels,
        "num_layers": shape.blocks,
        "attention_head_dim": shape.head,
        "num_attention_heads": shape.width // shape.head,
        "joint_attention_dim": shape.joint,
        "caption_projection_dim": shape.captions,
        "pooled_projection_dim": shape.pooled,
        "pos_embed_max_size": shape.places,
        "dual_attention_layers": shape.dual,
        "qk_norm": "rms_norm" if shape.normalized else None,
    }
    return fill_module(files, "transformer", SD3Transformer2DModel, config, weights, dtype)


def _converted(files: BaseFiles, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    try:
        converted: dict[str, torch.Tensor] = convert_sd3_transformer_checkpoint_to_diffusers(weights)
    except KeyError as error:
        raise _unfit(files, f"It lacks {error.args[0]}.") from error
    # The converter takes what it knows out of its argument.
    if weights:
        raise _unfit(files, f"It has {len(weights)} weights too many, e.g. {sorted(weights)[0]}.")
    return converted


def _unfit(files: BaseFiles, why: str) -> BaseModelError:
    return BaseModelError(
        f"The transformer of {files.origin} does not fit its kind of model.",
        why=why,
        fix="Download it again, or choose another base model.",
    )


def load_text_encoder(files: BaseFiles, component: Component, dtype: torch.dtype) -> Any:
    """Load CLIP-L, CLIP-G or T5 in main memory: what is given apart, or the base's own."""
    if component == T5:
        third = t5.find(files)
        return t5.load(files, third, dtype) if third else t5.load_folder(files, component, dtype)
    size: clip.Size = "L" if component == CLIPS[0] else "G"
    found = clip.find_sizes(files).get(size)
    if found:
        return clip.load(files, found, dtype, size=size, projected=True, part=component)
    if files.kind == "single_file":
        raise loading.missing_part(files, component)
    return clip.load_folder(files, component, dtype, projected=True)


def load_tokenizers(files: BaseFiles, *, with_t5: bool) -> list[Any]:
    """Load the tokenizers of both CLIPs and, where there is one, of T5."""
    if files.kind == "single_file":
        return [clip.load_tokenizer(), clip.load_tokenizer("!"), *([t5.load_tokenizer()] if with_t5 else [])]
    clips = [clip.folder_tokenizer(files, part) for part in ("tokenizer", "tokenizer_2")]
    if not with_t5:
        return clips
    own = (files.path / "tokenizer_3").is_dir()
    return [*clips, t5.folder_tokenizer(files, "tokenizer_3") if own else t5.load_tokenizer()]


def load_vae(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the autoencoder in main memory: the one given apart, or the base's own."""
    found = autoencoder.find(files)
    if found:
        return autoencoder.load(files, found, _SCALING, dtype)
    from diffusers import AutoencoderKL

    return loading.load_part(files, "vae", AutoencoderKL, dtype)
