"""Tiny random but real base models and pictures, so that every test runs offline in about a second.

`build_tiny_sd15` writes a Stable Diffusion folder with the standard classes and about 0.2 M weights. Its pictures are
noise; what counts is that every loader, key name and shape is the real one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from tests.tiny_anima import build_tiny_anima
from tests.tiny_chroma import build_tiny_chroma
from tests.tiny_flux1 import build_tiny_flux1
from tests.tiny_flux2 import build_tiny_flux2
from tests.tiny_krea2 import build_tiny_krea2
from tests.tiny_lumina2 import build_tiny_lumina2
from tests.tiny_qwen_image import build_tiny_qwen_image
from tests.tiny_sd35 import build_tiny_sd35
from tests.tiny_sdxl import build_tiny_sdxl
from tests.tiny_z_image import build_tiny_z_image

TINY_SIDE = 64
"""Native resolution of the tiny models in pixels."""
TINY_LATENT_CHANNELS = 4
TINY_FACTOR = 8
"""Pixels per latent, each way."""


@dataclass(frozen=True)
class TinyBuild:
    """What varies between tiny Stable Diffusion models."""

    prediction: str = "epsilon"
    zero_snr: bool = False
    linear_projection: bool = False
    cross_attention: int = 32
    seed: int = 0


def build_tiny_sd15(
    folder: Path,
    prediction: str = "epsilon",
    *,
    zero_snr: bool = False,
    linear_projection: bool = False,
    cross_attention: int = 32,
    seed: int = 0,
) -> Path:
    """Write a tiny Stable Diffusion model to `folder` in the diffusers layout (fp32 safetensors) and return `folder`.

    `linear_projection` makes the transformers' proj_in and proj_out linear, as Stable Diffusion 2.x has them;
    `cross_attention` is also the width of the text encoder.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    build = TinyBuild(prediction, zero_snr, linear_projection, cross_attention, seed)
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer, build),
            tokenizer=tokenizer,
            unet=_unet(build),
            scheduler=_scheduler(build),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


TINY_BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd15": build_tiny_sd15,
    "sd35": build_tiny_sd35,
    "sdxl": build_tiny_sdxl,
    "flux1": build_tiny_flux1,
    "chroma": build_tiny_chroma,
    "flux2": build_tiny_flux2,
    "qwen_image": build_tiny_qwen_image,
    "z_image": build_tiny_z_image,
    "lumina2": build_tiny_lumina2,
    "krea2": build_tiny_krea2,
    "anima": build_tiny_anima,
}
"""One builder a family, by family name: the contract tests run over these."""


def tiny_pictures(
    folder: Path, n: int = 4, sizes: Sequence[tuple[int, int]] = ((64, 64),), captions: Sequence[str | None] = ()
) -> list[Path]:
    """Write `n` small PNGs named `00.png` … with sidecar captions, and return their paths.

    `sizes` (width, height) and `captions` are taken in turn; the default caption is "a picture, number K", and None
    writes no caption file. The pictures differ from one another and are the same in every run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(n):
        path = folder / f"{index:02d}.png"
        _picture(index, *sizes[index % len(sizes)]).save(path)
        caption = captions[index % len(captions)] if captions else f"a picture, number {index}"
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        paths.append(path)
    return paths


def _picture(index: int, width: int, height: int) -> Image.Image:
    rng = random.Random(index)
    image = Image.new("RGB", (width, height), tuple(rng.randrange(256) for _ in range(3)))
    x, y = rng.randrange(width // 2), rng.randrange(height // 2)
    box = (x, y, x + width // 2 - 1, y + height // 2 - 1)
    ImageDraw.Draw(image).ellipse(box, fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


def _tokenizer() -> Any:
    from lorasmith.presets.demo.tokenizer import build_tokenizer

    return build_tokenizer()


def _text_encoder(tokenizer: Any, build: TinyBuild) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=build.cross_attention,
        intermediate_size=2 * build.cross_attention,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=build.cross_attention,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=TINY_LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=TINY_SIDE,
    )


def _unet(build: TinyBuild) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=TINY_SIDE // TINY_FACTOR,
        in_channels=TINY_LATENT_CHANNELS,
        out_channels=TINY_LATENT_CHANNELS,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=build.cross_attention,
        attention_head_dim=8 if build.linear_projection else 2,
        use_linear_projection=build.linear_projection,
        norm_num_groups=4,
    )


def _scheduler(build: TinyBuild) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=build.prediction,
        rescale_betas_zero_snr=build.zero_snr,
        timestep_spacing="trailing" if build.zero_snr else "leading",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
