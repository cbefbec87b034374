"""A tiny Chroma with the standard classes, as a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny_flux1 import HEAD, HEADS, T5_WIDTH, tiny_flux_vae, tiny_scheduler, tiny_t5, tiny_t5_tokenizer


def build_tiny_chroma(folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny Chroma to `folder` in the diffusers layout (fp32 safetensors) and return `folder`."""
    import torch
    from diffusers import ChromaPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ChromaPipeline(
            scheduler=tiny_scheduler(dynamic=False),
            vae=tiny_flux_vae(),
            text_encoder=tiny_t5(),
            tokenizer=tiny_t5_tokenizer(),
            transformer=_transformer(),
        ).save_pretrained(folder)
    return folder


def _transformer() -> Any:
    from diffusers import ChromaTransformer2DModel

    return ChromaTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        axes_dims_rope=(4, 14, 14),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=2,
    )
