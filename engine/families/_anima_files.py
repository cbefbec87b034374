"""Anima's files: what they are, told from headers and configurations, and its networks from one file.

ComfyUI's file holds the transformer (NVIDIA's Cosmos Predict 2, `blocks.…`) and, as `llm_adapter.…`, the network that
turns what Qwen3 reads into the transformer's prompts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import BaseIdentity
from lorasmith.engine.families import _autoencoder_qwen as autoencoder
from lorasmith.engine.families import _encoder_qwen as qwen
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families._weights import FoundWeights, fill_module, find_weights, read_weights, stored_precision

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.", "")
"""Where the networks lie inside one file."""
TOKENS, PROMPT_WIDTH = 512, 1024
"""The transformer always reads so many vectors of so many numbers; a shorter prompt is followed by zeros."""
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": False,
}
"""The scheduler configuration of circlestone-labs/Anima-Base-v1.0-Diffusers; ComfyUI samples with shift 3 too."""
_SIDE = 1024
_PARTS = ("transformer", "vae", "text_encoder", "text_conditioner")
_FOLDERS = ("tokenizer", "t5_tokenizer")
_ADAPTER = "llm_adapter."
_SIGNS = (
    "x_embedder.proj.1.weight",
    "blocks.0.self_attn.q_proj.weight",
    "blocks.0.adaln_modulation_self_attn.1.weight",
    _ADAPTER + "blocks.0.cross_attn.q_proj.weight",
)
_UNREAD = ("_extra_state", "pos_embedder.", "accum_", "rotary_emb.inv_freq", "model_sampling.")
_TURBO = re.compile(r"turbo", re.IGNORECASE)
_DRAWING = {"base": (30, 4.0), "turbo": (8, 1.0)}


def identify_folder(files: BaseFiles) -> BaseIdentity | None:
    """Return what a diffusers folder is, or None; its pipeline is a modular one, so that its networks tell."""
    transformer, conditioner = files.config("transformer"), files.config("text_conditioner")
    if transformer.get("_class_name") != "CosmosTransformer3DModel":
        return None
    if conditioner.get("_class_name") != "AnimaTextConditioner":
        return None
    missing = [part for part in _PARTS if not files.weight_files(part)]
    missing += [name for name in _FOLDERS if not (files.path / name).is_dir()]
    side = int(transformer.get("sample_size") or _SIDE // autoencoder.DOWNSCALE) * autoencoder.DOWNSCALE
    numbers = int(conditioner.get("target_dim", PROMPT_WIDTH)) * int(conditioner.get("min_sequence_length", TOKENS))
    return _identity(files, files.tensors("transformer"), side, numbers, tuple(missing))


def identify_file(files: BaseFiles) -> BaseIdentity | None:
    """Return what one file is: the transformer with its adapter, or all parts in one."""
    found = find_weights([files.path], PREFIXES, matches)
    if found is None:
        return None
    sizes = conditioner_config(_adapter(found.tensors))
    missing = [] if autoencoder.find(files) else ["vae"]
    missing += [] if qwen.find(files, sizes["source_dim"]) else ["text_encoder"]
    tensors = {name: info for name, info in found.tensors.items() if not name.startswith(_ADAPTER)}
    return _identity(files, tensors, _SIDE, sizes["target_dim"] * TOKENS, tuple(missing))


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names without prefix are those of Anima; Cosmos itself has no adapter for a language model."""
    return all(sign in tensors for sign in _SIGNS)


def load_transformer(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the transformer from a folder or one file in main memory as `dtype`.

    It would make its own mask of padded pictures with torchvision, which is none of the dependencies: the family gives
    it the same mask as `condition_mask`, which goes to the same place.
    """
    from diffusers import CosmosTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers

    if files.kind == "folder":
        transformer = loading.load_part(files, "transformer", CosmosTransformer3DModel, dtype)
    else:
        found = _require(files)
        inside = {name: info for name, info in found.tensors.items() if not name.startswith(_ADAPTER)}
        weights = convert_cosmos_transformer_checkpoint_to_diffusers(_read(found, inside, dtype))
        config = transformer_config(found.tensors)
        transformer = fill_module(files, "transformer", CosmosTransformer3DModel, config, weights, dtype)
    if not transformer.config.concat_padding_mask:
        raise BaseModelError(
            f"The transformer of {files.origin} reads no mask of padded pictures, so it is not Anima's.",
            fix="Choose another base model.",
        )
    transformer.register_to_config(concat_padding_mask=False)
    return transformer


def load_conditioner(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the network between Qwen3 and the transformer from a folder or one file in main memory as `dtype`."""
    from diffusers import AnimaTextConditioner

    if files.kind == "folder":
        return loading.load_part(files, "text_conditioner", AnimaTextConditioner, dtype)
    found = _require(files)
    inside = {name: info for name, info in found.tensors.items() if name.startswith(_ADAPTER)}
    weights = {name.removeprefix(_ADAPTER): value for name, value in _read(found, inside, dtype).items()}
    config = conditioner_config(_adapter(found.tensors))
    return fill_module(files, "text_conditioner", AnimaTextConditioner, config, weights, dtype)


def load_text_encoder(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load Qwen3 whole: its last hidden state is what is read."""
    from transformers import Qwen3Model

    width = int(files.config("text_conditioner").get("source_dim", 0))
    if files.kind == "single_file":
        width = conditioner_config(_adapter(_require(files).tensors))["source_dim"]
    found = qwen.find(files, width)
    return qwen.load(files, found, dtype) if found else loading.load_part(files, "text_encoder", Qwen3Model, dtype)


def transformer_config(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return diffusers' configuration of the transformer from the shapes of its original weights; torch-free."""
    hidden, numbers = tensors["x_embedder.proj.1.weight"].shape
    head = tensors["blocks.0.self_attn.q_norm.weight"].shape[0]
    channels = numbers // 4 - 1  # the last one is the mask of padded pictures
    return {
        "in_channels": channels,
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // 4,
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "num_layers": _count(tensors, "blocks."),
        "mlp_ratio": tensors["blocks.0.mlp.layer1.weight"].shape[0] / hidden,
        "text_embed_dim": tensors["blocks.0.cross_attn.k_proj.weight"].shape[1],
        "adaln_lora_dim": tensors["blocks.0.adaln_modulation_self_attn.1.weight"].shape[0],
        # As the configuration of circlestone-labs/Anima-Base-v1.0-Diffusers has it.
        "max_size": (128, 240, 240),
        "patch_size": (1, 2, 2),
        "rope_scale": (1.0, 4.0, 4.0),
        "concat_padding_mask": True,
        "extra_pos_embed_type": None,
    }


def conditioner_config(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return diffusers' configuration of the conditioner from the shapes of its weights, names without prefix."""
    query = tensors["blocks.0.cross_attn.q_proj.weight"].shape
    return {
        "source_dim": tensors["blocks.0.cross_attn.k_proj.weight"].shape[1],
        "target_dim": tensors["embed.weight"].shape[1],
        "model_dim": query[1],
        "num_layers": _count(tensors, "blocks."),
        "num_attention_heads": query[0] // tensors["blocks.0.cross_attn.q_norm.weight"].shape[0],
        "mlp_ratio": tensors["blocks.0.mlp.0.weight"].shape[0] / query[1],
        "target_vocab_size": tensors["embed.weight"].shape[0],
        "min_sequence_length": TOKENS,
    }


def _adapter(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    return {name.removeprefix(_ADAPTER): info for name, info in tensors.items() if name.startswith(_ADAPTER)}


def _read(found: FoundWeights, inside: Mapping[str, TensorInfo], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    kept = {name: info for name, info in inside.items() if not any(part in name for part in _UNREAD)}
    return read_weights(FoundWeights(found.path, found.prefix, kept), dtype)


def _require(files: BaseFiles) -> FoundWeights:
    found = find_weights([files.path], PREFIXES, matches)
    if found is None:
        raise BaseModelError(f"{files.origin} holds no Anima transformer.", why=files.describe())
    return found


def _count(tensors: Mapping[str, TensorInfo], begin: str) -> int:
    return len({name.removeprefix(begin).split(".")[0] for name in tensors if name.startswith(begin)})


def _identity(
    files: BaseFiles, tensors: Mapping[str, TensorInfo], side: int, numbers: int, missing: tuple[str, ...]
) -> BaseIdentity:
    metadata = files.metadata()
    told = " ".join(metadata.get(f"modelspec.{key}", "") for key in ("architecture", "title", "description"))
    turbo = bool(_TURBO.search(told) or _TURBO.search(Path(files.origin).name))
    variant = "turbo" if turbo else "base"
    parameters = sum(math.prod(info.shape) for info in tensors.values() if info.shape)
    precision = stored_precision(tensors)
    count = f"{parameters / 1e9:.2f} B" if parameters >= 5e6 else f"{parameters / 1e6:.2f} M"
    steps, guidance = _DRAWING[variant]
    details = {
        "license": files.license(),
        "prompt_numbers": numbers,
        "draw_steps": steps,
        "draw_guidance": guidance,
        # As sd-scripts names it in its files.
        "architecture": "anima-preview",
        "ss_base_model_version": "anima",
    }
    guess = "" if not turbo or _TURBO.search(told) else " (guessed from its name)"
    label = f"Anima{' Turbo' if turbo else ''}{guess}, velocity, {precision}, {count}"
    return BaseIdentity("anima", label, variant, "velocity", side, parameters, precision, missing, details)
