"""Qwen-Image's autoencoder (`AutoencoderKLQwenImage`): Wan's for films, trained on for pictures, which are one frame.

From a diffusers folder, or from a file of its own in the original names (ComfyUI's `qwen_image_vae.safetensors`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families._weights import FoundWeights, fill_module, find_weights, part_paths, read_weights

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.safetensors_header import TensorInfo
    from lorasmith.engine.sources import BaseFiles

PREFIXES = ("first_stage_model.", "vae.", "")
"""Where the autoencoder lies inside all-in-one files; "" is a file of its own."""
FACTOR = 8
"""Pixels per latent, each way."""
_ORIGINAL = ("encoder.conv1.weight", "decoder.upsamples.0.residual.0.gamma", "conv2.weight")
_DIFFUSERS = ("encoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.norm1.gamma", "post_quant_conv.weight")


def matches(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether names without prefix are those of this autoencoder, in the original or diffusers' names."""
    return any(all(name in tensors for name in names) for names in (_ORIGINAL, _DIFFUSERS))


def find(files: BaseFiles) -> FoundWeights | None:
    """Return where the autoencoder of a base is, given apart or inside its own file; torch-free."""
    return find_weights(part_paths(files), PREFIXES, matches)


def load(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the autoencoder in main memory as `dtype`, from the file given apart, the base's own or its folder.

    Raises BaseModelError where there is none, or where a weight is missing or left over.
    """
    from diffusers import AutoencoderKLQwenImage

    if files.kind == "folder" and not files.vae_file:
        return loading.load_part(files, "vae", AutoencoderKLQwenImage, dtype)
    found = find(files)
    if found is None:
        raise loading.missing_part(files, "vae")
    weights = read_weights(found, dtype)
    if _ORIGINAL[0] in weights:
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        weights = convert_wan_vae_to_diffusers(weights)
    # How latents are normalized, and how often they shrink, is the same in all of them: the class's own defaults.
    config = {
        "base_dim": weights["encoder.conv_in.weight"].shape[0],
        "z_dim": weights["post_quant_conv.weight"].shape[0],
    }
    return fill_module(files, "vae", AutoencoderKLQwenImage, config, weights, dtype)


def encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels (B, 3, H, W) to normalized latents (B, 16, H / 8, W / 8); the mode, no random draw."""
    mean, deviation = _statistics(vae, pixels)
    latents: torch.Tensor = vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2)
    return (latents - mean) / deviation


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode normalized latents (B, 16, h, w) to pixels (B, 3, H, W) in [-1, 1]."""
    mean, deviation = _statistics(vae, latents)
    pixels: torch.Tensor = vae.decode((latents * deviation + mean).unsqueeze(2), return_dict=False)[0]
    return pixels.squeeze(2)


def use_tiles(vae: Any, side: int) -> None:
    """Let the autoencoder take pictures singly, in tiles of `side` pixels (multiple of 32), a quarter overlapping."""
    vae.enable_slicing()
    stride = side * 3 // 4
    vae.enable_tiling(side, side, stride, stride)


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (1, 16, 1, 1) of the latents, from the autoencoder's configuration."""
    shape = (1, -1, 1, 1)
    return (
        like.new_tensor(vae.config.latents_mean).view(shape),
        like.new_tensor(vae.config.latents_std).view(shape),
    )
