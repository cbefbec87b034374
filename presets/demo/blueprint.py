"""The demo base model's architecture: small members of the standard Stable Diffusion classes."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lorasmith.presets.demo.scenes import SIDE
from lorasmith.presets.demo.tokenizer import MAX_TOKENS, build_tokenizer


def build_vae() -> AutoencoderKL:
    """Return the untrained autoencoder: 64x64x3 to 16x16x8."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIDE,
    )


def build_text_encoder() -> CLIPTextModel:
    """Return the untrained two-layer text encoder."""
    tokenizer = build_tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Return the untrained denoiser: text is attended to at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(2, 4, 6),
        norm_num_groups=16,
    )


def scheduler_config() -> dict[str, Any]:
    """Return the noise schedule that training, LoRA training and previews share."""
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
