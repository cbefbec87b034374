"""The networks of a Stable Diffusion XL model, read from a folder or single files, and diffusers' way to draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import BaseIdentity, Component
from lorasmith.engine.families import _autoencoder as autoencoder
from lorasmith.engine.families import _encoder_clip as clip
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families._part_checks import require_fitting
from lorasmith.engine.families._sdxl_identify import SIZE_WIDTH, find_unet, unet_shape
from lorasmith.engine.families._weights import fill_module, read_weights

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.sources import BaseFiles

_UNET = "model.diffusion_model."
_SCALING = {"scaling_factor": 0.13025}
"""stabilityai/stable-diffusion-xl-base-1.0/vae/config.json."""
_HEAD = 64


def scheduler_config(files: BaseFiles, identity: BaseIdentity) -> dict[str, Any]:
    """Return the noise schedule: the folder's own, or the one that all SDXL models share (Hub: sdxl-base-1.0).

    Down to pure noise, drawing must begin at the very last timestep (Lin et al., arXiv:2305.08891, section 3.3).
    """
    stored = files.config("scheduler") or {
        "_class_name": "EulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": bool(identity.details.get("zero_snr")),
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    spacing = {"timestep_spacing": "trailing"} if stored.get("rescale_betas_zero_snr") else {}
    return {**stored, **spacing, "prediction_type": identity.prediction}


def load_unet(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the UNet in main memory."""
    from diffusers import UNet2DConditionModel

    if files.kind == "folder":
        return loading.load_part(files, "unet", UNet2DConditionModel, dtype)
    found = find_unet(files)
    shape = unet_shape(found.tensors) if found else None
    if found is None or shape is None:
        raise loading.missing_part(files, "unet")
    width = shape.channels
    channels = (width, 2 * width, 4 * width)
    config = {
        "sample_size": 128,
        "in_channels": shape.latent_channels,
        "out_channels": shape.latent_channels,
        "block_out_channels": channels,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": tuple(max(1, depth) for depth in shape.depths),
        "cross_attention_dim": shape.context,
        # diffusers calls the number of heads so.
        "attention_head_dim": tuple(max(1, count // _HEAD) for count in channels),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": shape.pooled + 6 * SIZE_WIDTH,
    }
    weights = read_weights(found, dtype)
    if shape.original_names:
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        weights = convert_ldm_unet_checkpoint({_UNET + name: value for name, value in weights.items()}, config)
    return fill_module(files, "unet", UNet2DConditionModel, config, weights, dtype)


def load_text_encoder(files: BaseFiles, component: Component, dtype: torch.dtype) -> Any:
    """Load CLIP-L (`text_encoder`) or CLIP-G (`text_encoder_2`) in main memory."""
    second = component == "text_encoder_2"
    size: clip.Size = "G" if second else "L"
    found = clip.find_sizes(files).get(size)
    if found:
        return clip.load(files, found, dtype, size=size, projected=second, part=component)
    if files.kind == "single_file":
        raise loading.missing_part(files, component)
    return clip.load_folder(files, component, dtype, projected=second)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Load both tokenizers, which differ in how prompts are filled up."""
    if files.kind == "single_file":
        return [clip.load_tokenizer(), clip.load_tokenizer("!")]
    return [clip.folder_tokenizer(files, part) for part in ("tokenizer", "tokenizer_2")]


def load_vae(files: BaseFiles, dtype: torch.dtype) -> Any:
    """Load the autoencoder in main memory: the one given apart, or the base's own."""
    found = autoencoder.find(files)
    if found:
        return autoencoder.load(files, found, _SCALING, dtype)
    from diffusers import AutoencoderKL

    return loading.load_part(files, "vae", AutoencoderKL, dtype)


def overflows(files: BaseFiles) -> bool:
    """Whether the autoencoder must not compute in 16 bits: all but the fp16-fix (madebyollin/sdxl-vae-fp16-fix).

    Only a configuration tells it; the weights of single files look all alike.
    """
    apart = files.kind == "single_file" or files.vae_file is not None
    return apart or bool(files.config("vae").get("force_upcast", True))


def require_parts(files: BaseFiles, identity: BaseIdentity, latent_channels: int) -> None:
    """Raise BaseModelError naming the parts that are missing or belong to another model, and how to give them."""
    names = " and no ".join(identity.parts_missing)
    if names and files.kind == "folder":
        raise loading.missing_part(files, names)
    if names:
        raise BaseModelError(
            f"{files.origin} has no {names}.",
            fix="Give the missing files: base.vae for the vae (sdxl_vae.safetensors), base.text_encoders for "
            "text_encoder (clip_l.safetensors) and text_encoder_2 (clip_g.safetensors); or choose a complete "
            "checkpoint.",
        )
    found = find_unet(files) if files.kind == "single_file" else None
    shape = unet_shape(found.tensors) if found else None
    require_fitting(files, latent_channels=latent_channels, clip_width=shape.context if shape else 0)


def draw_pipeline(unet: Any, noise_schedule: Mapping[str, Any], downscale: int) -> Any:
    """Return diffusers' pipeline around the UNet alone, which makes latents; `downscale` is pixels per latent."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline(
        vae=None,  # decoded apart, in the autoencoder's own number format
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=loading.build_scheduler(noise_schedule),
        add_watermarker=False,
    )
    pipeline.vae_scale_factor = downscale
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
