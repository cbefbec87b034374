"""Tiny FLUX.1 models with the standard classes, as diffusers folders: dev with guidance built in, and schnell without.

The T5 tokenizer knows whole words of a rule-made list and single characters, so that it is the same in every run.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tests.tiny_sdxl import tiny_clip, tiny_tokenizer

TINY_SIDE = 64
CLIP_WIDTH, T5_WIDTH = 32, 48
HEADS, HEAD = 2, 32
T5_TOKENS = 512
_WORDS = ("a", "red", "blue", "circle", "square", "picture", "number", "the", "of", "and", "zqx")


def build_tiny_flux1(folder: Path, *, guided: bool = True, pipeline: str = "FluxPipeline", seed: int = 0) -> Path:
    """Write a tiny FLUX.1 to `folder` in the diffusers layout (fp32 safetensors) and return `folder`.

    `guided` is dev, without it schnell; `pipeline` is the class that model_index.json names.
    """
    import json

    import torch
    from diffusers import FluxPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FluxPipeline(
            scheduler=tiny_scheduler(dynamic=guided),
            vae=tiny_flux_vae(),
            text_encoder=tiny_clip(CLIP_WIDTH),
            tokenizer=tiny_tokenizer(),
            text_encoder_2=tiny_t5(),
            tokenizer_2=tiny_t5_tokenizer(),
            transformer=_transformer(guided),
        )
    model.save_pretrained(folder)
    if pipeline != "FluxPipeline":
        index = folder / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": pipeline}))
    return folder


def tiny_t5_tokenizer() -> Any:
    """Return a T5 tokenizer of known words and single characters."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in _WORDS]
    characters = ["▁", *string.ascii_lowercase, *string.digits, *",.-'"]
    pieces += [(character, -8.0) for character in characters if f"▁{character}" not in dict(pieces)]
    pieces += [("a", -8.0)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)


def tiny_t5(width: int = T5_WIDTH) -> Any:
    """Return a random T5 v1.1 encoder of `width`."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tiny_t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


def tiny_flux_vae() -> Any:
    """Return a random autoencoder with FLUX.1's 16 latent channels and scaling."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=TINY_SIDE,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_scheduler(*, dynamic: bool) -> Any:
    """Return the scheduler of dev (`dynamic`: larger pictures are shifted more) or schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic)


def _transformer(guided: bool) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=guided,
        axes_dims_rope=(4, 14, 14),
    )
