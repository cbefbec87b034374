"""Z-Image (Tongyi-MAI, arXiv:2511.22699): one stream of picture and prompt tokens, flow matching, prompts by Qwen3.

Base, Turbo and De-Turbo; a diffusers folder, or the transformer in one file with its autoencoder and encoder apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
)
from lorasmith.engine.families import _autoencoder as autoencoder
from lorasmith.engine.families import _encoder_qwen as qwen
from lorasmith.engine.families import _language_model as language_model
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families import _z_image_files as own
from lorasmith.engine.families._model import AfterStep, LoadedModel

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.sources import BaseFiles

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_MLP = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
_LAYERS = 30


def _in_layers(*names: str) -> tuple[str, ...]:
    """Return the names in each of the main layers, but not in the refiners before them."""
    return tuple(f"layers.{layer}.{name}" for layer in range(_LAYERS) for name in names)


_LAYER_LINEARS = (*(f"attention.{name}" for name in _ATTENTION), *_MLP)
SPEC = FamilySpec(
    name="z_image",
    label="Z-Image",
    license=License(
        name="Apache 2.0",
        url="https://www.apache.org/licenses/LICENSE-2.0",
        consequence="You may use, sell and share your LoRA as you like.",
    ),
    objective="flow",
    pixel_multiple=16,
    default_resolution=1024,
    token_limit=own.TOKENS,
    token_limits={"Qwen3-4B": own.TOKENS},
    caption_style="prose",
    targets={
        "attention": _ATTENTION,
        "attention-mlp": (*_ATTENTION, *_MLP),
        "all-linear": (*_ATTENTION, *_MLP, "adaLN_modulation.0"),
        "diffusers": _ATTENTION,
        # musubi-tuner leaves modulation and refiners out, ai-toolkit the refiners alone.
        "kohya": _in_layers(*_LAYER_LINEARS),
        "ai-toolkit": _in_layers(*_LAYER_LINEARS, "adaLN_modulation.0"),
    },
    conv_targets=(),
    text_encoder_targets=(),
    trainable_text_encoders=(),
    block_classes=("ZImageTransformerBlock",),
    layouts=("comfyui", "diffusers", "kohya"),
    readers={
        "comfyui": ("ComfyUI", "diffusers"),
        "diffusers": ("diffusers", "ComfyUI"),
        # ComfyUI knows `lora_unet_` names for its own fused layers only.
        "kohya": ("diffusers",),
        "comfyui/lokr": ("ComfyUI", "diffusers"),
        "diffusers/lokr": ("diffusers", "ComfyUI"),
    },
    hub_ids=("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo"),
    denoiser_parameters=6_154_908_736,
    guides_in_one_batch=True,
    latent_channels=16,
    latent_downscale=8,
    prompt_numbers=own.TOKENS * 2560,
    sources=("https://huggingface.co/Tongyi-MAI/Z-Image", "https://huggingface.co/Tongyi-MAI/Z-Image-Turbo"),
    draw_steps=30,
    draw_guidance=4.0,
    # musubi-tuner docs/zimage.md: --timestep_sampling shift --discrete_flow_shift 2.0
    timestep_sampling="shift",
    shift=2.0,
    latent_patch=2,
    uses={
        "base": "Train on the base. Use the LoRA on the base, and on Turbo with a higher strength.",
        "turbo": "Train with the training adapter, which is fetched and not part of your file. Use the LoRA on Turbo.",
        "de-turbo": "Train without a training adapter. Use the LoRA on Turbo or De-Turbo.",
    },
)


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return which Z-Image model the files are, or None; reads headers and configurations only."""
    return own.identify_file(files) if files.kind == "single_file" else own.identify_folder(files)


def load(
    files: BaseFiles,
    identity: BaseIdentity,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement = ON_DEVICE,
) -> ZImage:
    """Load transformer, autoencoder, text encoder and tokenizer, frozen and in eval mode; kept as `placement` says.

    Raises BaseModelError naming the part that is missing or does not fit.
    """
    if identity.parts_missing:
        raise loading.missing_part(files, " and no ".join(identity.parts_missing))
    return ZImage(files, identity, device, dtype, placement)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Load Qwen's tokenizer; raises BaseModelError where it is not on this machine."""
    folder = files.path / "tokenizer"
    return [qwen.load_tokenizer(folder if folder.is_dir() else None)]


def export_name(layout: str, component: Component, module: str) -> str:
    """Return the key of a module's adapter without `.lora_A.weight` and the like.

    The original fused `qkv` is never written: diffusers refuses it, and ComfyUI reads the split names as well.
    """
    prefixes = {"comfyui": "diffusion_model.", "diffusers": "transformer.", "kohya": "lora_unet_"}
    if layout not in prefixes or component != "denoiser":
        raise ExportError(f"Z-Image has no {layout} name for {component}.", fix="Check export.layouts.")
    return prefixes[layout] + (module.replace(".", "_") if layout == "kohya" else module)


def load_lora(path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
    """Load a LoRA file into the transformer as `ZImagePipeline.load_lora_weights` does."""
    from diffusers import ZImagePipeline

    loading.load_transformer_lora(ZImagePipeline, path, components["denoiser"])


class ZImage(LoadedModel):
    """A loaded Z-Image model (`Family`)."""

    spec = SPEC

    def load_noise_schedule(self) -> Mapping[str, Any]:
        """Return the scheduler's configuration."""
        return self.files.config("scheduler") or own.scheduler_config(self.identity.variant)

    def load_tokenizers(self) -> list[Any]:
        """Load Qwen's tokenizer."""
        return load_tokenizers(self.files)

    def load_denoiser(self) -> torch.nn.Module:
        """Load the transformer."""
        transformer: torch.nn.Module = own.load_transformer(self.files, self.dtype)
        return transformer

    def load_text_encoder(self, component: Component) -> torch.nn.Module:
        """Load Qwen3 without its last layer, which nothing reads: prompts are its last hidden state but one."""
        found = qwen.find(self.files, own.prompt_width(self.files))
        encoder: torch.nn.Module
        if found:
            layers = language_model.layer_count(found.tensors) - 1
            encoder = qwen.load(self.files, found, self.dtype, layers)
        else:
            layers = int(self.files.config(component).get("num_hidden_layers", own.ENCODER_LAYERS)) - 1
            encoder = qwen.load_folder(self.files, self.dtype, layers, component)
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
        """Encode prompts to {"prompt_embeds": (its tokens, width)} each, as `ZImagePipeline` does, without padding."""
        tokenizer = self.tokenizers[0]
        texts = [_as_chat(tokenizer, prompt) for prompt in prompts]
        tokens = tokenizer(
            texts, padding=True, padding_side="right", max_length=own.TOKENS, truncation=True, return_tensors="pt"
        )
        with self.encoder("text_encoder") as encoder:
            states = encoder(
                input_ids=tokens.input_ids.to(self.device),
                attention_mask=tokens.attention_mask.to(self.device),
            ).last_hidden_state
        lengths = tokens.attention_mask.sum(1).tolist()
        return [{"prompt_embeds": row[:length]} for row, length in zip(states, lengths, strict=True)]

    def collate(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        """Pad prompts to the longest; `prompt_lengths` (B,) stays in main memory, so that no step waits for it."""
        import torch

        rows = [self._placed(item["prompt_embeds"]) for item in conditionings]
        return {
            "prompt_embeds": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "prompt_lengths": torch.tensor([len(row) for row in rows]),
        }

    def prompt_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a prompt's encoding; `tokens` counts its own."""
        config: Any = self.denoiser.config
        return {"prompt_embeds": (min(tokens, own.TOKENS), int(config.cap_feat_dim))}

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the transformer; its time runs from noise (0) to picture (1), and its estimate is latents - noise."""
        import torch

        lengths = conditioning["prompt_lengths"].tolist()
        prompts = [row[:length] for row, length in zip(conditioning["prompt_embeds"], lengths, strict=True)]
        pictures = list(noisy.to(self.device, self.dtype).unsqueeze(2).unbind(0))
        times = (1000.0 - timesteps.to(self.device, torch.float32)) / 1000.0
        estimates = self.denoiser(pictures, times, prompts, return_dict=False)[0]
        return -torch.stack(estimates).squeeze(2)

    def draw_latents(
        self,
        positive: list[Conditioning],
        negative: list[Conditioning],
        settings: DrawSettings,
        generators: list[torch.Generator],
        after_step: AfterStep,
    ) -> torch.Tensor:
        """Draw with diffusers' pipeline around the transformer; guidance of 1 or less is none, as elsewhere."""
        from diffusers import ZImagePipeline

        pipeline = ZImagePipeline(
            scheduler=loading.build_scheduler(self.noise_schedule),
            vae=None,  # decoded apart, in the autoencoder's own number format
            text_encoder=None,
            tokenizer=None,
            transformer=self.denoiser,
        )
        pipeline.vae_scale_factor = SPEC.latent_downscale
        pipeline.set_progress_bar_config(disable=True)
        guided = settings.guidance > 1.0
        latents: torch.Tensor = pipeline(
            prompt_embeds=[self._placed(item["prompt_embeds"]) for item in positive],
            negative_prompt_embeds=[self._placed(item["prompt_embeds"]) for item in negative] if guided else None,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance if guided else 0.0,
            height=settings.height,
            width=settings.width,
            generator=generators,
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
        return latents


def _as_chat(tokenizer: Any, prompt: str) -> str:
    """Write a prompt as the model saw prompts: a user's turn, and the beginning of the answer."""
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
    except ValueError as error:
        raise BaseModelError(
            "The tokenizer has no chat template, which Z-Image's prompts are written with.",
            why=loading.first_line(error),
            fix="Take the tokenizer folder of Tongyi-MAI/Z-Image.",
        ) from error
    return text
