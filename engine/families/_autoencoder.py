"""The autoencoder (`AutoencoderKL`) of single files, such as `ae.safetensors`; its configuration is read from shapes.

Esser et al., arXiv:2012.09841, and its descendants with 4 or 16 latent channels, in the original or diffusers' names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.families._loading import load_part
from lorasmith.engine.families._weights import FoundWeights, fill_module, find_weights, part_paths, read_weights
from lorasmith.engine.safetensors_header import TensorInfo

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.sources import BaseFiles

PREFIXES = ("first_stage_model.", "vae.", "")
"""Where the autoencoder lies inside all-in-one files; "" is a file of its own."""
FLUX_SCALING = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
"""How the latents of FLUX.1's autoencoder are normalized; Z-Image and Lumina-Image 2.0 share it."""
_GROUPS = 32
_ORIGINAL, _DIFFUSERS = "encoder.down.", "encoder.down_blocks."
_BLOCKS = ((_ORIGINAL, "block"), (_DIFFUSERS, "resnets"))


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names and shapes, without prefix, are those of an image autoencoder; torch-free."""
    first, last = tensors.get("encoder.conv_in.weight"), tensors.get("decoder.conv_out.weight")
    if not (first and last) or len(first.shape) != 4:
        return False
    return "decoder.conv_in.weight" in tensors and bool(_style(tensors))


def find(files: BaseFiles) -> FoundWeights | None:
    """Return where the autoencoder of a base lies: in a file given apart, or inside the base's own."""
    return find_weights(part_paths(files), PREFIXES, matches)


def latent_channels(tensors: Mapping[str, TensorInfo]) -> int:
    """Return how many channels the latents have."""
    return int(tensors["decoder.conv_in.weight"].shape[1])


def config_of(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return diffusers' configuration of an autoencoder, without how its latents are scaled; torch-free."""
    begin, block = _style(tensors)
    levels = {int(name.removeprefix(begin).split(".")[0]) for name in tensors if name.startswith(begin)}
    widths = tuple(tensors[f"{begin}{level}.{block}.0.conv1.weight"].shape[0] for level in sorted(levels))
    layers = {name.split(".")[4] for name in tensors if name.startswith(f"{begin}0.{block}.")}
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": len(layers),
        "latent_channels": latent_channels(tensors),
        # 32 in all known models, whose widths are multiples of it; smaller widths only fit fewer groups.
        "norm_num_groups": math.gcd(_GROUPS, *widths),
        "use_quant_conv": _quantizer(tensors, "quant_conv"),
        "use_post_quant_conv": _quantizer(tensors, "post_quant_conv"),
        "mid_block_add_attention": any(".mid.attn_1." in name or ".mid_block.attentions." in name for name in tensors),
    }


def load(files: BaseFiles, found: FoundWeights, scaling: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build the autoencoder in main memory as `dtype`; `scaling` are its scaling and shift factor."""
    from diffusers import AutoencoderKL

    config = {**config_of(found.tensors), **scaling}
    weights = read_weights(found, dtype)
    if _style(found.tensors)[0] == _ORIGINAL:
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        weights = convert_ldm_vae_checkpoint(weights, config)
    return fill_module(files, "vae", AutoencoderKL, config, weights, dtype)


def load_any(files: BaseFiles, scaling: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Load the autoencoder from wherever it lies: a file given apart, the base's own file, or a diffusers folder.

    `scaling` is for files, which do not say how their latents are scaled.
    """
    found = find(files)
    if found:
        return load(files, found, scaling, dtype)
    from diffusers import AutoencoderKL

    return load_part(files, "vae", AutoencoderKL, dtype)


def encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels (B, 3, H, W) to shifted and scaled latents (B, C, h, w); the mode of the posterior."""
    latents: torch.Tensor = (
        vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor
    ) * vae.config.scaling_factor
    return latents


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode shifted and scaled latents (B, C, h, w) to pixels (B, 3, H, W) in [-1, 1]."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    pixels: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return pixels


def _style(tensors: Mapping[str, TensorInfo]) -> tuple[str, str]:
    """Return how the down blocks and their layers are named, or two empty strings."""
    for begin, block in _BLOCKS:
        if f"{begin}0.{block}.0.conv1.weight" in tensors:
            return begin, block
    return "", ""


def _quantizer(tensors: Mapping[str, TensorInfo], name: str) -> bool:
    return f"{name}.weight" in tensors
