"""FLUX.1 (Black Forest Labs, 2024): a rectified flow transformer of 12 B that reads CLIP-L's summary and T5's tokens.

dev, Krea and Kontext, which have guidance built in, and schnell, which draws in 4 steps; a diffusers folder, or the
original file with or without the other parts.
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
    FusedName,
    License,
    Placement,
)
from lorasmith.engine.families import _encoder_clip as clip
from lorasmith.engine.families import _encoder_t5 as t5
from lorasmith.engine.families import _flux1_identify as recognition
from lorasmith.engine.families import _flux_files as own
from lorasmith.engine.families import _flux_names as names
from lorasmith.engine.families._flux_model import DYNAMIC_SCHEDULE, FluxModel
from lorasmith.engine.families._model import AfterStep

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.sources import BaseFiles

_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_CONTEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
# By number, since the last layer of the whole transformer is a proj_out too, which no trainer adapts.
_SINGLE = ("proj_mlp", *(f"single_transformer_blocks.{block}.proj_out" for block in range(38)))
_MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear")
_BLOCKS = (*_ATTENTION, *_CONTEXT, *_FEED_FORWARD, *_SINGLE, *_MODULATION)
_NOT_COMMERCIAL = "The license forbids commercial use of the model; the LoRA inherits it."
SPEC = FamilySpec(
    name="flux1",
    label="FLUX.1",
    license=License(
        name="FLUX.1 [dev] Non-Commercial License; Apache 2.0 for schnell",
        url="https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
        consequence="A LoRA for dev, Krea or Kontext may not be used commercially without a license of Black Forest "
        "Labs; one that was trained on schnell may.",
    ),
    objective="flow",
    pixel_multiple=16,
    default_resolution=1024,
    token_limit=recognition.TOKENS,
    token_limits={"CLIP-L (summary only)": 77, "T5-XXL": recognition.TOKENS, "T5-XXL of schnell": 256},
    caption_style="prose",
    targets={
        "attention": (*_ATTENTION, *_CONTEXT),
        "attention-mlp": (*_ATTENTION, *_CONTEXT, *_FEED_FORWARD, *_SINGLE),
        "all-linear": _BLOCKS,
        "diffusers": (*_ATTENTION, *_CONTEXT, *_FEED_FORWARD),
        "kohya": _BLOCKS,
        "ai-toolkit": _BLOCKS,
    },
    conv_targets=(),
    text_encoder_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    text_parts=("text_encoder", "text_encoder_2"),
    trainable_text_encoders=("text_encoder",),
    block_classes=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    layouts=("diffusers", "kohya"),
    readers={"diffusers": ("ComfyUI", "Forge", "diffusers"), "kohya": ("ComfyUI", "Forge", "diffusers")},
    fused_layouts=("kohya",),
    hub_ids=(
        "black-forest-labs/FLUX.1-dev",
        "black-forest-labs/FLUX.1-Krea-dev",
        "black-forest-labs/FLUX.1-schnell",
    ),
    denoiser_parameters=11_901_408_320,
    latent_channels=16,
    latent_downscale=8,
    prompt_numbers=recognition.TOKENS * 4096 + 768,
    sources=(
        "https://huggingface.co/black-forest-labs/FLUX.1-dev",
        "https://huggingface.co/black-forest-labs/FLUX.1-schnell",
        "https://github.com/huggingface/diffusers/blob/main/examples/dreambooth/train_dreambooth_lora_flux.py",
        "https://huggingface.co/ostris/FLUX.1-schnell-training-adapter",
    ),
    # Saved tensors, counted on the real architecture with meta tensors at 1024 pixels and 512 prompt tokens.
    draw_steps=28,
    draw_guidance=3.5,
    # Pictures are drawn with noise levels that are shifted more the larger they are, exp(1.15) = 3.1582 at 1024 pixels.
    # sd-scripts (docs/flux_train_network.md) recommends training at the same ones (flux_shift), FluxGym the fixed
    # 3.1582, OneTrainer's preset a dynamic shift, SimpleTuner a shift of 3; ai-toolkit's sigmoid has no shift.
    timestep_sampling="resolution_shift",
    shift=3.1582,
    latent_patch=2,
    uses={
        "dev": f"Train on dev; use the LoRA on dev, and try it on Krea and Kontext. {_NOT_COMMERCIAL}",
        "krea": f"Train on Krea; use the LoRA on Krea, and try it on dev. {_NOT_COMMERCIAL}",
        "kontext": "Kontext edits pictures; here it is trained as a plain text-to-image model, without a picture to "
        f"edit. Use the LoRA on Kontext. {_NOT_COMMERCIAL}",
        "de-distilled": "Train it as it is; use the LoRA on it, and try it on dev and schnell. Its own license says "
        "what you may do with it.",
        "schnell": "Train with the training adapter, which is fetched and is not part of your file; use the LoRA on "
        "schnell. Apache 2.0: you may use, sell and share your LoRA as you like.",
    },
)


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return which FLUX.1 model the files are, or None; reads headers and configurations only.

    Raises BaseModelError for FLUX.1 models that edit pictures, and for packed weights.
    """
    return recognition.identify_file(files) if files.kind == "single_file" else recognition.identify_folder(files)


def load(
    files: BaseFiles,
    identity: BaseIdentity,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement = ON_DEVICE,
) -> Flux1:
    """Load transformer, autoencoder, both text encoders and tokenizers, frozen and in eval mode; see `Family`.

    Raises BaseModelError naming the part that is missing or does not fit.
    """
    own.refuse_missing(files, identity.parts_missing)
    return Flux1(files, identity, device, dtype, placement)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Load the tokenizers of CLIP-L and T5; raises BaseModelError where one is not on this machine."""
    if files.kind == "single_file":
        return [clip.load_tokenizer(), t5.load_tokenizer()]
    return [clip.folder_tokenizer(files, "tokenizer"), t5.folder_tokenizer(files, "tokenizer_2")]


def export_name(layout: str, component: Component, module: str) -> str | FusedName:
    """Return the key of a module's adapter without `.lora_A.weight` and the like.

    `kohya` has the original names, in which several layers lie fused. For the text encoder see `sd15.export_name`.
    """
    if component == "text_encoder" and not module.startswith("text_model."):
        module = f"text_model.{module}"
    if (layout, component) == ("kohya", "denoiser"):
        return names.kohya_name(module)
    prefixes = {
        ("diffusers", "denoiser"): "transformer.",
        ("diffusers", "text_encoder"): "text_encoder.",
        ("kohya", "text_encoder"): "lora_te1_",
    }
    if (layout, component) not in prefixes:
        raise ExportError(f"FLUX.1 has no {layout} name for {component}.", fix="Check export.layouts.")
    return prefixes[layout, component] + (module.replace(".", "_") if layout == "kohya" else module)


def load_lora(path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
    """Load a LoRA file into `components` as `FluxPipeline.load_lora_weights` does, part by part."""
    from diffusers import FluxPipeline as Pipeline

    state, alphas, metadata = names.lora_state(path, Pipeline)
    shared: dict[str, Any] = {"network_alphas": alphas, "metadata": metadata, "low_cpu_mem_usage": True}
    for component, module in components.items():
        if component == "denoiser":
            Pipeline.load_lora_into_transformer(state, transformer=module, **shared)
        else:
            Pipeline.load_lora_into_text_encoder(state, text_encoder=module, prefix=component, **shared)


class Flux1(FluxModel):
    """A loaded FLUX.1 (`Family`)."""

    spec = SPEC

    def load_noise_schedule(self) -> Mapping[str, Any]:
        """Return the scheduler's configuration; schnell's does not shift."""
        fixed = {"shift": 1.0, "use_dynamic_shifting": False} if self.identity.variant == "schnell" else {}
        return self.files.config("scheduler") or {**DYNAMIC_SCHEDULE, **fixed}

    def load_tokenizers(self) -> list[Any]:
        """Load the tokenizers of CLIP-L and T5."""
        return load_tokenizers(self.files)

    def load_denoiser(self) -> torch.nn.Module:
        """Load the transformer."""
        from diffusers import FluxTransformer2DModel

        transformer: torch.nn.Module = own.load_transformer(
            self.files, "FLUX.1", FluxTransformer2DModel, recognition.transformer_config, self.dtype
        )
        return transformer

    def load_text_encoder(self, component: Component) -> torch.nn.Module:
        """Load CLIP-L (`text_encoder`) or T5 (`text_encoder_2`)."""
        encoder: torch.nn.Module = (
            own.load_clip(self.files, self.dtype)
            if component == "text_encoder"
            else own.load_t5(self.files, component, self.dtype)
        )
        return encoder

    def embed(self, prompts: list[str]) -> list[Conditioning]:
        """Encode prompts to {"prompt_embeds": (tokens, width), "pooled": (width of CLIP,)} each.

        Padding is encoded and read too, as FLUX.1 was trained.
        """
        clip_tokenizer, t5_tokenizer = self.tokenizers
        with self.encoder("text_encoder") as encoder:
            limit = min(int(clip_tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
            tokens = clip_tokenizer(
                prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
            )
            pooled = encoder(tokens.input_ids.to(self.device)).pooler_output
        limit = recognition.tokens_of(self.identity.variant)
        with self.encoder("text_encoder_2") as encoder:
            tokens = t5_tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
            embeds = encoder(tokens.input_ids.to(self.device))[0]
        return [
            {"prompt_embeds": row, "pooled": summary}
            for row, summary in zip(embeds.to(self.dtype), pooled, strict=True)
        ]

    def prompt_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a prompt's encoding; all prompts have one length."""
        config: Any = self.denoiser.config
        tokens = recognition.tokens_of(self.identity.variant)
        return {
            "prompt_embeds": (tokens, int(config.joint_attention_dim)),
            "pooled": (int(config.pooled_projection_dim),),
        }

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the transformer on noisy latents (B, 16, h, w) at 1000 · sigma (B,); returns the velocity.

        Models with built-in guidance are told `self.guidance`.
        """
        import torch

        height, width = noisy.shape[-2:]
        network: Any = self.denoiser
        guided = network.config.guidance_embeds
        guidance = torch.full((len(noisy),), self.guidance, device=self.device) if guided else None
        tokens = network(
            hidden_states=self.packed(noisy.to(self.device, self.dtype)),
            timestep=timesteps.to(self.device) / 1000,
            guidance=guidance,
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=conditioning["prompt_embeds"],
            return_dict=False,
            **self.positions(height, width, conditioning["prompt_embeds"].shape[1]),
        )[0]
        return self.unpacked(tokens, height, width)

    def draw_latents(
        self,
        positive: list[Conditioning],
        negative: list[Conditioning],
        settings: DrawSettings,
        generators: list[torch.Generator],
        after_step: AfterStep,
    ) -> torch.Tensor:
        """Draw with diffusers' pipeline around the transformer.

        Guidance is built in, so that only de-distilled models read `negative` and compute twice.
        """
        from diffusers import FluxPipeline

        pipeline = FluxPipeline(
            scheduler=self.own_scheduler(),
            transformer=self.denoiser,
            **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
        )
        batch = self.collate(positive)
        values: dict[str, Any] = {
            "prompt_embeds": batch["prompt_embeds"],
            "pooled_prompt_embeds": batch["pooled"],
            "generator": generators,
            "callback_on_step_end": after_step,
        }
        if self.identity.variant == "de-distilled":
            unwanted = self.collate(negative)
            values["true_cfg_scale"] = settings.guidance
            values["negative_prompt_embeds"] = unwanted["prompt_embeds"]
            values["negative_pooled_prompt_embeds"] = unwanted["pooled"]
        return self.latents_drawn_by(pipeline, settings, values)
