"""Qwen-Image (Qwen team, arXiv:2508.02324): a rectified-flow transformer whose prompts Qwen2.5-VL reads.

Qwen-Image and its later version 2512, from a diffusers folder, or the transformer in one file with its autoencoder and
text encoder apart. Drawn with true classifier-free guidance.
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
    License,
    Placement,
)
from lorasmith.engine.families import _autoencoder_qwen as autoencoder
from lorasmith.engine.families import _encoder_qwen as qwen
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families import _qwen_image_files as own
from lorasmith.engine.families._model import AfterStep, LoadedModel

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.sources import BaseFiles

_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
_MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
_MODULATION = ("img_mod.1", "txt_mod.1")
SPEC = FamilySpec(
    name="qwen_image",
    label="Qwen-Image",
    license=License(
        name="Apache 2.0",
        url="https://www.apache.org/licenses/LICENSE-2.0",
        consequence="You may use, sell and share your LoRA as you like.",
    ),
    objective="flow",
    pixel_multiple=16,
    default_resolution=1024,
    token_limit=own.TOKENS,
    token_limits={"Qwen2.5-VL-7B": own.TOKENS},
    caption_style="prose",
    targets={
        "attention": _ATTENTION,
        "attention-mlp": (*_ATTENTION, *_MLP),
        "all-linear": (*_ATTENTION, *_MLP, *_MODULATION, "img_in", "txt_in", "proj_out"),
        "diffusers": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        # musubi-tuner leaves the modulation out, ai-toolkit takes every linear layer of the blocks.
        "kohya": (*_ATTENTION, *_MLP),
        "ai-toolkit": (*_ATTENTION, *_MLP, *_MODULATION),
    },
    conv_targets=(),
    text_encoder_targets=(),
    trainable_text_encoders=(),
    block_classes=("QwenImageTransformerBlock",),
    layouts=("comfyui", "diffusers", "kohya"),
    readers=dict.fromkeys(("comfyui", "diffusers", "kohya"), ("ComfyUI", "diffusers")),
    hub_ids=("Qwen/Qwen-Image-2512", "Qwen/Qwen-Image"),
    denoiser_parameters=20_430_401_088,
    latent_channels=16,
    latent_downscale=autoencoder.DOWNSCALE,
    latent_patch=2,
    prompt_numbers=own.TOKENS * 3584,
    sources=("https://huggingface.co/Qwen/Qwen-Image", "https://huggingface.co/Qwen/Qwen-Image-2512"),
    # The pipeline's and the model card's own.
    draw_steps=50,
    draw_guidance=4.0,
    # musubi-tuner's documentation of Qwen-Image.
    timestep_sampling="shift",
    shift=2.2,
    uses={"Qwen-Image": "Train on Qwen-Image or 2512 and use the LoRA on the same; on the other it works more weakly."},
)
_PREFIXES = {"comfyui": "diffusion_model.", "diffusers": "transformer.", "kohya": "lora_unet_"}


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return which Qwen-Image the files are, or None; reads headers and configurations only.

    Raises BaseModelError for the models of its build that edit pictures.
    """
    return own.identify_file(files) if files.kind == "single_file" else own.identify_folder(files)


def load(
    files: BaseFiles,
    identity: BaseIdentity,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement = ON_DEVICE,
) -> QwenImage:
    """Load transformer, autoencoder, text encoder and tokenizer, frozen and in eval mode; kept as `placement` says.

    Raises BaseModelError naming the part that is missing or does not fit.
    """
    if identity.parts_missing:
        raise own.missing(files, identity.parts_missing)
    return QwenImage(files, identity, device, dtype, placement)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Load the tokenizer of Qwen2.5-VL; raises BaseModelError where it is not on this machine."""
    folder = files.path / "tokenizer" if files.kind == "folder" else None
    if folder is not None and not folder.is_dir():
        raise loading.missing_part(files, "tokenizer")
    return [qwen.load_tokenizer(folder, "qwen2.5")]


def export_name(layout: str, component: Component, module: str) -> str:
    """Return the key of a module's adapter without `.lora_A.weight` and the like."""
    if component != "denoiser" or layout not in _PREFIXES:
        raise ExportError(f"Qwen-Image has no {layout} name for {component}.", fix="Check export.layouts.")
    return _PREFIXES[layout] + (module.replace(".", "_") if layout == "kohya" else module)


def load_lora(path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
    """Load a LoRA file into the transformer as `QwenImagePipeline.load_lora_weights` does."""
    from diffusers import QwenImagePipeline as Pipeline

    state, metadata = Pipeline.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True, return_lora_metadata=True
    )
    if not all("lora" in key for key in state):
        raise ValueError("Invalid LoRA checkpoint.")
    Pipeline.load_lora_into_transformer(
        state, transformer=components["denoiser"], metadata=metadata, low_cpu_mem_usage=True
    )


class QwenImage(LoadedModel):
    """A loaded Qwen-Image (`Family`)."""

    spec = SPEC

    def load_noise_schedule(self) -> Mapping[str, Any]:
        """Return the scheduler's configuration."""
        return self.files.config("scheduler") or own.SCHEDULER

    def load_tokenizers(self) -> list[Any]:
        """Load the tokenizer of Qwen2.5-VL."""
        return load_tokenizers(self.files)

    def load_denoiser(self) -> torch.nn.Module:
        """Load the transformer."""
        if self.files.kind == "single_file":
            transformer: torch.nn.Module = own.load_transformer(self.files, self.dtype)
        else:
            from diffusers import QwenImageTransformer2DModel

            transformer = loading.load_part(self.files, "transformer", QwenImageTransformer2DModel, self.dtype)
        return transformer

    def load_text_encoder(self, component: Component) -> torch.nn.Module:
        """Load the language model of Qwen2.5-VL."""
        encoder: torch.nn.Module
        if self.files.kind == "folder" and not self.files.encoder_files:
            encoder = qwen.load_qwen25_folder(self.files, self.dtype)
        else:
            width = int(self.identity.details["prompt_numbers"]) // own.TOKENS
            encoder = qwen.load_qwen25(self.files, own.require_encoder(self.files, width), self.dtype)
        return encoder

    def load_vae(self) -> Any:
        """Load the autoencoder."""
        return autoencoder.load_any(self.files, self.vae_dtype)

    def latents_of(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode to normalized latents (B, 16, H / 8, W / 8); the mode of the posterior."""
        return autoencoder.encode(vae, pixels)

    def pixels_of(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decode normalized latents."""
        return autoencoder.decode(vae, latents)

    def use_tiles(self, vae: Any, side: int) -> None:
        """Let the autoencoder take pictures singly, in overlapping tiles of `side` pixels."""
        autoencoder.use_tiles(vae, side)

    def embed(self, prompts: list[str]) -> list[Conditioning]:
        """Encode prompts to {"prompt_embeds": (its tokens, width)} each: the pipeline's template, without its words."""
        with self.encoder("text_encoder") as encoder:
            pipeline = self._pipeline(text_encoder=encoder, tokenizer=self.tokenizers[0])
            embeds, mask = pipeline._get_qwen_prompt_embeds(prompts, self.device)
        lengths = [min(length, own.TOKENS) for length in mask.sum(1).tolist()]
        return [{"prompt_embeds": row[:length]} for row, length in zip(embeds, lengths, strict=True)]

    def collate(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        """Pad prompts to the longest, with `prompt_mask` (B, tokens) where they differ in length."""
        import torch

        rows = [self._placed(item["prompt_embeds"]) for item in conditionings]
        batch = {"prompt_embeds": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}
        lengths = torch.tensor([len(row) for row in rows])
        # Without a mask attention is faster, so there is none where nothing is padded.
        if len({len(row) for row in rows}) > 1:
            batch["prompt_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.device)
        return batch

    def prompt_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a prompt's encoding; `tokens` counts its own."""
        config: Any = self.denoiser.config
        return {"prompt_embeds": (min(tokens, own.TOKENS), int(config.joint_attention_dim))}

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the transformer on noisy latents (B, 16, h, w) at timesteps (B,) = 1000 · sigma; noise - latents."""
        from diffusers import QwenImagePipeline

        batch, channels, height, width = noisy.shape
        tokens = QwenImagePipeline._pack_latents(
            noisy.to(self.device, self.dtype).contiguous(), batch, channels, height, width
        )
        prediction = self.denoiser(
            hidden_states=tokens,
            timestep=timesteps.to(self.device) / 1000,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_mask=conditioning.get("prompt_mask"),
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        return _unpacked(prediction, height, width)

    def draw_latents(
        self,
        positive: list[Conditioning],
        negative: list[Conditioning],
        settings: DrawSettings,
        generators: list[torch.Generator],
        after_step: AfterStep,
    ) -> torch.Tensor:
        """Draw with diffusers' pipeline around the transformer, with true guidance above 1."""
        prompts, others = self.collate(positive), self.collate(negative)
        values = {"prompt_embeds": prompts["prompt_embeds"], "prompt_embeds_mask": prompts.get("prompt_mask")}
        if settings.guidance > 1:
            values |= {
                "negative_prompt_embeds": others["prompt_embeds"],
                "negative_prompt_embeds_mask": others.get("prompt_mask"),
            }
        packed = self._pipeline(transformer=self.denoiser)(
            **values,
            num_inference_steps=settings.steps,
            true_cfg_scale=settings.guidance,
            height=settings.height,
            width=settings.width,
            generator=generators,
            output_type="latent",
            max_sequence_length=own.TOKENS,
            callback_on_step_end=after_step,
        ).images
        return _unpacked(packed, settings.height // SPEC.latent_downscale, settings.width // SPEC.latent_downscale)

    def _pipeline(self, **parts: Any) -> Any:
        from diffusers import QwenImagePipeline

        pipeline = QwenImagePipeline(
            scheduler=loading.build_scheduler(self.noise_schedule),
            vae=None,  # decoded apart, in the autoencoder's own number format
            text_encoder=parts.get("text_encoder"),
            tokenizer=parts.get("tokenizer"),
            transformer=parts.get("transformer"),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _unpacked(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Lay tokens (B, h / 2 · w / 2, 64) out as latents (B, 16, h, w)."""
    from diffusers import QwenImagePipeline

    factor = SPEC.latent_downscale
    frames: torch.Tensor = QwenImagePipeline._unpack_latents(tokens, height * factor, width * factor, factor)
    return frames.squeeze(2)
