"""A tiny random but real Lumina-Image 2.0: real classes, a Gemma tokenizer of single letters, about 0.2 M weights."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tests.tiny_z_image import SIDE, flux_autoencoder

WIDTH = 24
"""Width of the transformer, and of the text encoder."""


def build_tiny_lumina2(folder: Path, seed: int = 0) -> Path:
    """Write a tiny Lumina-Image 2.0 to `folder` in the diffusers layout (fp32 safetensors) and return `folder`."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer = gemma_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Lumina2Transformer2DModel(
            sample_size=SIDE // 8,
            hidden_size=WIDTH,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(300, 512, 512),
            cap_feat_dim=WIDTH,
        )
        Lumina2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=6.0),
            vae=flux_autoencoder(),
            text_encoder=_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
        ).save_pretrained(folder)
    return folder


def gemma_tokenizer() -> Any:
    """A Gemma tokenizer that knows single letters and bytes only."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    letters = [f"<0x{byte:02X}>" for byte in range(256)] + list("▁" + string.ascii_letters + string.digits + "<>.,-")
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters])}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[])
    # As Gemma's own file has it: every text begins with <bos>, also an empty one.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return tokenizer


def _text_encoder(vocabulary: int) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        query_pre_attn_scalar=12,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return Gemma2Model(config).eval()
