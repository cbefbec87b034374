"""A tiny random but real Qwen-Image: real classes, a byte-level Qwen tokenizer by rule, about 0.4 M weights.

Its autoencoder has the real one's depth, since its files tell widths only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny_z_image import qwen_tokenizer

SIDE = 64
WIDTH = 32
"""Width of the text encoder."""


def build_tiny_qwen_image(folder: Path, seed: int = 0) -> Path:
    """Write a tiny Qwen-Image to `folder` in the diffusers layout (fp32 safetensors) and return `folder`."""
    import torch
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline

    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        QwenImagePipeline(
            scheduler=_scheduler(),
            vae=AutoencoderKLQwenImage(base_dim=4).eval(),
            text_encoder=_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=_transformer(),
        ).save_pretrained(folder)
    return folder


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=4,
        max_image_seq_len=(SIDE // 16) ** 2,
    )


def _text_encoder(vocabulary: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "patch_size": 4,
            "spatial_patch_size": 4,
            "fullatt_block_indexes": [0],
            "window_size": 8,
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _transformer() -> Any:
    import torch
    from diffusers import QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 14, 14),
    ).eval()
    # Fresh gates are nearly shut, and what the blocks learn would hardly be seen.
    for name, weight in transformer.named_parameters():
        if "_mod.1." in name:
            torch.nn.init.normal_(weight, std=1.0)
    return transformer
