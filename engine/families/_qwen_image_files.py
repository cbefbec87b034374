"""Qwen-Image's files: what they are, told from headers and configurations alone, and its transformer from one file.

Single files are ComfyUI's: `qwen_image_bf16.safetensors` or `…_fp8_e4m3fn.safetensors`, the transformer alone in
diffusers' own names, with `qwen_image_vae.safetensors` and `qwen_2.5_vl_7b_fp8_scaled.safetensors`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import BaseIdentity
from lorasmith.engine.families import _autoencoder_qwen as autoencoder
from lorasmith.engine.families import _encoder_qwen as qwen
from lorasmith.engine.families._loading import missing_part
from lorasmith.engine.families._weights import FoundWeights, fill_module, find_weights, read_weights, stored_precision

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Where the transformer lies inside one file."""
TOKENS = 1024
"""The longest prompt, without the template around it."""
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "time_shift_type": "exponential",
}
"""The scheduler configuration of Qwen/Qwen-Image."""
_SIDE = 1024
"""Qwen's own pictures are 1328 pixels; all trainers train at 1024, which it draws as well."""
_PIXELS_PER_TOKEN = 16
_SIGNS = (
    *("txt_norm.weight", "img_in.weight", "txt_in.weight", "proj_out.weight"),
    *("transformer_blocks.0.img_mod.1.weight", "transformer_blocks.0.attn.add_k_proj.weight"),
)
# Editing models since 2511 have the first mark, layered ones the second; older editing models have the same weights'
# names as Qwen-Image and are told by their own name.
_UNLIKE = {"__index_timestep_zero__": "Qwen-Image-Edit", "time_text_embed.addition_t_embedding.weight": "Layered"}
_EDIT = re.compile(r"(^|[^a-z])(edit|layered)([^a-z]|$)", re.IGNORECASE)
_PIPELINE = "QwenImagePipeline"
_OTHERS = re.compile(r"QwenImage(Edit|Layered)\w*Pipeline")


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names without prefix are those of Qwen-Image's transformer or a relative's of the same build."""
    return all(name in tensors for name in _SIGNS)


def identify_folder(files: BaseFiles) -> BaseIdentity | None:
    """Return what a diffusers folder is; raises BaseModelError for Qwen's models that edit pictures."""
    name = str(files.config("").get("_class_name"))
    if _OTHERS.fullmatch(name):
        raise _refused(files, name.removesuffix("Pipeline"))
    if name != _PIPELINE:
        return None
    tensors = files.tensors("transformer")
    missing = [part for part in ("transformer", "vae", "text_encoder") if not files.weight_files(part)]
    missing += [] if (files.path / "tokenizer").is_dir() else ["tokenizer"]
    width = int(files.config("transformer").get("joint_attention_dim", 3584))
    # The schedule is made for pictures of up to so many tokens.
    tokens = int(files.config("scheduler").get("max_image_seq_len", SCHEDULER["max_image_seq_len"]))
    side = min(_SIDE, math.isqrt(tokens) * _PIXELS_PER_TOKEN)
    return _identity(files, tensors, width, side, tuple(missing))


def identify_file(files: BaseFiles) -> BaseIdentity | None:
    """Return what one file is; raises BaseModelError for Qwen's models that edit pictures."""
    found = find_weights([files.path], PREFIXES, matches)
    if found is None:
        return None
    named = " ".join([files.path.stem, files.metadata().get("modelspec.title", "")]).replace("_", "-")
    unlike = next((word for mark, word in _UNLIKE.items() if mark in found.tensors), "")
    if unlike or _EDIT.search(named):
        raise _refused(files, unlike or "a Qwen-Image that edits pictures, by its name")
    width = found.tensors["txt_in.weight"].shape[1]
    missing = [] if autoencoder.find(files) else ["vae"]
    missing += [] if qwen.find_qwen25(files, width) else ["text_encoder"]
    return _identity(files, found.tensors, width, _SIDE, tuple(missing))


def load_transformer(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Build the transformer from one file in main memory as `dtype`."""
    from diffusers import QwenImageTransformer2DModel

    found = find_weights([files.path], PREFIXES, matches)
    if found is None:
        raise BaseModelError(f"{files.origin} holds no Qwen-Image transformer.", why=files.describe())
    config, weights = config_of(found), read_weights(found, dtype)
    return fill_module(files, "transformer", QwenImageTransformer2DModel, config, weights, dtype)


def config_of(found: FoundWeights) -> dict[str, Any]:
    """Return diffusers' configuration of the transformer from the shapes of its weights; torch-free."""
    tensors = found.tensors
    width, channels = tensors["img_in.weight"].shape
    head = tensors["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    blocks = {name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")}
    return {
        "in_channels": channels,
        "out_channels": tensors["proj_out.weight"].shape[0] // 4,
        "num_layers": len(blocks),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": tensors["txt_in.weight"].shape[1],
        # An eighth of each head for the picture, the rest for row and column: 16, 56, 56 of 128.
        "axes_dims_rope": (head // 8, head * 7 // 16, head * 7 // 16),
    }


def require_encoder(files: BaseFiles, width: int) -> FoundWeights:
    """Return where the text encoder is; raises BaseModelError naming the file that people have."""
    found = qwen.find_qwen25(files, width)
    if found is None:
        raise missing(files, ("text_encoder",))
    return found


def missing(files: BaseFiles, parts: tuple[str, ...]) -> BaseModelError:
    """Return the error for parts that a base lacks, with the settings and files that fill them."""
    if files.kind == "folder" and not files.encoder_files:
        return missing_part(files, " and no ".join(parts))
    settings = {
        "vae": "base.vae to qwen_image_vae.safetensors",
        "text_encoder": "base.text_encoders to qwen_2.5_vl_7b.safetensors",
    }
    fix = " and ".join(settings[part] for part in parts if part in settings)
    return BaseModelError(f"{files.origin} has no {' and no '.join(parts)}.", fix=f"Set {fix} or the like.")


def _refused(files: BaseFiles, what: str) -> BaseModelError:
    return BaseModelError(
        f"{files.origin} is {what}, which lorasmith cannot train.",
        why="It is trained on pairs of pictures before and after an edit, and a data set of pictures has none.",
        fix="Choose Qwen/Qwen-Image-2512 or Qwen/Qwen-Image, or rename the file if it is one of these.",
    )


def _identity(
    files: BaseFiles, tensors: Mapping[str, TensorInfo], width: int, side: int, parts_missing: tuple[str, ...]
) -> BaseIdentity:
    parameters = sum(math.prod(info.shape) for info in tensors.values())
    precision = stored_precision(tensors)
    newer = "2512" in f"{files.origin} {files.path.name}"
    words = "Qwen-Image 2512 (by its name)" if newer else "Qwen-Image"
    count = f"{parameters / 1e9:.2f} B" if parameters >= 5e6 else f"{parameters / 1e6:.2f} M"
    variant = "2512" if newer else "image"
    details = {
        "license": files.license(),
        "prompt_numbers": TOKENS * width,
        "architecture": "qwen-image-2512" if newer else "qwen-image",
        "ss_base_model_version": "qwen_image",
        "implementation": "https://github.com/QwenLM/Qwen-Image",
    }
    label = f"{words}, {precision}, {count}"
    return BaseIdentity("qwen_image", label, variant, "velocity", side, parameters, precision, parts_missing, details)
