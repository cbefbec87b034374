"""A tiny Stable Diffusion 3.5 with the standard classes: as a diffusers folder, and in the files that people have.

Three blocks: the first has a second attention over the picture, as Medium's have, and the last leaves the prompt alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import split_files
from tests.tiny_flux1 import tiny_t5, tiny_t5_tokenizer
from tests.tiny_sdxl import tiny_clip, tiny_tokenizer

SIDE = 64
FIRST, SECOND, JOINT = 32, 64, 96
"""Widths of CLIP-L and CLIP-G, and of T5, which holds both side by side."""
BLOCKS = 3


@dataclass(frozen=True)
class TinyFiles:
    """The same model as a folder, as one file, and in parts: the transformer alone (in two spellings), and the rest."""

    folder: Path
    whole: Path
    transformer: Path
    diffusers_transformer: Path
    vae: Path
    encoders: tuple[Path, Path, Path]


def build_tiny_sd35(folder: Path, *, with_t5: bool = True, dual: bool = True, seed: int = 0) -> Path:
    """Write a tiny Stable Diffusion 3.5 to `folder` in the diffusers layout (fp32 safetensors) and return `folder`."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = tiny_clip(FIRST, projected=True, wide=False)
        # As in the real model, which reads CLIP-L's pooled state as it is.
        first.text_projection.weight.data = torch.eye(FIRST)
        StableDiffusion3Pipeline(
            transformer=_transformer(dual),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
            vae=_vae(),
            text_encoder=first,
            tokenizer=tiny_tokenizer(),
            text_encoder_2=tiny_clip(SECOND, projected=True),
            tokenizer_2=tiny_tokenizer("!"),
            text_encoder_3=tiny_t5(JOINT) if with_t5 else None,
            tokenizer_3=tiny_t5_tokenizer() if with_t5 else None,
        ).save_pretrained(folder)
    return folder


def build_tiny_files(folder: Path) -> TinyFiles:
    """Write one random model in all layouts."""
    base = build_tiny_sd35(folder / "base")
    for name, part in (("clip", "tokenizer"), ("t5", "tokenizer_3")):
        (folder / name).symlink_to(base / part)
    plain, decoder = split_files.part(base, "transformer"), split_files.original_autoencoder(base)
    original = original_transformer(plain)
    first, second, third = (split_files.part(base, f"text_encoder{n}") for n in ("", "_2", "_3"))
    whole = {f"model.diffusion_model.{name}": value for name, value in original.items()}
    whole |= {f"first_stage_model.{name}": value for name, value in decoder.items()}
    for name, weights in (("clip_l", first), ("clip_g", second), ("t5xxl", third)):
        whole |= {f"text_encoders.{name}.transformer.{key}": value for key, value in weights.items()}
    return TinyFiles(
        base,
        split_files.write(folder / "sd3.5_all.safetensors", whole),
        split_files.write(folder / "sd3.5.safetensors", original, "model.diffusion_model."),
        split_files.write(folder / "diffusers.safetensors", plain),
        split_files.write(folder / "vae.safetensors", decoder),
        (
            split_files.write(folder / "t5xxl_fp16.safetensors", third),
            split_files.write(folder / "clip_g.safetensors", second),
            split_files.write(folder / "clip_l.safetensors", first),
        ),
    )


_FIXED = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_LAYERS = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def original_name(module: str) -> str:
    """Return the original name of a layer of the transformer; that of `qkv` for each of the layers fused in it."""
    if module in _FIXED:
        return _FIXED[module]
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
    assert match is not None, module
    fused = next((name for name, rows in FUSED.items() if match[2] in rows), None)
    return f"joint_blocks.{match[1]}.{fused or _LAYERS[match[2]]}"


def original_transformer(weights: dict[str, Any]) -> dict[str, Any]:
    """Return the transformer's weights in the layout of the original code."""
    import torch

    last = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))
    swapped = ("norm_out.linear", f"transformer_blocks.{last - 1}.norm1_context.linear")
    found: dict[str, list[Any]] = {}
    order = [row for rows in FUSED.values() for row in rows]
    for name in sorted(weights, key=lambda name: next((i for i, row in enumerate(order) if f".{row}." in name), -1)):
        value = weights[name]
        if name == "pos_embed.pos_embed":
            found["pos_embed"] = [value]
            continue
        module, _, kind = name.rpartition(".")
        if module in swapped:
            value = torch.cat(list(reversed(value.chunk(2))))
        found.setdefault(f"{original_name(module)}.{kind}", []).append(value)
    return {name: torch.cat(values) if len(values) > 1 else values[0] for name, values in found.items()}


def _transformer(dual: bool) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=SIDE // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=BLOCKS,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=JOINT,
        caption_projection_dim=32,
        pooled_projection_dim=FIRST + SECOND,
        pos_embed_max_size=16,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm",
    )


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
