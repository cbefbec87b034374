"""A tiny random but real Krea 2: real classes, a byte-level Qwen tokenizer by rule, about 0.5 M weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny_z_image import SIDE, qwen_tokenizer

WIDTH = 32
"""Width of the transformer, and of the text encoder."""
READ_LAYERS = (1, 2, 4)
"""The hidden states that the transformer reads; the text encoder has five layers."""


def build_tiny_krea2(folder: Path, *, distilled: bool = False, seed: int = 0) -> Path:
    """Write a tiny Krea 2 to `folder` in the diffusers layout (fp32 safetensors) and return `folder`."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline

    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
            vae=qwen_autoencoder(),
            text_encoder=_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=_transformer(),
            text_encoder_select_layers=READ_LAYERS,
            is_distilled=distilled,
        ).save_pretrained(folder)
    # The classes have no setting for the size of pictures; the real one, 1024 pixels, is taken where nothing says so.
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": SIDE // 8}))
    return folder


def qwen_autoencoder() -> Any:
    """An autoencoder like Qwen-Image's: a video autoencoder with 16 latent channels."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(base_dim=4).eval()


def _text_encoder(vocabulary: int) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [4, 2, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


def _transformer() -> Any:
    import torch
    from diffusers import Krea2Transformer2DModel

    transformer = Krea2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=32,
        text_hidden_dim=WIDTH,
        num_text_layers=len(READ_LAYERS),
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=48,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    for name, parameter in transformer.named_parameters():
        # All zeros: whoever forgot them would not be noticed.
        if "scale_shift_table" in name or "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return transformer.eval()
