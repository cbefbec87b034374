"""The networks of a Stable Diffusion 1.x or 2.x model, read from a folder or one file, and diffusers' way to draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families import _sd_single_file as single_file

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.sources import BaseFiles


def load_unet(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the UNet in main memory."""
    if files.kind == "single_file":
        return single_file.load_unet(files, single_file.require_facts(files), dtype)
    from diffusers import UNet2DConditionModel

    return loading.load_part(files, "unet", UNet2DConditionModel, dtype)


def load_text_encoder(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the text encoder in main memory."""
    if files.kind == "single_file":
        return single_file.load_text_encoder(files, single_file.require_facts(files), dtype)
    from transformers import CLIPTextModel

    return loading.load_part(files, "text_encoder", CLIPTextModel, dtype)


def load_vae(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the autoencoder in main memory."""
    if files.kind == "single_file":
        return single_file.load_vae(files, dtype)
    from diffusers import AutoencoderKL

    return loading.load_part(files, "vae", AutoencoderKL, dtype)


def draw_pipeline(unet: Any, noise_schedule: Mapping[str, Any], downscale: int) -> Any:
    """Return diffusers' pipeline around the UNet alone, which makes latents; `downscale` is pixels per latent."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=None,  # decoded apart, in the autoencoder's own number format
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        # The pipeline would set these two with a warning; every 1.x and 2.x model was trained so.
        scheduler=loading.build_scheduler({**noise_schedule, "steps_offset": 1, "clip_sample": False}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.vae_scale_factor = downscale
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
