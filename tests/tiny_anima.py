"""A tiny random but real Anima: real classes, tokenizers by rule, about 0.7 M weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny_flux1 import tiny_t5_tokenizer
from tests.tiny_krea2 import qwen_autoencoder
from tests.tiny_z_image import SIDE, qwen_tokenizer

WIDTH = 32
"""Width of the transformer, its prompts, and the text encoder."""


def build_tiny_anima(folder: Path, seed: int = 0) -> Path:
    """Write a tiny Anima to `folder` as diffusers' modular pipeline lays it out, and return `folder`."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    tokenizer, words = qwen_tokenizer(), tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            "vae": qwen_autoencoder(),
            "text_encoder": _text_encoder(len(tokenizer)),
            "text_conditioner": _conditioner(len(words)),
            "transformer": _transformer(),
            "tokenizer": tokenizer,
            "t5_tokenizer": words,
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "modular_model_index.json").write_text(json.dumps({"_class_name": "AnimaModularPipeline"}))
    # The classes have no setting for the size of pictures; the real one, 1024 pixels, is taken where nothing says so.
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": SIDE // 8}))
    return folder


def _text_encoder(vocabulary: int) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    return Qwen3Model(config).eval()


def _conditioner(vocabulary: int) -> Any:
    from diffusers import AnimaTextConditioner

    return AnimaTextConditioner(
        source_dim=WIDTH,
        target_dim=WIDTH,
        model_dim=WIDTH,
        num_layers=1,
        num_attention_heads=2,
        target_vocab_size=vocabulary,
    ).eval()


def _transformer() -> Any:
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        text_embed_dim=WIDTH,
        adaln_lora_dim=8,
        max_size=(128, 240, 240),
        patch_size=(1, 2, 2),
        rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=True,
        extra_pos_embed_type=None,
    ).eval()
