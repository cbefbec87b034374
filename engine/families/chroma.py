"""Chroma (lodestones, 2025): FLUX.1-schnell made smaller and no longer distilled, reading T5 alone; real guidance.

Base, HD and Flash; a diffusers folder, or the original file with or without the other parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from lorasmith.engine.families import _chroma_identify as recognition
from lorasmith.engine.families import _encoder_t5 as t5
from lorasmith.engine.families import _flux_files as own
from lorasmith.engine.families import _flux_names as names
from lorasmith.engine.families._flux_model import FluxModel
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
_BLOCKS = (*_ATTENTION, *_CONTEXT, *_FEED_FORWARD, *_SINGLE)
SPEC = FamilySpec(
    name="chroma",
    label="Chroma",
    license=License(
        name="Apache 2.0",
        url="https://www.apache.org/licenses/LICENSE-2.0",
        consequence="You may use, sell and share your LoRA as you like.",
    ),
    objective="flow",
    pixel_multiple=16,
    default_resolution=1024,
    token_limit=recognition.TOKENS,
    token_limits={"T5-XXL": recognition.TOKENS},
    caption_style="prose",
    # One small network computes all modulation; the blocks have no layers of their own for it.
    targets={
        "attention": (*_ATTENTION, *_CONTEXT),
        "attention-mlp": _BLOCKS,
        "all-linear": _BLOCKS,
        "diffusers": (*_ATTENTION, *_CONTEXT, *_FEED_FORWARD),
        "kohya": _BLOCKS,
        "ai-toolkit": _BLOCKS,
    },
    conv_targets=(),
    text_encoder_targets=(),
    trainable_text_encoders=(),
    block_classes=("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
    layouts=("diffusers", "kohya"),
    readers={"diffusers": ("ComfyUI", "diffusers"), "kohya": ("ComfyUI", "diffusers")},
    fused_layouts=("kohya",),
    hub_ids=("lodestones/Chroma1-HD", "lodestones/Chroma1-Base"),
    denoiser_parameters=8_899_983_424,
    latent_channels=16,
    latent_downscale=8,
    prompt_numbers=recognition.TOKENS * 4096,
    sources=(
        "https://huggingface.co/lodestones/Chroma1-HD",
        "https://github.com/kohya-ss/sd-scripts/blob/main/docs/flux_train_network.md",
    ),
    # Saved tensors, counted on the real architecture with meta tensors at 1024 pixels and 128 prompt tokens.
    draw_steps=40,
    draw_guidance=3.0,
    # sd-scripts (docs/flux_train_network.md) recommends it for Chroma, and it is ai-toolkit's default.
    timestep_sampling="sigmoid",
    latent_patch=2,
    uses={
        "base": "Train at 512 pixels; use the LoRA on Base and HD. Apache 2.0.",
        "hd": "Train on HD; use the LoRA on HD, and on Flash for few steps. Apache 2.0.",
        "flash": "Its guidance is baked in: train on Chroma1-HD instead, and use that LoRA on Flash. Apache 2.0.",
        "unknown": "Use the LoRA on this model and on Chroma1-HD. Apache 2.0.",
    },
)


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return which Chroma model the files are, or None; reads headers and configurations only."""
    return recognition.identify_file(files) if files.kind == "single_file" else recognition.identify_folder(files)


def load(
    files: BaseFiles,
    identity: BaseIdentity,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement = ON_DEVICE,
) -> Chroma:
    """Load transformer, autoencoder, T5 and its tokenizer, frozen and in eval mode; kept as `placement` says.

    Raises BaseModelError naming the part that is missing or does not fit.
    """
    own.refuse_missing(files, identity.parts_missing)
    return Chroma(files, identity, device, dtype, placement)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Load T5's tokenizer; raises BaseModelError where it is not on this machine."""
    return [t5.load_tokenizer() if files.kind == "single_file" else t5.folder_tokenizer(files, "tokenizer")]


def export_name(layout: str, component: Component, module: str) -> str | FusedName:
    """Return the key of a module's adapter without `.lora_A.weight` and the like; `kohya` has the original names."""
    if component != "denoiser" or layout not in SPEC.layouts:
        raise ExportError(f"Chroma has no {layout} name for {component}.", fix="Check export.layouts.")
    return names.kohya_name(module) if layout == "kohya" else f"transformer.{module}"


def load_lora(path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
    """Load a LoRA file into the transformer as `ChromaPipeline.load_lora_weights` does."""
    from diffusers import ChromaPipeline as Pipeline

    state, alphas, metadata = names.lora_state(path, Pipeline)
    for transformer in components.values():
        Pipeline.load_lora_into_transformer(
            state, network_alphas=alphas, transformer=transformer, metadata=metadata, low_cpu_mem_usage=True
        )


class Chroma(FluxModel):
    """A loaded Chroma (`Family`)."""

    spec = SPEC

    def load_noise_schedule(self) -> Mapping[str, Any]:
        """Return the scheduler's configuration; without one that of FLUX.1-schnell, which Chroma was made from."""
        return self.files.config("scheduler") or recognition.SCHEDULE

    def load_tokenizers(self) -> list[Any]:
        """Load T5's tokenizer."""
        return load_tokenizers(self.files)

    def load_denoiser(self) -> torch.nn.Module:
        """Load the transformer."""
        from diffusers import ChromaTransformer2DModel

        transformer: torch.nn.Module = own.load_transformer(
            self.files, "Chroma", ChromaTransformer2DModel, recognition.transformer_config, self.dtype
        )
        return transformer

    def load_text_encoder(self, component: Component) -> torch.nn.Module:
        """Load T5."""
        encoder: torch.nn.Module = own.load_t5(self.files, component, self.dtype)
        return encoder

    def embed(self, prompts: list[str]) -> list[Conditioning]:
        """Encode prompts to {"prompt_embeds": (tokens, width)} each: its own tokens and one of padding.

        Chroma masks all other padding, as T5 does here too, so that leaving it out changes nothing and takes less time.
        """
        tokenizer = self.tokenizers[0]
        with self.encoder("text_encoder") as encoder:
            tokens = tokenizer(
                prompts, padding="max_length", max_length=recognition.TOKENS, truncation=True, return_tensors="pt"
            )
            mask = tokens.attention_mask
            embeds = encoder(tokens.input_ids.to(self.device), attention_mask=mask.to(self.device))[0]
        lengths = [int(row.sum()) + 1 for row in mask]
        return [
            {"prompt_embeds": row[:length].clone()} for row, length in zip(embeds.to(self.dtype), lengths, strict=True)
        ]

    def collate(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        """Stack prompts to {"prompt_embeds": (B, longest, width)}; "prompt_mask" (B, longest) if lengths differ."""
        import torch

        rows = [self._placed(item["prompt_embeds"]) for item in conditionings]
        lengths = [len(row) for row in rows]
        batch = {"prompt_embeds": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}
        if len(set(lengths)) > 1:
            real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            batch["prompt_mask"] = real.to(self.device)
        return batch

    def prompt_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a prompt's encoding; `tokens` counts its own."""
        config: Any = self.denoiser.config
        return {"prompt_embeds": (min(tokens, recognition.TOKENS), int(config.joint_attention_dim))}

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the transformer on noisy latents (B, 16, h, w) at 1000 · sigma (B,); returns the velocity."""
        import torch

        height, width = noisy.shape[-2:]
        tokens = self.packed(noisy.to(self.device, self.dtype))
        mask = conditioning.get("prompt_mask")
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1)
        velocity = self.denoiser(
            hidden_states=tokens,
            timestep=timesteps.to(self.device) / 1000,
            encoder_hidden_states=conditioning["prompt_embeds"],
            attention_mask=mask,
            return_dict=False,
            **self.positions(height, width, conditioning["prompt_embeds"].shape[1]),
        )[0]
        return self.unpacked(velocity, height, width)

    def draw_latents(
        self,
        positive: list[Conditioning],
        negative: list[Conditioning],
        settings: DrawSettings,
        generators: list[torch.Generator],
        after_step: AfterStep,
    ) -> torch.Tensor:
        """Draw with diffusers' pipeline around the transformer.

        The masks stay booleans. The pipeline's own are numbers, which attention adds to its scores instead of leaving
        padding out (pipeline_chroma.py, _get_t5_prompt_embeds).
        """
        from diffusers import ChromaPipeline

        pipeline = ChromaPipeline(
            scheduler=self.own_scheduler(),
            transformer=self.denoiser,
            **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
        )
        wanted, unwanted = self.collate(positive), self.collate(negative)
        values = {
            "prompt_embeds": wanted["prompt_embeds"],
            "prompt_attention_mask": _whole_mask(wanted),
            "negative_prompt_embeds": unwanted["prompt_embeds"],
            "negative_prompt_attention_mask": _whole_mask(unwanted),
            "generator": generators,
            "callback_on_step_end": after_step,
        }
        return self.latents_drawn_by(pipeline, settings, values)


def _whole_mask(batch: Conditioning) -> torch.Tensor:
    import torch

    embeds = batch["prompt_embeds"]
    mask = batch.get("prompt_mask")
    return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask
