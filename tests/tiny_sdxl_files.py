"""A tiny Stable Diffusion XL in the single-file layouts that people have, with the diffusers folder that it equals.

Three levels and two layers each as in the real model, without attention in the first; only widths and depths are small.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import split_files
from tests.tiny_ldm import _clip, _open_clip, _unet_name
from tests.tiny_sdxl import FIRST, SECOND, _scheduler, tiny_clip, tiny_tokenizer, tiny_vae

WIDTH = 32
_SIZES = 6 * 256
_ADDED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


@dataclass(frozen=True)
class TinyFiles:
    """The same model as a folder, as one file, and in parts: the UNet alone (in two spellings), and the rest."""

    folder: Path
    whole: Path
    unet: Path
    diffusers_unet: Path
    vae: Path
    encoders: tuple[Path, Path]


def sdxl_unet_name(name: str) -> str:
    """Return the original name of a weight of SDXL's UNet; its upsamplers always follow an attention block."""
    module, _, kind = name.rpartition(".")
    if module in _ADDED:
        return f"{_ADDED[module]}.{kind}"
    return _unet_name(name).replace("output_blocks.2.1.conv", "output_blocks.2.2.conv")


def build_tiny_files(folder: Path) -> TinyFiles:
    """Write one random model in all layouts."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, vae = _unet(), tiny_vae()
        first, second = tiny_clip(FIRST), tiny_clip(SECOND, projected=True)
        StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=first,
            text_encoder_2=second,
            tokenizer=tiny_tokenizer(),
            tokenizer_2=tiny_tokenizer("!"),
            unet=unet,
            scheduler=_scheduler("epsilon", False),
            add_watermarker=False,
        ).save_pretrained(folder / "clip_and_all")
    base = folder / "clip_and_all"
    (folder / "clip").symlink_to(base / "tokenizer")
    original = {sdxl_unet_name(name): value for name, value in unet.state_dict().items()}
    decoder = split_files.original_autoencoder(base)
    whole = {f"model.diffusion_model.{name}": value for name, value in original.items()}
    whole |= {f"first_stage_model.{name}": value for name, value in decoder.items()}
    whole |= _encoders(first.state_dict(), second.state_dict())
    with_level = {f"text_model.{name}": value for name, value in first.state_dict().items()}
    return TinyFiles(
        base,
        split_files.write(folder / "whole.safetensors", whole),
        split_files.write(folder / "unet.safetensors", original),
        split_files.write(folder / "diffusers_unet.safetensors", unet.state_dict()),
        split_files.write(folder / "sdxl_vae.safetensors", decoder),
        (
            split_files.write(folder / "clip_l.safetensors", with_level | {"logit_scale": torch.tensor(4.6)}),
            split_files.write(folder / "clip_g.safetensors", second.state_dict()),
        ),
    )


def _encoders(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The text encoders inside an original checkpoint: CLIP-L as transformers has it, CLIP-G as open_clip has it."""
    weights = {
        name.replace("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."): value
        for name, value in _clip(first).items()
    }
    projection = second["text_projection.weight"]
    inner = {name: value for name, value in second.items() if name != "text_projection.weight"}
    for name, value in _open_clip(inner).items():
        ours = name.replace("cond_stage_model.model.", "conditioner.embedders.1.model.")
        weights[ours] = projection.T if name.endswith("text_projection") else value
    return weights


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(WIDTH, 2 * WIDTH, 4 * WIDTH),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=FIRST + SECOND,
        attention_head_dim=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=_SIZES + SECOND,
    )
