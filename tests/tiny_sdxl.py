"""A tiny Stable Diffusion XL model with the standard classes, as a diffusers folder.

Two text encoders of different width, the second with a projection; a UNet without attention in its first level, as the
real one has it, that reads six numbers of size and crop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TINY_SIDE = 64
FIRST, SECOND = 32, 64
"""Widths of the text encoders."""
SIZE_WIDTH = 8


def build_tiny_sdxl(
    folder: Path, prediction: str = "epsilon", *, zero_snr: bool = False, fp16_fix: bool = False, seed: int = 0
) -> Path:
    """Write a tiny SDXL model to `folder` in the diffusers layout (fp32 safetensors) and return `folder`.

    `fp16_fix` marks the autoencoder as one that computes in 16 bits.
    """
    import torch
    from diffusers import StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae(fp16_fix),
            text_encoder=tiny_clip(FIRST),
            text_encoder_2=tiny_clip(SECOND, projected=True),
            tokenizer=tiny_tokenizer(),
            tokenizer_2=tiny_tokenizer("!"),
            unet=_unet(),
            scheduler=_scheduler(prediction, zero_snr),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_tokenizer(pad: str = "") -> Any:
    """Return the demo's CLIP tokenizer; `pad` fills prompts up instead of the end token."""
    from lorasmith.presets.demo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    if pad:
        tokenizer.pad_token = pad
    return tokenizer


def tiny_clip(width: int, *, projected: bool = False, wide: bool | None = None, layers: int = 2) -> Any:
    """Return a random CLIP text encoder of `width`; `wide` gives it CLIP-G's activation, as `projected` does too."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        hidden_act="gelu" if (projected if wide is None else wide) else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def tiny_vae(fp16_fix: bool = False) -> Any:
    """Return a random autoencoder with SDXL's scaling."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=TINY_SIDE,
        scaling_factor=0.13025,
        force_upcast=not fp16_fix,
    )


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=TINY_SIDE // 8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=FIRST + SECOND,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=6 * SIZE_WIDTH + SECOND,
        norm_num_groups=4,
    )


def _scheduler(prediction: str, zero_snr: bool) -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="leading",
        steps_offset=1,
    )
