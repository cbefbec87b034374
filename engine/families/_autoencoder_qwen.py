"""Qwen-Image's autoencoder, a video autoencoder for one frame: of folders and single files, with its own scaling.

Single files are ComfyUI's `qwen_image_vae.safetensors` in the names of Wan 2.1's code, which it descends from, and
diffusers' own. Latents (B, 16, h, w) are normalized channel by channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.families._loading import load_part
from lorasmith.engine.families._weights import FoundWeights, fill_module, find_weights, part_paths, read_weights

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = ("first_stage_model.", "vae.", "")
"""Where the autoencoder lies inside all-in-one files; "" is a file of its own."""
DOWNSCALE = 8
"""Pixels per latent, each way."""
_ORIGINAL = ("encoder.conv1.weight", "decoder.upsamples.0.residual.2.weight", "conv2.weight")
_DIFFUSERS = ("encoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.weight", "post_quant_conv.weight")
_FRAME_DIMENSIONS = 5


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names and shapes, without prefix, are those of the video autoencoder; torch-free."""
    first = next((tensors[names[0]] for names in (_ORIGINAL, _DIFFUSERS) if all(n in tensors for n in names)), None)
    return first is not None and len(first.shape) == _FRAME_DIMENSIONS


def find(files: BaseFiles) -> FoundWeights | None:
    """Return where the autoencoder of a base lies: in a file given apart, or inside the base's own."""
    return find_weights(part_paths(files), PREFIXES, matches)


def config_of(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return diffusers' configuration from the shapes of the weights; torch-free."""
    first, _, last = _ORIGINAL if _ORIGINAL[0] in tensors else _DIFFUSERS
    return {
        "base_dim": tensors[first].shape[0],
        "input_channels": tensors[first].shape[1],
        "z_dim": tensors[last].shape[0],
    }


def load_any(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the autoencoder in main memory as `dtype`: from a file given apart, the base itself, or a folder."""
    from diffusers import AutoencoderKLQwenImage

    found = find(files)
    if found is None:
        return load_part(files, "vae", AutoencoderKLQwenImage, dtype)
    weights = read_weights(found, dtype)
    if _ORIGINAL[0] in weights:
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        weights = convert_wan_vae_to_diffusers(weights)
    return fill_module(files, "vae", AutoencoderKLQwenImage, config_of(found.tensors), weights, dtype)


def encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels (B, 3, H, W) to normalized latents (B, C, H / 8, W / 8); the mode of the posterior."""
    mean, std = _scaling(vae, pixels)
    latents: torch.Tensor = (vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2) - mean) / std
    return latents


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode normalized latents (B, C, h, w) to pixels (B, 3, H, W) in [-1, 1]."""
    mean, std = _scaling(vae, latents)
    pixels: torch.Tensor = vae.decode((latents * std + mean).unsqueeze(2), return_dict=False)[0].squeeze(2)
    return pixels


def use_tiles(vae: Any, side: int) -> None:
    """Let the autoencoder take pictures singly, in tiles of `side` pixels that overlap by a quarter."""
    vae.enable_slicing()
    stride = max(DOWNSCALE, side * 3 // 4 // DOWNSCALE * DOWNSCALE)
    vae.enable_tiling(side, side, stride, stride)


def _scaling(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(value, device=like.device, dtype=like.dtype).view(1, -1, 1, 1) for value in values)
    return mean, std
