"""Tiny random but real FLUX.2 models: klein with a Qwen3 of 28 layers, dev with a Mistral of 31, 0.3 M weights each.

The language models are as deep as the hidden states that FLUX.2 reads, and narrow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny_z_image import qwen_tokenizer

SIDE = 64
WIDTH = 32
"""Width of the transformer, and of the text encoder."""


def build_tiny_flux2(folder: Path, *, distilled: bool = False, seed: int = 0) -> Path:
    """Write a tiny FLUX.2 klein to `folder` in the diffusers layout (fp32 safetensors) and return `folder`."""
    import torch
    from diffusers import Flux2KleinPipeline

    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Flux2KleinPipeline(
            scheduler=_scheduler(),
            vae=autoencoder(),
            text_encoder=_qwen(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=_transformer(guidance=False),
            is_distilled=distilled,
        ).save_pretrained(folder)
    return folder


def build_tiny_flux2_dev(folder: Path, seed: int = 0) -> Path:
    """Write a tiny FLUX.2 dev; part by part, since its pipeline would save a picture processor beside the tokenizer."""
    import json

    import torch

    tokenizer = mistral_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "scheduler": _scheduler(),
            "vae": autoencoder(),
            "text_encoder": _mistral(len(tokenizer)),
            "tokenizer": tokenizer,
            "transformer": _transformer(guidance=True),
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {
        "_class_name": "Flux2Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
        "tokenizer": ["transformers", "PixtralProcessor"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def mistral_tokenizer() -> Any:
    """A tokenizer of single bytes with Mistral's marks, whose configuration is silent on padding and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    marks = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>"]
    words = {word: index for index, word in enumerate([*marks, *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    special = {
        f"{use}_token": word for use, word in (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def autoencoder() -> Any:
    """An autoencoder like FLUX.2's: 32 latent channels, and a batch norm with statistics of their own."""
    import torch
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=4,
        sample_size=SIDE,
    )
    torch.nn.init.normal_(vae.bn.running_mean, 0.0, 0.1)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return vae.eval()


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )


def _qwen(vocabulary: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **_sizes(vocabulary, 28), rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    return Qwen3ForCausalLM(config).eval()


def _mistral(vocabulary: int) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text = MistralConfig(
        **_sizes(vocabulary, 31),
        rms_norm_eps=1e-5,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
    )
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = Mistral3Config(text_config=text, vision_config=vision, spatial_merge_size=1)
    return Mistral3ForConditionalGeneration(config).eval()


def _sizes(vocabulary: int, layers: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }


def _transformer(*, guidance: bool) -> Any:
    import torch
    from diffusers import Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    ).eval()
    # Fresh gates are nearly shut, and what the blocks learn would hardly be seen.
    for name, weight in transformer.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(weight, std=1.0)
    return transformer
