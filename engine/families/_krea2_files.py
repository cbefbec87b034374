"""Krea 2's files: which variant they are, told from headers and configurations, and its transformer from one file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import BaseIdentity
from lorasmith.engine.families import _autoencoder_qwen as autoencoder
from lorasmith.engine.families import _encoder_qwen3_vl as encoder
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families._weights import FoundWeights, fill_module, find_weights, read_weights, stored_precision

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Where the transformer lies inside one file."""
TRAINING_ADAPTER = "ostris/krea2_turbo_training_adapter/krea2_turbo_training_adapter_v1.safetensors"
"""The LoRA that undoes Turbo's distillation while it is trained, as ai-toolkit does."""
TOKENS = 512
READ_LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""The hidden states of Qwen3-VL that the transformer reads; `Krea2Pipeline`'s own."""
PROMPT_WIDTH = 2560
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_image_seq_len": 256,
    "max_image_seq_len": 6400,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
"""What `Krea2Pipeline` expects of its scheduler."""
_SIDE = 1024
_PARTS = ("transformer", "vae", "text_encoder")
_NAMES = {"raw": "Raw", "turbo": "Turbo"}
_DRAWING = {"raw": (28, 4.5), "turbo": (8, 0.0)}
_TURBO, _RAW = re.compile(r"turbo", re.IGNORECASE), re.compile(r"(?:^|[-_ .])(?:raw|base)(?:[-_ .]|$)", re.IGNORECASE)
_ORIGINAL = ("first.weight", "txtfusion.projector.weight", "blocks.0.attn.wq.weight")
_DIFFUSERS = ("img_in.weight", "text_fusion.projector.weight", "transformer_blocks.0.attn.to_q.weight")


def identify_folder(files: BaseFiles) -> BaseIdentity | None:
    """Return what a diffusers folder is, or None where its pipeline is another."""
    index = files.config("")
    if index.get("_class_name") != "Krea2Pipeline":
        return None
    missing = [part for part in _PARTS if not files.weight_files(part)]
    missing += [] if (files.path / "tokenizer").is_dir() else ["tokenizer"]
    side = int(files.config("transformer").get("sample_size") or _SIDE // autoencoder.DOWNSCALE)
    variant = "turbo" if index.get("is_distilled") else "raw"
    tensors = files.tensors("transformer")
    return _identity(files, tensors, (variant, "its index"), side * autoencoder.DOWNSCALE, tuple(missing))


def identify_file(files: BaseFiles) -> BaseIdentity | None:
    """Return what one file is: the transformer alone, or all parts in one."""
    found = find_weights([files.path], PREFIXES, matches)
    if found is None:
        return None
    missing = [] if autoencoder.find(files) else ["vae"]
    missing += [] if encoder.find(files, _sizes(found.tensors)["text_hidden_dim"]) else ["text_encoder"]
    return _identity(files, found.tensors, _file_variant(files), _SIDE, tuple(missing))


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names without prefix are those of the transformer, in the original or diffusers' names."""
    return any(all(name in tensors for name in names) for names in (_ORIGINAL, _DIFFUSERS))


def read_layers(files: BaseFiles) -> tuple[int, ...]:
    """Return which hidden states of the text encoder this model reads; index 0 is the embedding."""
    told: Sequence[int] | None = files.config("").get("text_encoder_select_layers")
    return tuple(told or READ_LAYERS)


def prompt_width(files: BaseFiles) -> int:
    """Return how many numbers the transformer reads of each hidden state of a prompt token; torch-free."""
    if files.kind == "folder":
        return int(files.config("transformer").get("text_hidden_dim", PROMPT_WIDTH))
    return int(_sizes(_require_transformer(files).tensors)["text_hidden_dim"])


def load_transformer(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the transformer from a folder or one file in main memory as `dtype`; its norms stay in 32 bits."""
    from diffusers import Krea2Transformer2DModel

    if files.kind == "folder":
        return loading.load_part(files, "transformer", Krea2Transformer2DModel, dtype)
    found = _require_transformer(files)
    weights = _converted(read_weights(found, dtype))
    transformer = fill_module(files, "transformer", Krea2Transformer2DModel, config_of(found.tensors), weights, dtype)
    return _with_exact_norms(transformer, found)


def config_of(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return diffusers' configuration of the transformer from the shapes of its weights; torch-free."""
    original = _ORIGINAL[0] in tensors
    first, projector = (_ORIGINAL if original else _DIFFUSERS)[:2]
    block, norm, up = (
        ("blocks", "qknorm.qnorm.scale", "mlp.up") if original else ("transformer_blocks", "norm_q.weight", "ff.up")
    )
    query, key = ("wq", "wk") if original else ("to_q", "to_k")
    fusion = projector.split(".")[0]
    time = "tmlp.0" if original else "time_embed.linear_1"
    head = tensors[f"{block}.0.attn.{norm}"].shape[0]
    inner = f"{fusion}.refiner_blocks.0"
    text_head = tensors[f"{inner}.attn.{norm}"].shape[0]
    return {
        **_sizes(tensors),
        "in_channels": tensors[first].shape[1],
        "num_layers": _count(tensors, f"{block}."),
        "attention_head_dim": head,
        "num_attention_heads": tensors[f"{block}.0.attn.{query}.weight"].shape[0] // head,
        "num_key_value_heads": tensors[f"{block}.0.attn.{key}.weight"].shape[0] // head,
        "intermediate_size": tensors[f"{block}.0.{up}.weight"].shape[0],
        "timestep_embed_dim": tensors[f"{time}.weight"].shape[1],
        "text_num_attention_heads": tensors[f"{inner}.attn.{query}.weight"].shape[0] // text_head,
        "text_num_key_value_heads": tensors[f"{inner}.attn.{key}.weight"].shape[0] // text_head,
        "text_intermediate_size": tensors[f"{inner}.{up}.weight"].shape[0],
        "num_layerwise_text_blocks": _count(tensors, f"{fusion}.layerwise_blocks."),
        "num_refiner_text_blocks": _count(tensors, f"{fusion}.refiner_blocks."),
        # A quarter of each head for time, the rest for row and column: 32, 48, 48 of 128.
        "axes_dims_rope": (head // 4, head * 3 // 8, head * 3 // 8),
    }


def _sizes(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    original = _ORIGINAL[0] in tensors
    read = tensors[_ORIGINAL[1] if original else _DIFFUSERS[1]].shape[1]
    norm = "txtmlp.0.scale" if original else "txt_in.norm.weight"
    return {"num_text_layers": read, "text_hidden_dim": tensors[norm].shape[0]}


def _converted(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if _ORIGINAL[0] not in weights and not any(name.endswith(".scale") for name in weights):
        return weights
    from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers

    converted: dict[str, torch.Tensor] = convert_krea2_transformer_checkpoint_to_diffusers(dict(weights))
    return converted


def _with_exact_norms(transformer: Any, found: FoundWeights) -> Any:
    """Give the norms back what the file holds, in 32 bits, as `from_pretrained` keeps them: they compute in these."""
    import torch

    kept = set(transformer._keep_in_fp32_modules)
    ends = ("scale",) if _ORIGINAL[0] in found.tensors else tuple(f"{name}.weight" for name in kept)
    tensors = {name: info for name, info in found.tensors.items() if name.endswith(tuple(f".{end}" for end in ends))}
    exact = _converted(read_weights(FoundWeights(found.path, found.prefix, tensors), torch.float32))
    parameters = dict(transformer.named_parameters())
    for name, value in exact.items():
        parameters[name].data = value
    return transformer


def _require_transformer(files: BaseFiles) -> FoundWeights:
    found = find_weights([files.path], PREFIXES, matches)
    if found is None:
        raise BaseModelError(f"{files.origin} holds no Krea 2 transformer.", why=files.describe())
    return found


def _count(tensors: Mapping[str, TensorInfo], begin: str) -> int:
    return len({name.removeprefix(begin).split(".")[0] for name in tensors if name.startswith(begin)})


def _file_variant(files: BaseFiles) -> tuple[str, str]:
    metadata = files.metadata()
    told = " ".join(metadata.get(f"modelspec.{key}", "") for key in ("architecture", "title", "description"))
    for words, reason in ((told, "the file says so"), (Path(files.path).stem, "guessed from its name")):
        if _TURBO.search(words):
            return "turbo", reason
        if _RAW.search(words):
            return "raw", reason
    return "raw", "guessed: nothing says Turbo"


def _identity(
    files: BaseFiles, tensors: Mapping[str, TensorInfo], variant: tuple[str, str], side: int, missing: tuple[str, ...]
) -> BaseIdentity:
    name, reason = variant
    parameters = sum(math.prod(info.shape) for info in tensors.values() if info.shape)
    precision = stored_precision(tensors)
    count = f"{parameters / 1e9:.2f} B" if parameters >= 5e6 else f"{parameters / 1e6:.2f} M"
    guessed = f" ({reason})" if reason.startswith("guessed") else ""
    steps, guidance = _DRAWING[name]
    details: dict[str, Any] = {
        "variant_from": reason,
        "license": files.license(),
        "prompt_numbers": TOKENS * len(read_layers(files)) * prompt_width(files),
        "draw_steps": steps,
        "draw_guidance": guidance,
        "architecture": "krea2",
        "ss_base_model_version": "krea2",
    }
    if name == "turbo":
        details["training_adapter"] = TRAINING_ADAPTER
    label = f"Krea 2 {_NAMES[name]}{guessed}, velocity, {precision}, {count}"
    return BaseIdentity("krea2", label, name, "velocity", side, parameters, precision, missing, details)
