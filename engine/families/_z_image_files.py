"""Z-Image's files: which variant they are, told from headers and configurations, and its transformer from one file.

ComfyUI's split files hold the transformer in the original names, where to_q, to_k and to_v are one `qkv`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import BaseIdentity
from lorasmith.engine.families import _autoencoder as autoencoder
from lorasmith.engine.families import _encoder_qwen as qwen
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families._weights import (
    FoundWeights,
    fill_module,
    find_weights,
    read_weights,
    stored_precision,
)

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Where the transformer lies inside one file."""
TRAINING_ADAPTER = "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors"
"""The LoRA that undoes Turbo's distillation while it is trained, as ai-toolkit does."""
SHIFTS = {"turbo": 3.0, "base": 6.0, "de-turbo": 3.0}
"""The timestep shift of each variant's scheduler configuration."""
TOKENS = 512
ENCODER_LAYERS = 36
"""Layers of Qwen3-4B."""
_SIDE, _PROMPT_WIDTH = 1024, 2560
_PARTS = ("transformer", "vae", "text_encoder")
_NAMES = {"turbo": "Turbo", "base": "base", "de-turbo": "De-Turbo"}
# Turbo as its model card draws (8 steps since diffusers counts the last one too), the base as its card recommends
# (28 to 50 steps, guidance 3 to 5), De-Turbo as its card does (20 to 30 steps, guidance 2 to 3).
_DRAWING = {"turbo": (8, 0.0), "base": (30, 4.0), "de-turbo": (25, 2.5)}
_DE_TURBO = re.compile(r"de[-_ ]?(turbo|distill)", re.IGNORECASE)
_TURBO = re.compile(r"turbo|\bzit\b|[_-]zit[_.-]", re.IGNORECASE)
_BASE = re.compile(r"z[-_ ]?image[-_ ]?(base|bf16|fp8)|\bbase\b|[_-]base[_.-]", re.IGNORECASE)


def identify_folder(files: BaseFiles) -> BaseIdentity | None:
    """Return what a diffusers folder is, or None where its pipeline is another."""
    if files.config("").get("_class_name") != "ZImagePipeline":
        return None
    tensors = files.tensors("transformer")
    missing = [part for part in _PARTS if not files.weight_files(part)]
    missing += [] if (files.path / "tokenizer").is_dir() else ["tokenizer"]
    variant, reason = _folder_variant(files)
    side = files.config("vae").get("sample_size") or _SIDE
    side = int(side[0] if isinstance(side, list) else side)
    return _identity(files, tensors, (variant, reason), (side, prompt_width(files)), tuple(missing))


def identify_file(files: BaseFiles) -> BaseIdentity | None:
    """Return what one file is: the transformer alone, or all parts in one."""
    found = find_weights([files.path], PREFIXES, matches)
    if found is None:
        return None
    width = found.tensors["cap_embedder.0.weight"].shape[0]
    missing = [] if autoencoder.find(files) else ["vae"]
    missing += [] if qwen.find(files, width) else ["text_encoder"]
    variant, reason = _file_variant(files)
    return _identity(files, found.tensors, (variant, reason), (_SIDE, width), tuple(missing))


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names without prefix are those of Z-Image's transformer, in the original or diffusers' names.

    Lumina-Image 2.0 shares most names, but its modulation has another number; Z-Image Omni reads pictures as well.
    """
    signs = ("cap_pad_token", "cap_embedder.0.weight", "layers.0.adaLN_modulation.0.weight")
    if not all(sign in tensors for sign in signs) or any(name.startswith("siglip_") for name in tensors):
        return False
    return "x_embedder.weight" in tensors or "all_x_embedder.2-1.weight" in tensors


def scheduler_config(variant: str) -> dict[str, Any]:
    """Return the scheduler configuration that the variant's own repository has."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": SHIFTS.get(variant, SHIFTS["base"]),
        "use_dynamic_shifting": False,
    }


def load_transformer(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the transformer from a folder or one file in main memory as `dtype`."""
    from diffusers import ZImageTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    if files.kind == "folder":
        return loading.load_part(files, "transformer", ZImageTransformer2DModel, dtype)
    found = _require_transformer(files)
    weights = read_weights(found, dtype)
    if "x_embedder.weight" in weights:
        weights = convert_z_image_transformer_checkpoint_to_diffusers(weights)
    return fill_module(files, "transformer", ZImageTransformer2DModel, config_of(found.tensors), weights, dtype)


def prompt_width(files: BaseFiles) -> int:
    """Return how many numbers the transformer reads of each prompt token; torch-free."""
    if files.kind == "folder":
        return int(files.config("transformer").get("cap_feat_dim", _PROMPT_WIDTH))
    return int(_require_transformer(files).tensors["cap_embedder.0.weight"].shape[0])


def _require_transformer(files: BaseFiles) -> FoundWeights:
    found = find_weights([files.path], PREFIXES, matches)
    if found is None:
        raise BaseModelError(f"{files.origin} holds no Z-Image transformer.", why=files.describe())
    return found


def config_of(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return diffusers' configuration of the transformer from the shapes of its weights; torch-free."""
    dim, channels = next(
        tensors[name].shape for name in ("x_embedder.weight", "all_x_embedder.2-1.weight") if name in tensors
    )
    head = next(
        tensors[f"layers.0.attention.{name}.weight"].shape[0]
        for name in ("q_norm", "norm_q")
        if f"layers.0.attention.{name}.weight" in tensors
    )
    return {
        "dim": dim,
        "in_channels": channels // 4,
        "n_layers": _count(tensors, "layers."),
        "n_refiner_layers": _count(tensors, "noise_refiner."),
        "n_heads": dim // head,
        "n_kv_heads": dim // head,
        "cap_feat_dim": tensors["cap_embedder.0.weight"].shape[0],
        # A quarter of each head for the place in the prompt, the rest for row and column: 32, 48, 48 of 128.
        "axes_dims": [head // 4, head * 3 // 8, head * 3 // 8],
        # As the Hub's configurations have it; the class's own default is shorter.
        "axes_lens": [1536, 512, 512],
    }


def _count(tensors: Mapping[str, TensorInfo], begin: str) -> int:
    return len({name.removeprefix(begin).split(".")[0] for name in tensors if name.startswith(begin)})


def _folder_variant(files: BaseFiles) -> tuple[str, str]:
    shift = files.config("scheduler").get("shift")
    named = _named(Path(files.origin).name)
    if named == "de-turbo":
        return named, "its name"
    told = next((variant for variant in ("turbo", "base") if SHIFTS[variant] == shift), "")
    if told:
        return told, "its scheduler"
    return (named, "guessed from its name") if named else ("base", "guessed")


def _file_variant(files: BaseFiles) -> tuple[str, str]:
    metadata = files.metadata()
    told = _named(" ".join(metadata.get(f"modelspec.{key}", "") for key in ("architecture", "title", "description")))
    if told:
        return told, "the file says so"
    named = _named(files.path.name)
    return (named, "guessed from its name") if named else ("base", "guessed: nothing says Turbo")


def _named(words: str) -> str:
    if _DE_TURBO.search(words):
        return "de-turbo"
    if _TURBO.search(words):
        return "turbo"
    return "base" if _BASE.search(words) else ""


def _identity(
    files: BaseFiles,
    tensors: Mapping[str, TensorInfo],
    variant: tuple[str, str],
    sizes: tuple[int, int],
    missing: tuple[str, ...],
) -> BaseIdentity:
    name, reason = variant
    side, width = sizes
    parameters = sum(math.prod(info.shape) for info in tensors.values() if info.shape)
    precision = stored_precision(tensors)
    count = f"{parameters / 1e9:.2f} B" if parameters >= 5e6 else f"{parameters / 1e6:.2f} M"
    guessed = f" ({reason})" if reason.startswith("guessed") else ""
    steps, guidance = _DRAWING[name]
    details: dict[str, Any] = {
        "variant_from": reason,
        "license": files.license(),
        "prompt_numbers": TOKENS * width,
        "draw_steps": steps,
        "draw_guidance": guidance,
        # As musubi-tuner names it in its files.
        "architecture": "Z-Image",
        "ss_base_model_version": "z_image",
    }
    if name == "turbo":
        details["training_adapter"] = TRAINING_ADAPTER
    label = f"Z-Image {_NAMES[name]}{guessed}, velocity, {precision}, {count}"
    return BaseIdentity("z_image", label, name, "velocity", side, parameters, precision, missing, details)
