"""Lumina-Image 2.0 (Qin et al., arXiv:2503.21758): flow matching with time running backward, prompts read by Gemma 2.

And its fine-tunes, such as Neta Lumina; a diffusers folder, one file with all parts, or the transformer in one file
with its autoencoder and encoder apart.
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
from lorasmith.engine.families import _autoencoder as autoencoder
from lorasmith.engine.families import _encoder_gemma as gemma
from lorasmith.engine.families import _language_model as language_model
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families import _lumina2_files as own
from lorasmith.engine.families import _lumina2_names as names
from lorasmith.engine.families._model import AfterStep, LoadedModel

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.sources import BaseFiles

PROMPT_START = "<Prompt Start>"
SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts."
)
"""What every prompt begins with, word for word as in `Lumina2Pipeline`."""
GUIDED_SHARE = 0.25
"""Only this first part of the steps is guided, as the model card draws."""
_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_MLP = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")
SPEC = FamilySpec(
    name="lumina2",
    label="Lumina-Image 2.0",
    license=License(
        name="Apache 2.0",
        url="https://www.apache.org/licenses/LICENSE-2.0",
        consequence="You may use, sell and share your LoRA as you like; fine-tunes of the base may have other terms.",
    ),
    objective="flow",
    pixel_multiple=16,
    default_resolution=1024,
    token_limit=own.TOKENS,
    token_limits={"Gemma 2 2B, about 30 of them for the words that every prompt begins with": own.TOKENS},
    caption_style="prose",
    targets={
        "attention": _ATTENTION,
        "attention-mlp": (*_ATTENTION, *_MLP),
        "all-linear": (*_ATTENTION, *_MLP, "norm1.linear"),
        "diffusers": _ATTENTION,
        # sd-scripts adapts the last layer as well.
        "kohya": (*_ATTENTION, *_MLP, "norm1.linear", "norm_out.linear_1", "norm_out.linear_2"),
    },
    conv_targets=(),
    text_encoder_targets=(),
    trainable_text_encoders=(),
    block_classes=("Lumina2TransformerBlock",),
    layouts=("comfyui", "diffusers", "kohya"),
    # diffusers reads ComfyUI's names only where every layer of every block was trained.
    readers={"comfyui": ("ComfyUI",), "diffusers": ("diffusers",), "kohya": ("ComfyUI",)},
    fused_layouts=("comfyui", "kohya"),
    hub_ids=("Alpha-VLLM/Lumina-Image-2.0", "neta-art/Neta-Lumina-diffusers"),
    denoiser_parameters=2_609_769_152,
    latent_channels=16,
    latent_downscale=8,
    prompt_numbers=own.TOKENS * own.PROMPT_WIDTH,
    sources=("https://huggingface.co/Alpha-VLLM/Lumina-Image-2.0",),
    draw_steps=30,
    draw_guidance=4.0,
    # sd-scripts docs/lumina_train_network.md: nextdit_shift, which goes by the number of tokens.
    timestep_sampling="resolution_shift",
    shift=6.0,
    latent_patch=2,
)


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return whether the files are Lumina-Image 2.0, or None; reads headers and configurations only."""
    return own.identify_file(files) if files.kind == "single_file" else own.identify_folder(files)


def load(
    files: BaseFiles,
    identity: BaseIdentity,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement = ON_DEVICE,
) -> Lumina2:
    """Load transformer, autoencoder, text encoder and tokenizer, frozen and in eval mode; kept as `placement` says.

    Raises BaseModelError naming the part that is missing or does not fit.
    """
    if identity.parts_missing:
        raise loading.missing_part(files, " and no ".join(identity.parts_missing))
    return Lumina2(files, identity, device, dtype, placement)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Load Gemma's tokenizer; raises BaseModelError where it is not on this machine."""
    folder = files.path / "tokenizer"
    return [gemma.load_tokenizer(folder if folder.is_dir() else None)]


def export_name(layout: str, component: Component, module: str) -> str | FusedName:
    """Return the key of a module's adapter without `.lora_A.weight` and the like.

    ComfyUI reads the original names alone, in which to_q, to_k and to_v are one.
    """
    if layout not in SPEC.layouts or component != "denoiser":
        raise ExportError(f"Lumina-Image 2.0 has no {layout} name for {component}.", fix="Check export.layouts.")
    if layout == "diffusers":
        return f"transformer.{module}"
    name = names.original_name(module)
    if isinstance(name, FusedName):
        return FusedName(_prefixed(layout, name.name), name.rows)
    return _prefixed(layout, name)


def _prefixed(layout: str, name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}" if layout == "kohya" else f"diffusion_model.{name}"


def load_lora(path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
    """Load a LoRA file into the transformer as `Lumina2Pipeline.load_lora_weights` does."""
    from diffusers import Lumina2Pipeline

    loading.load_transformer_lora(Lumina2Pipeline, path, components["denoiser"])


class Lumina2(LoadedModel):
    """A loaded Lumina-Image 2.0 model (`Family`)."""

    spec = SPEC

    def load_noise_schedule(self) -> Mapping[str, Any]:
        """Return the scheduler's configuration."""
        return self.files.config("scheduler") or own.SCHEDULER

    def load_tokenizers(self) -> list[Any]:
        """Load Gemma's tokenizer."""
        return load_tokenizers(self.files)

    def load_denoiser(self) -> torch.nn.Module:
        """Load the transformer."""
        transformer: torch.nn.Module = own.load_transformer(self.files, self.dtype)
        return transformer

    def load_text_encoder(self, component: Component) -> torch.nn.Module:
        """Load Gemma 2 without its last layer, which nothing reads: prompts are its last hidden state but one."""
        found = gemma.find(self.files, own.prompt_width(self.files))
        encoder: torch.nn.Module
        if found:
            layers = language_model.layer_count(found.tensors) - 1
            encoder = gemma.load(self.files, found, self.dtype, layers)
        else:
            layers = int(self.files.config(component).get("num_hidden_layers", gemma.LAYERS)) - 1
            encoder = gemma.load_folder(self.files, self.dtype, layers, component)
        return encoder

    def load_vae(self) -> Any:
        """Load the autoencoder."""
        return autoencoder.load_any(self.files, autoencoder.FLUX_SCALING, self.vae_dtype)

    def latents_of(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode to shifted and scaled latents (B, 16, H / 8, W / 8); the mode of the posterior."""
        return autoencoder.encode(vae, pixels)

    def pixels_of(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decode shifted and scaled latents."""
        return autoencoder.decode(vae, latents)

    def embed(self, prompts: list[str]) -> list[Conditioning]:
        """Encode prompts to {"prompt_embeds": (its tokens, width)} each, as `Lumina2Pipeline` does, without padding."""
        tokens = self.tokenizers[0](
            [_instructed(prompt) for prompt in prompts],
            padding=True,
            padding_side="right",
            max_length=own.TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        with self.encoder("text_encoder") as encoder:
            states = encoder(
                input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device)
            ).last_hidden_state
        lengths = tokens.attention_mask.sum(1).tolist()
        return [{"prompt_embeds": row[:length]} for row, length in zip(states, lengths, strict=True)]

    def collate(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        """Pad prompts to the longest; `prompt_mask` (B, tokens) tells what is theirs."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        rows = [self._placed(item["prompt_embeds"]) for item in conditionings]
        ones = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        mask = pad_sequence(ones, batch_first=True).to(self.device)
        return {"prompt_embeds": pad_sequence(rows, batch_first=True), "prompt_mask": mask}

    def prompt_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a prompt's encoding; `tokens` counts its own."""
        config: Any = self.denoiser.config
        return {"prompt_embeds": (min(tokens, own.TOKENS), int(config.cap_feat_dim))}

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the transformer; its time runs from noise (0) to picture (1), and its estimate is latents - noise."""
        import torch

        estimate: torch.Tensor = self.denoiser(
            hidden_states=noisy.to(self.device, self.dtype),
            timestep=1.0 - timesteps.to(self.device, torch.float32) / 1000.0,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_mask"],
            return_dict=False,
        )[0]
        return -estimate

    def draw_latents(
        self,
        positive: list[Conditioning],
        negative: list[Conditioning],
        settings: DrawSettings,
        generators: list[torch.Generator],
        after_step: AfterStep,
    ) -> torch.Tensor:
        """Draw with diffusers' pipeline around the transformer; what `after_step` raises is all that ends it early."""
        from diffusers import Lumina2Pipeline

        pipeline = Lumina2Pipeline(
            scheduler=loading.build_scheduler(self.noise_schedule),
            vae=None,  # decoded apart, in the autoencoder's own number format
            text_encoder=None,
            tokenizer=None,
            transformer=self.denoiser,
        )
        pipeline.set_progress_bar_config(disable=True)
        both = self.collate([*positive, *negative])  # the pipeline wants them of one length
        count = len(positive)
        latents: torch.Tensor = pipeline(
            prompt_embeds=both["prompt_embeds"][:count],
            prompt_attention_mask=both["prompt_mask"][:count],
            negative_prompt_embeds=both["prompt_embeds"][count:],
            negative_prompt_attention_mask=both["prompt_mask"][count:],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            cfg_trunc_ratio=GUIDED_SHARE,
            height=settings.height,
            width=settings.width,
            generator=generators,
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
        return latents


def _instructed(prompt: str) -> str:
    """Put the system prompt before a prompt; none before an empty one, which the model saw bare in its training.

    A prompt that brings its own, as fine-tunes like Neta Lumina want, is left as it is.
    """
    if not prompt or PROMPT_START in prompt:
        return prompt
    return f"{SYSTEM_PROMPT} {PROMPT_START} {prompt}"
