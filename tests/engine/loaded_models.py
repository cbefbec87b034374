"""Tiny models loaded as the trainer loads them, their inputs by rule, and the real networks without weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lorasmith.engine.families import DrawSettings, Family, PictureRequest, identify_base
from lorasmith.engine.sources import BaseFiles

CPU = torch.device("cpu")


def load(files: BaseFiles, dtype: torch.dtype = torch.float32) -> Family:
    """The family of the files, on the processor."""
    module, identity = identify_base(files)
    return module.load(files, identity, CPU, dtype)


def pixels(height: int = 64, width: int = 64) -> torch.Tensor:
    """Two pictures of noise (2, 3, height, width) in [-1, 1]."""
    return torch.rand((2, 3, height, width), generator=torch.Generator().manual_seed(2)) * 2 - 1


def predicted(family: Family) -> torch.Tensor:
    """What the denoiser says of the same noise, prompt and timestep each time."""
    shape = (1, family.spec.latent_channels, 8, 8)
    noisy = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    timesteps = torch.tensor([700], dtype=torch.long if family.spec.objective == "ddpm" else torch.float32)
    with torch.no_grad():
        conditioning = family.collate(family.encode_prompts(["a red circle"]))
        return family.predict(noisy, timesteps, conditioning)


def drawn(family: Family, negative: str) -> np.ndarray[Any, Any]:
    """A picture of 128 x 64 pixels as numbers (64, 128, 3)."""
    wanted, unwanted = family.encode_prompts(["a red circle", negative])
    (picture,) = family.draw([PictureRequest(wanted, unwanted, 7)], DrawSettings(3, 4.0, 64, 128))
    return np.asarray(picture).astype(int)


def full_size_sdxl() -> dict[str, torch.nn.Module]:
    """The networks of Stable Diffusion XL (stabilityai/stable-diffusion-xl-base-1.0) on the meta device."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        first = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12))
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)
        )
    return {"denoiser": unet, "text_encoder": first, "text_encoder_2": second}


def full_size_sd35() -> dict[str, Any]:
    """The transformers of Stable Diffusion 3.5 Medium and Large (transformer/config.json) on the meta device."""
    from diffusers import SD3Transformer2DModel

    shared: dict[str, Any] = {"sample_size": 128, "attention_head_dim": 64, "joint_attention_dim": 4096}
    shared |= {"pooled_projection_dim": 2048, "qk_norm": "rms_norm"}
    medium = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
    large = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
    with torch.device("meta"):
        return {
            "medium": SD3Transformer2DModel(**shared, **medium, dual_attention_layers=tuple(range(13))),
            "large": SD3Transformer2DModel(**shared, **large),
        }
