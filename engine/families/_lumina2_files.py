"""Lumina-Image 2.0's files: what they are, told from headers and configurations, and its transformer from one file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import BaseIdentity
from lorasmith.engine.families import _autoencoder as autoencoder
from lorasmith.engine.families import _encoder_gemma as gemma
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families import _lumina2_names as names
from lorasmith.engine.families._weights import FoundWeights, fill_module, find_weights, read_weights, stored_precision

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Where the transformer lies inside one file."""
TOKENS = 256
PROMPT_WIDTH = 2304
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 6.0,
    "use_dynamic_shifting": False,
}
"""The scheduler configuration of Alpha-VLLM/Lumina-Image-2.0."""
_SIDE, _FACTOR = 1024, 8
_PARTS = ("transformer", "vae", "text_encoder")
_ORIGINAL = ("cap_embedder.0.weight", "x_embedder.weight", "layers.0.attention.qkv.weight")
_OURS = ("time_caption_embed.caption_embedder.0.weight", "x_embedder.weight", "layers.0.attn.to_q.weight")
# Both in the names of diffusers; Lumina-Image 2.0's modulation is a second layer, Z-Image's a first one.
_ORIGINAL_MODULATION, _OUR_MODULATION = "layers.0.adaLN_modulation.1.weight", "layers.0.norm1.linear.weight"


def identify_folder(files: BaseFiles) -> BaseIdentity | None:
    """Return what a diffusers folder is, or None where its pipeline is another."""
    if files.config("").get("_class_name") not in ("Lumina2Pipeline", "Lumina2Text2ImgPipeline"):
        return None
    missing = [part for part in _PARTS if not files.weight_files(part)]
    missing += [] if (files.path / "tokenizer").is_dir() else ["tokenizer"]
    side = int(files.config("transformer").get("sample_size") or _SIDE // _FACTOR) * _FACTOR
    return _identity(files, files.tensors("transformer"), side, tuple(missing))


def identify_file(files: BaseFiles) -> BaseIdentity | None:
    """Return what one file is: the transformer alone, or all parts in one."""
    found = find_weights([files.path], PREFIXES, matches)
    if found is None:
        return None
    missing = [] if autoencoder.find(files) else ["vae"]
    missing += [] if gemma.find(files, _width_of(found.tensors)) else ["text_encoder"]
    return _identity(files, found.tensors, _SIDE, tuple(missing))


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names without prefix are those of the transformer, in the original or diffusers' names.

    Z-Image shares most of the original names and OmniGen 2 most of diffusers'.
    """
    if any(name.startswith(("ref_image_", "siglip_", "cap_pad_token")) for name in tensors):
        return False
    original = all(name in tensors for name in (*_ORIGINAL, _ORIGINAL_MODULATION))
    return original or all(name in tensors for name in (*_OURS, _OUR_MODULATION))


def load_transformer(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the transformer from a folder or one file in main memory as `dtype`."""
    from diffusers import Lumina2Transformer2DModel

    if files.kind == "folder":
        return loading.load_part(files, "transformer", Lumina2Transformer2DModel, dtype)
    found = _require_transformer(files)
    config = config_of(found.tensors)
    weights = read_weights(found, dtype)
    if _ORIGINAL[0] in weights:
        weights = names.to_diffusers(weights, config["hidden_size"])
    return fill_module(files, "transformer", Lumina2Transformer2DModel, config, weights, dtype)


def prompt_width(files: BaseFiles) -> int:
    """Return how many numbers the transformer reads of each prompt token; torch-free."""
    if files.kind == "folder":
        return int(files.config("transformer").get("cap_feat_dim", PROMPT_WIDTH))
    return _width_of(_require_transformer(files).tensors)


def config_of(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return diffusers' configuration of the transformer from the shapes of its weights; torch-free."""
    hidden, pixels = tensors["x_embedder.weight"].shape
    norm = "layers.0.attention.k_norm.weight" if _ORIGINAL[0] in tensors else "layers.0.attn.norm_k.weight"
    head = tensors[norm].shape[0]
    if _ORIGINAL[0] in tensors:
        keys = (tensors[_ORIGINAL[2]].shape[0] - hidden) // 2
    else:
        keys = tensors["layers.0.attn.to_k.weight"].shape[0]
    return {
        "in_channels": pixels // 4,
        "hidden_size": hidden,
        "num_layers": _count(tensors, "layers."),
        "num_refiner_layers": _count(tensors, "noise_refiner."),
        "num_attention_heads": hidden // head,
        "num_kv_heads": keys // head,
        # A third of each head for the place in the prompt, one for the row and one for the column: 32 of 96.
        "axes_dim_rope": (head // 3,) * 3,
        "axes_lens": (300, 512, 512),
        "cap_feat_dim": _width_of(tensors),
    }


def _require_transformer(files: BaseFiles) -> FoundWeights:
    found = find_weights([files.path], PREFIXES, matches)
    if found is None:
        raise BaseModelError(f"{files.origin} holds no Lumina-Image 2.0 transformer.", why=files.describe())
    return found


def _width_of(tensors: Mapping[str, TensorInfo]) -> int:
    name = next(name for name in (_ORIGINAL[0], _OURS[0]) if name in tensors)
    return int(tensors[name].shape[0])


def _count(tensors: Mapping[str, TensorInfo], begin: str) -> int:
    return len({name.removeprefix(begin).split(".")[0] for name in tensors if name.startswith(begin)})


def _identity(files: BaseFiles, tensors: Mapping[str, TensorInfo], side: int, missing: tuple[str, ...]) -> BaseIdentity:
    parameters = sum(math.prod(info.shape) for info in tensors.values() if info.shape)
    precision = stored_precision(tensors)
    count = f"{parameters / 1e9:.2f} B" if parameters >= 5e6 else f"{parameters / 1e6:.2f} M"
    details = {
        "license": files.license(),
        "prompt_numbers": TOKENS * prompt_width(files),
        # As sd-scripts names it in its files.
        "architecture": "lumina-2",
        "ss_base_model_version": "lumina2",
    }
    label = f"Lumina-Image 2.0, velocity, {precision}, {count}"
    return BaseIdentity("lumina2", label, "2.0", "velocity", side, parameters, precision, missing, details)
