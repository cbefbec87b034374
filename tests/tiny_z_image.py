"""A tiny random but real Z-Image: real classes, a byte-level Qwen tokenizer by rule, about 0.2 M weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIDE = 64
WIDTH = 32
"""Width of the transformer, and of the text encoder."""
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def build_tiny_z_image(folder: Path, shift: float = 6.0, seed: int = 0) -> Path:
    """Write a tiny Z-Image to `folder` in the diffusers layout (fp32 safetensors) and return `folder`.

    `shift` tells the base (6) and Turbo (3) apart.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift),
            vae=flux_autoencoder(),
            text_encoder=_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=_transformer(),
        ).save_pretrained(folder)
    return folder


def qwen_tokenizer() -> Any:
    """A Qwen tokenizer that knows single bytes only, with the marks of a chat."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "assistant"],  # as in the real one, a word of its own
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def flux_autoencoder() -> Any:
    """An autoencoder like FLUX.1's, with 16 latent channels and no quantizing convolutions."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def _text_encoder(vocabulary: int) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    return Qwen3Model(config).eval()


def _transformer() -> Any:
    import torch
    from diffusers import ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1536, 512, 512],
    )
    # Both are zeros, so that whoever forgets them would not be noticed.
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return transformer.eval()
