"""Stable Diffusion 3.5 Medium, Large and Large Turbo (Esser et al., arXiv:2403.03206), and Stable Diffusion 3 Medium.

Flow matching over 16 latent channels; a transformer that reads CLIP-L, CLIP-G and T5, of which T5 may lack.
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
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families import _sd35_files as own
from lorasmith.engine.families._model import AfterStep, LoadedModel

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.sources import BaseFiles

# Suffixes without `attn.`, so that attn2, Medium's second attention over the picture, is adapted as well.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
_ALL = (*_ATTENTION, *_FEED_FORWARD, "norm1.linear", "norm1_context.linear")
SPEC = FamilySpec(
    name="sd35",
    label="Stable Diffusion 3.5",
    license=License(
        name="Stability AI Community License",
        url="https://stability.ai/community-license-agreement",
        consequence="Free, for commercial use too, while your yearly revenue is below 1 million US dollars; a LoRA "
        "that you share needs a copy of the license and the words “Powered by Stability AI”.",
    ),
    objective="flow",
    pixel_multiple=16,
    default_resolution=1024,
    token_limit=own.T5_TOKENS,
    token_limits={"CLIP-L": own.CLIP_TOKENS, "CLIP-G": own.CLIP_TOKENS, "T5": own.T5_TOKENS},
    caption_style="prose",
    targets={
        "attention": _ATTENTION,
        "attention-mlp": (*_ATTENTION, *_FEED_FORWARD),
        "all-linear": _ALL,
        # train_dreambooth_lora_sd3.py: attn only, so Medium's attn2 stays as it was.
        "diffusers": tuple(f"attn.{name}" for name in _ATTENTION),
        # networks/lora_sd3.py: every linear layer of the blocks.
        "kohya": _ALL,
        # train_lora_sd35_large_24gb.yaml: every linear layer inside `transformer_blocks`.
        "ai-toolkit": _ALL,
    },
    conv_targets=(),
    text_encoder_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    block_classes=("JointTransformerBlock",),
    layouts=("diffusers",),
    readers={"diffusers": ("ComfyUI", "diffusers")},
    hub_ids=("stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-large"),
    denoiser_parameters=2_243_171_520,
    guides_in_one_batch=True,
    latent_channels=16,
    latent_downscale=8,
    prompt_numbers=(own.CLIP_TOKENS + own.T5_TOKENS) * 4096 + 2048,
    sources=(
        "https://arxiv.org/abs/2403.03206",
        "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium",
        "https://huggingface.co/stabilityai/stable-diffusion-3.5-large",
        "https://github.com/huggingface/diffusers/blob/main/examples/dreambooth/train_dreambooth_lora_sd3.py",
    ),
    text_parts=(*own.CLIPS, own.T5),
    trainable_text_encoders=own.CLIPS,
    draw_steps=28,
    draw_guidance=4.5,
    # The script draws logit-normal indices of a table that its scheduler has shifted by 3 (the paper's section 5.3.2).
    timestep_sampling="shift",
    shift=3.0,
    latent_patch=2,
    uses={
        "medium": "Train on Medium and use the LoRA on Medium: Large has other layers.",
        "large": "Train on Large and use the LoRA on Large, or on Large Turbo, which has the same layers.",
        "large-turbo": "Better train on Large and use the LoRA on Large Turbo: training makes a distilled model slower "
        "again, to good pictures only in many steps.",
        "3.0-medium": "Train on Stable Diffusion 3 Medium and use the LoRA there alone.",
        "custom": "Only models of the same size can use the LoRA.",
    },
)


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return which Stable Diffusion 3 or 3.5 model the files are, or None; reads headers and configurations only."""
    return own.identify(files)


def load(
    files: BaseFiles,
    identity: BaseIdentity,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement = ON_DEVICE,
) -> StableDiffusion3:
    """Load transformer, autoencoder, text encoders and tokenizers, frozen and in eval mode; kept as `placement` says.

    Raises BaseModelError naming the part that is missing or does not fit.
    """
    own.require_parts(files, identity, SPEC.latent_channels)
    return StableDiffusion3(files, identity, device, dtype, placement)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Load the tokenizers of CLIP-L, CLIP-G and, where the base has it, T5; raises BaseModelError where one lacks."""
    identity = own.identify(files)
    with_t5 = identity is None or own.T5 in identity.details["text_parts"]
    return own.load_tokenizers(files, with_t5=with_t5)


def export_name(layout: str, component: Component, module: str) -> str:
    """Return the key of a module's adapter without `.lora_A.weight` and the like."""
    prefixes = {"denoiser": "transformer.", "text_encoder": "text_encoder.", "text_encoder_2": "text_encoder_2."}
    if layout != "diffusers" or component not in prefixes:
        raise ExportError(f"Stable Diffusion 3.5 has no {layout} name for {component}.", fix="Check export.layouts.")
    return prefixes[component] + module


def load_lora(path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
    """Load a LoRA file into `components` as `StableDiffusion3Pipeline.load_lora_weights` does.

    Part by part, since that method warns of every part that the file rightly has no keys for.
    """
    from diffusers import StableDiffusion3Pipeline as Pipeline

    state, metadata = Pipeline.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True, return_lora_metadata=True
    )
    shared: dict[str, Any] = {"metadata": metadata, "low_cpu_mem_usage": True}
    for component, module in components.items():
        if component == "denoiser":
            Pipeline.load_lora_into_transformer(state, transformer=module, **shared)
        else:
            Pipeline.load_lora_into_text_encoder(
                state, network_alphas=None, text_encoder=module, prefix=component, **shared
            )


class StableDiffusion3(LoadedModel):
    """A loaded Stable Diffusion 3.5 model (`Family`)."""

    spec = SPEC

    def load_noise_schedule(self) -> Mapping[str, Any]:
        """Return the scheduler's configuration."""
        return self.files.config("scheduler") or own.SCHEDULE

    def load_tokenizers(self) -> list[Any]:
        """Load the tokenizers in the order of the text encoders."""
        return own.load_tokenizers(self.files, with_t5=own.T5 in self.identity.details["text_parts"])

    def load_denoiser(self) -> torch.nn.Module:
        """Load the transformer."""
        transformer: torch.nn.Module = own.load_transformer(self.files, self.dtype)
        return transformer

    def load_text_encoder(self, component: Component) -> torch.nn.Module:
        """Load CLIP-L, CLIP-G (`text_encoder`, `text_encoder_2`) or T5 (`text_encoder_3`)."""
        encoder: torch.nn.Module = own.load_text_encoder(self.files, component, self.dtype)
        return encoder

    def load_vae(self) -> Any:
        """Load the autoencoder."""
        return own.load_vae(self.files, self.vae_dtype)

    def latents_of(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode to shifted and scaled latents (B, 16, H / 8, W / 8); the mode of the posterior."""
        latents = vae.encode(pixels).latent_dist.mode()
        normalized: torch.Tensor = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return normalized

    def pixels_of(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decode shifted and scaled latents."""
        stored = latents / vae.config.scaling_factor + vae.config.shift_factor
        pixels: torch.Tensor = vae.decode(stored, return_dict=False)[0]
        return pixels

    def embed(self, prompts: list[str]) -> list[Conditioning]:
        """Encode prompts to {"prompt_embeds": (77 + 256, 4096), "pooled": (2048,)} each, all of one length.

        The last layer but one of both CLIPs side by side, filled up with zeros to T5's width, then T5's tokens: zeros
        where there is no T5, as the pipeline has it. No mask: the model reads the padding, and was trained so.
        """
        import torch

        hidden, pooled = [], []
        for component, tokenizer in zip(own.CLIPS, self.tokenizers[:2], strict=True):
            with self.encoder(component) as encoder:
                limit = min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
                output = encoder(self._tokens(tokenizer, prompts, limit), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        clips = torch.cat(hidden, dim=-1)
        width = int(self.denoiser.config.joint_attention_dim)  # type: ignore[union-attr,arg-type]
        clips = torch.nn.functional.pad(clips, (0, width - clips.shape[-1]))
        embeds = torch.cat([clips, self._t5_rows(prompts, width).to(clips.dtype)], dim=1)
        vectors = torch.cat(pooled, dim=-1)
        return [{"prompt_embeds": row, "pooled": vector} for row, vector in zip(embeds, vectors, strict=True)]

    def _t5_rows(self, prompts: list[str], width: int) -> torch.Tensor:
        """Return T5's last states (B, 256, width), or zeros without T5."""
        import torch

        if own.T5 not in self.text_encoders:
            return torch.zeros(len(prompts), own.T5_TOKENS, width, device=self.device, dtype=self.dtype)
        with self.encoder(own.T5) as encoder:
            rows: torch.Tensor = encoder(self._tokens(self.tokenizers[2], prompts, own.T5_TOKENS))[0]
        return rows

    def _tokens(self, tokenizer: Any, prompts: list[str], limit: int) -> torch.Tensor:
        tokens = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        ids: torch.Tensor = tokens.input_ids.to(self.device)
        return ids

    def prompt_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a prompt's encoding; all prompts have one length."""
        config: Any = self.denoiser.config
        width, pooled = int(config.joint_attention_dim), int(config.pooled_projection_dim)
        tokens = (int(self.identity.details["prompt_numbers"]) - pooled) // width
        return {"prompt_embeds": (tokens, width), "pooled": (pooled,)}

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the transformer on noisy latents (B, 16, h, w) at 1000 · sigma (B,); returns noise - latents."""
        prediction: torch.Tensor = self.denoiser(
            hidden_states=noisy.to(self.device, self.dtype),
            timestep=timesteps.to(self.device),
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled"],
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
        """Draw with diffusers' pipeline around the transformer."""
        from diffusers import StableDiffusion3Pipeline

        pipeline = StableDiffusion3Pipeline(
            transformer=self.denoiser,
            scheduler=loading.build_scheduler(self.noise_schedule),
            vae=None,  # decoded apart, in the autoencoder's own number format
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        pipeline.vae_scale_factor = SPEC.latent_downscale
        pipeline.set_progress_bar_config(disable=True)
        wanted, unwanted = self.collate(positive), self.collate(negative)
        latents: torch.Tensor = pipeline(
            prompt_embeds=wanted["prompt_embeds"],
            pooled_prompt_embeds=wanted["pooled"],
            negative_prompt_embeds=unwanted["prompt_embeds"],
            negative_pooled_prompt_embeds=unwanted["pooled"],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            height=settings.height,
            width=settings.width,
            generator=generators,
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
        return latents
