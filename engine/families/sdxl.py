"""Stable Diffusion XL (Podell et al., arXiv:2307.01952): a UNet that reads two CLIP text encoders and picture sizes.

Its fine-tunes Pony, Illustrious and NoobAI too, epsilon and v-prediction with zero-terminal SNR (Lin et al.,
arXiv:2305.08891); a diffusers folder, one `.safetensors` file in the original layout, or the UNet with the rest apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import ExportError
from lorasmith.engine.families import (
    ON_DEVICE,
    BaseIdentity,
    Component,
    Conditioning,
    DrawSettings,
    FamilySpec,
    License,
    Placement,
)
from lorasmith.engine.families import _sdxl_parts as parts
from lorasmith.engine.families._model import AfterStep, LoadedModel
from lorasmith.engine.families._sdxl_identify import TOKENS, identify_file, identify_folder

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.sources import BaseFiles

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TRANSFORMER = (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_ENCODERS = ("text_encoder", "text_encoder_2")
_ZERO_SNR_RESCALE = 0.7
"""How far guided predictions are scaled back to their spread (Lin et al., arXiv:2305.08891, section 3.4)."""
SPEC = FamilySpec(
    name="sdxl",
    label="Stable Diffusion XL",
    license=License(
        name="CreativeML Open RAIL++-M",
        url="https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
        consequence="Commercial use is allowed; the use restrictions of the license go with your LoRA. "
        "Fine-tunes such as Pony, Illustrious and NoobAI have licenses of their own, on their model cards.",
    ),
    objective="ddpm",
    pixel_multiple=8,
    default_resolution=1024,
    token_limit=TOKENS,
    token_limits={"CLIP-L": TOKENS, "CLIP-G": TOKENS},
    caption_style="tags",
    # time_emb_proj is linear, but belongs to the residual blocks that LoCon adds.
    targets={
        "attention": _ATTENTION,
        "attention-mlp": _TRANSFORMER,
        "all-linear": (*_TRANSFORMER, "time_emb_proj"),
        "diffusers": _ATTENTION,
        "kohya": _TRANSFORMER,
        "ai-toolkit": _TRANSFORMER,
    },
    conv_targets=("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    text_encoder_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    block_classes=("BasicTransformerBlock", "ResnetBlock2D"),
    layouts=("kohya", "diffusers"),
    readers={"kohya": ("ComfyUI", "A1111", "Forge", "diffusers"), "diffusers": ("diffusers",)},
    hub_ids=("stabilityai/stable-diffusion-xl-base-1.0",),
    denoiser_parameters=2_567_463_684,
    guides_in_one_batch=True,
    latent_channels=4,
    latent_downscale=8,
    prompt_numbers=TOKENS * 2048 + 1280,
    sources=(
        "https://arxiv.org/abs/2307.01952",
        "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0",
        "https://github.com/huggingface/diffusers/blob/main/examples/dreambooth/train_dreambooth_lora_sdxl.py",
    ),
    # Counted on the real architecture with meta tensors: what is kept for the way back, 0.455 MiB a latent; with
    # checkpointing the blocks' inputs and the largest block, 0.028 and 0.010.
    text_parts=_ENCODERS,
    trainable_text_encoders=_ENCODERS,
    draw_steps=30,
    draw_guidance=5.0,
    uses={
        "base": "Train on the very checkpoint that you draw with, or on its ancestor (SDXL 1.0, Pony, Illustrious, "
        "NoobAI): LoRAs fit poorly on the other branches.",
        "custom": "Only models of the same depth can use the LoRA.",
    },
)


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return which Stable Diffusion XL model the files are, or None; reads headers and configurations only."""
    return identify_file(files) if files.kind == "single_file" else identify_folder(files)


def load(
    files: BaseFiles,
    identity: BaseIdentity,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement = ON_DEVICE,
) -> StableDiffusionXL:
    """Load UNet, autoencoder, text encoders and tokenizers, frozen and in eval mode; kept as `placement` says.

    `identity.prediction` wins over the files' own, so that a wrong scheduler configuration can be overruled.
    Raises BaseModelError naming the part that is missing or does not fit.
    """
    parts.require_parts(files, identity, SPEC.latent_channels)
    return StableDiffusionXL(files, identity, device, dtype, placement)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Load the tokenizers of CLIP-L and CLIP-G; raises BaseModelError where they are not on this machine."""
    return parts.load_tokenizers(files)


def export_name(layout: str, component: Component, module: str) -> str:
    """Return the key of a module's adapter without `.lora_down.weight` and the like.

    Kohya's layout is written with diffusers' block names, which ComfyUI, Forge and diffusers map for every layer; A1111
    does for all but `up_blocks.0.upsamplers.0.conv`, of LoCon. transformers 5 dropped the `text_model.` level of the
    first encoder's names; files and their readers have it.
    """
    if component in _ENCODERS and not module.startswith(("text_model.", "text_projection")):
        module = f"text_model.{module}"
    prefixes = {
        ("kohya", "denoiser"): "lora_unet_",
        ("kohya", "text_encoder"): "lora_te1_",
        ("kohya", "text_encoder_2"): "lora_te2_",
        ("diffusers", "denoiser"): "unet.",
        ("diffusers", "text_encoder"): "text_encoder.",
        ("diffusers", "text_encoder_2"): "text_encoder_2.",
    }
    if (layout, component) not in prefixes:
        raise ExportError(f"Stable Diffusion XL has no {layout} name for {component}.", fix="Check export.layouts.")
    return prefixes[layout, component] + (module.replace(".", "_") if layout == "kohya" else module)


def load_lora(path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
    """Load a LoRA file into `components` as `StableDiffusionXLPipeline.load_lora_weights` does.

    Part by part, since that method warns of every part that the file rightly has no keys for.
    """
    from diffusers import StableDiffusionXLPipeline as Pipeline

    unet = components.get("denoiser")
    state, alphas, metadata = Pipeline.lora_state_dict(
        str(path.parent),
        weight_name=path.name,
        local_files_only=True,
        return_lora_metadata=True,
        unet_config=getattr(unet, "config", None),
    )
    shared: dict[str, Any] = {"network_alphas": alphas, "metadata": metadata, "low_cpu_mem_usage": True}
    for component, module in components.items():
        if component == "denoiser":
            Pipeline.load_lora_into_unet(state, unet=module, **shared)
        else:
            Pipeline.load_lora_into_text_encoder(state, text_encoder=module, prefix=component, **shared)


class StableDiffusionXL(LoadedModel):
    """A loaded Stable Diffusion XL model (`Family`)."""

    spec = SPEC

    def choose_vae_dtype(self) -> torch.dtype:
        """Return fp32, but the asked format for the autoencoder that was made to compute in 16 bits."""
        import torch

        return torch.float32 if parts.overflows(self.files) else self.dtype

    def load_noise_schedule(self) -> Mapping[str, Any]:
        """Return the scheduler's configuration, with what the base model was found to predict."""
        self._sizes: dict[tuple[int, int], torch.Tensor] = {}
        # The pipeline's own switch for the empty negative prompt; its default is on.
        self._zeros_for_empty = bool(self.files.config("").get("force_zeros_for_empty_prompt", True))
        return parts.scheduler_config(self.files, self.identity)

    def load_tokenizers(self) -> list[Any]:
        """Load the tokenizers of both text encoders."""
        return parts.load_tokenizers(self.files)

    def load_denoiser(self) -> torch.nn.Module:
        """Load the UNet."""
        unet: torch.nn.Module = parts.load_unet(self.files, self.dtype)
        return unet

    def load_text_encoder(self, component: Component) -> torch.nn.Module:
        """Load CLIP-L (`text_encoder`) or CLIP-G (`text_encoder_2`)."""
        encoder: torch.nn.Module = parts.load_text_encoder(self.files, component, self.dtype)
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
        """Encode prompts to {"prompt_embeds": (tokens, width of both), "pooled": (width of CLIP-G,)} each.

        The last layer but one of both encoders. The empty prompt is zeros, as the pipeline draws without a negative
        prompt and as SDXL was trained without a caption, unless the model's own index says otherwise.
        """
        import torch

        hidden, pooled = [], torch.empty(0)
        for component, tokenizer in zip(_ENCODERS, self.tokenizers, strict=True):
            with self.encoder(component) as encoder:
                limit = min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
                tokens = tokenizer(
                    prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
                )
                output = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            if component == "text_encoder_2":
                pooled = output.text_embeds
        embeds = torch.cat(hidden, dim=-1)
        rows = [{"prompt_embeds": row, "pooled": vector} for row, vector in zip(embeds, pooled, strict=True)]
        for index, prompt in enumerate(prompts):
            if not prompt and self._zeros_for_empty:
                rows[index] = {key: torch.zeros_like(value) for key, value in rows[index].items()}
        return rows

    def prompt_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a prompt's encoding; all prompts have one length."""
        config: Any = self.denoiser.config
        pooled = int(config.projection_class_embeddings_input_dim) - 6 * int(config.addition_time_embed_dim)
        width = int(config.cross_attention_dim)
        tokens = (int(self.identity.details["prompt_numbers"]) - pooled) // width
        return {"prompt_embeds": (tokens, width), "pooled": (pooled,)}

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the UNet on noisy latents (B, C, h, w) at timesteps (B,); returns noise or velocity, by `identity`."""
        noisy = noisy.to(self.device, self.dtype)
        prediction: torch.Tensor = self.denoiser(
            noisy,
            timesteps.to(self.device),
            encoder_hidden_states=conditioning["prompt_embeds"],
            added_cond_kwargs={"text_embeds": conditioning["pooled"], "time_ids": self._size_numbers(noisy)},
            return_dict=False,
        )[0]
        return prediction

    def _size_numbers(self, latents: torch.Tensor) -> torch.Tensor:
        """Return (B, 6): original size, crop corner and target size in pixels, height first.

        The original is taken to be as large as the picture that is trained, and uncropped, as it will be drawn.
        """
        import torch

        height, width = (side * SPEC.latent_downscale for side in latents.shape[-2:])
        if (height, width) not in self._sizes:
            numbers = [height, width, 0, 0, height, width]
            self._sizes[height, width] = torch.tensor([numbers], device=self.device, dtype=torch.float32)
        return self._sizes[height, width].expand(len(latents), -1)

    def draw_latents(
        self,
        positive: list[Conditioning],
        negative: list[Conditioning],
        settings: DrawSettings,
        generators: list[torch.Generator],
        after_step: AfterStep,
    ) -> torch.Tensor:
        """Draw with diffusers' pipeline around the UNet."""
        wanted, unwanted = self.collate(positive), self.collate(negative)
        zero_snr = bool(self.noise_schedule.get("rescale_betas_zero_snr"))
        latents: torch.Tensor = parts.draw_pipeline(self.denoiser, self.noise_schedule, SPEC.latent_downscale)(
            prompt_embeds=wanted["prompt_embeds"],
            pooled_prompt_embeds=wanted["pooled"],
            negative_prompt_embeds=unwanted["prompt_embeds"],
            negative_pooled_prompt_embeds=unwanted["pooled"],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            guidance_rescale=_ZERO_SNR_RESCALE if zero_snr else 0.0,
            height=settings.height,
            width=settings.width,
            generator=generators,
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
        return latents
