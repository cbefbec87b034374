"""FLUX.2 (Black Forest Labs, 2025): a rectified-flow transformer whose prompts a language model reads.

dev (32 B, guidance built in, Mistral Small 3) and klein (4 B and 9 B, Qwen3; base and distilled), from a diffusers
folder or single files. Latents are those after the autoencoder's 2x2 patches and batch norm: 128 channels, 16 pixels.
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
    FusedName,
    License,
    Placement,
)
from lorasmith.engine.families import _encoder_mistral as mistral
from lorasmith.engine.families import _encoder_qwen as qwen
from lorasmith.engine.families import _flux2_files as own
from lorasmith.engine.families import _flux2_parts as parts
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families._flux2_names import original_name
from lorasmith.engine.families._model import AfterStep, LoadedModel

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.sources import BaseFiles

# In the single blocks attention and feed-forward are one layer in and one layer out.
_SINGLE = ("attn.to_qkv_mlp_proj", "attn.to_out")
_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *_SINGLE,
)
_BLOCKS = (*_ATTENTION, "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
SPEC = FamilySpec(
    name="flux2",
    label="FLUX.2",
    license=License(
        name="FLUX Non-Commercial License (klein 4B: Apache 2.0)",
        url="https://github.com/black-forest-labs/flux2#readme",
        consequence="LoRAs of dev and klein 9B are for non-commercial use unless you buy a license from Black Forest "
        "Labs; with LoRAs of klein 4B you may do what you like.",
    ),
    objective="flow",
    pixel_multiple=16,
    default_resolution=1024,
    token_limit=own.TOKENS,
    token_limits={"Mistral Small 3 or Qwen3": own.TOKENS},
    caption_style="prose",
    targets={
        "attention": _ATTENTION,
        "attention-mlp": _BLOCKS,
        # Without modulation and time embeddings: they are shared by all blocks, and ComfyUI reads them in one layout.
        "all-linear": (*_BLOCKS, "x_embedder", "context_embedder", "proj_out"),
        "diffusers": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", *_SINGLE),
        "kohya": _BLOCKS,
        "ai-toolkit": _BLOCKS,
    },
    conv_targets=(),
    text_encoder_targets=(),
    trainable_text_encoders=(),
    block_classes=("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
    layouts=("diffusers", "comfyui", "kohya"),
    readers=dict.fromkeys(("diffusers", "comfyui", "kohya", "diffusers/lokr"), ("ComfyUI", "diffusers")),
    fused_layouts=("comfyui", "kohya"),
    hub_ids=(
        *("black-forest-labs/FLUX.2-klein-base-4B", "black-forest-labs/FLUX.2-klein-base-9B"),
        *("black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-9B"),
    ),
    denoiser_parameters=3_875_544_576,
    latent_channels=128,
    latent_downscale=16,
    prompt_numbers=own.TOKENS * 3 * 2560,
    sources=(
        "https://huggingface.co/black-forest-labs/FLUX.2-dev",
        "https://huggingface.co/black-forest-labs/FLUX.2-klein-base-4B",
        "https://github.com/black-forest-labs/flux2",
    ),
    # klein base; dev and the distilled klein say their own.
    draw_steps=50,
    draw_guidance=4.0,
    timestep_sampling="resolution_shift",
    shift=3.0,
    uses={
        "dev": "Train on dev and use the LoRA on dev.",
        "klein base": "Train on klein base and use the LoRA on klein base or on the distilled klein of the same size.",
        "klein distilled": "Train on klein base of the same size, and use the LoRA on this one.",
    },
)


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return which FLUX.2 the files are, or None; reads headers and configurations only."""
    return own.identify_file(files) if files.kind == "single_file" else own.identify_folder(files)


def load(
    files: BaseFiles,
    identity: BaseIdentity,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement = ON_DEVICE,
) -> Flux2:
    """Load transformer, autoencoder, text encoder and tokenizer, frozen and in eval mode; kept as `placement` says.

    Raises BaseModelError naming the part that is missing or does not fit.
    """
    if identity.parts_missing:
        raise own.missing(files, " and no ".join(identity.parts_missing), own.examples(files, identity.parts_missing))
    return Flux2(files, identity, device, dtype, placement)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Load the tokenizer of Mistral or Qwen3; raises BaseModelError where it is not on this machine."""
    kind = own.kind_of_files(files)
    folder = files.path / "tokenizer" if files.kind == "folder" else None
    if folder is not None and not folder.is_dir():
        raise loading.missing_part(files, "tokenizer")
    if kind.line == "dev":
        found = own.find_encoder(files, kind) if folder is None else None
        return [mistral.load_tokenizer(folder, found)]
    tokenizer = qwen.load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise BaseModelError(
            "The tokenizer has no chat template, which FLUX.2 klein's prompts are written with.",
            fix="Take the tokenizer folder of black-forest-labs/FLUX.2-klein-base-4B.",
        )
    return [tokenizer]


def export_name(layout: str, component: Component, module: str) -> str | FusedName:
    """Return the key of a module's adapter without `.lora_A.weight` and the like.

    `comfyui` are the original names, as ai-toolkit writes them; `kohya` the same flattened, as musubi-tuner does.
    """
    if component == "denoiser" and layout == "diffusers":
        return f"transformer.{module}"
    if component != "denoiser" or layout not in ("comfyui", "kohya"):
        raise ExportError(f"FLUX.2 has no {layout} name for {component}.", fix="Check export.layouts.")
    begin, joint = ("diffusion_model.", ".") if layout == "comfyui" else ("lora_unet_", "_")
    name = original_name(module)
    if isinstance(name, FusedName):
        return FusedName(begin + name.name.replace(".", joint), name.rows)
    return begin + name.replace(".", joint)


def load_lora(path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
    """Load a LoRA file into the transformer as `Flux2Pipeline.load_lora_weights` does."""
    from diffusers import Flux2Pipeline as Pipeline

    state, metadata = Pipeline.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True, return_lora_metadata=True
    )
    if not all("lora" in key or "lokr" in key for key in state):
        raise ValueError("Invalid adapter checkpoint: diffusers reads LoRA and LoKr of FLUX.2 only.")
    Pipeline.load_lora_into_transformer(
        state, transformer=components["denoiser"], metadata=metadata, low_cpu_mem_usage=True
    )


class Flux2(LoadedModel):
    """A loaded FLUX.2 (`Family`)."""

    spec = SPEC

    def __init__(self, files: BaseFiles, identity: BaseIdentity, *args: Any, **options: Any) -> None:
        self._kind = own.kind_of_files(files)
        self._ids: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        super().__init__(files, identity, *args, **options)

    def load_noise_schedule(self) -> Mapping[str, Any]:
        """Return the scheduler's configuration."""
        return self.files.config("scheduler") or own.SCHEDULER

    def load_tokenizers(self) -> list[Any]:
        """Load the tokenizer of Mistral or Qwen3."""
        return load_tokenizers(self.files)

    def load_denoiser(self) -> torch.nn.Module:
        """Load the transformer."""
        if self.files.kind == "single_file":
            transformer: torch.nn.Module = parts.load_transformer(self.files, self.dtype)
        else:
            from diffusers import Flux2Transformer2DModel

            transformer = loading.load_part(self.files, "transformer", Flux2Transformer2DModel, self.dtype)
        return transformer

    def load_text_encoder(self, component: Component) -> torch.nn.Module:
        """Load the language model as far as its hidden states are read."""
        reader = mistral if self._kind.line == "dev" else qwen
        layers = max(own.READ_LAYERS[self._kind.line])
        encoder: torch.nn.Module
        if self.files.kind == "folder" and not self.files.encoder_files:
            encoder = reader.load_folder(self.files, self.dtype, layers)
        else:
            found = own.require_encoder(self.files, self._kind)
            encoder = reader.load(self.files, found, self.dtype, layers)
        return encoder

    def load_vae(self) -> Any:
        """Load the autoencoder."""
        if self.files.kind == "single_file" or self.files.vae_file:
            return parts.load_vae(self.files, self.vae_dtype)
        from diffusers import AutoencoderKLFlux2

        return loading.load_part(self.files, "vae", AutoencoderKLFlux2, self.vae_dtype)

    def latents_of(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode to latents (B, 128, H / 16, W / 16), patched 2x2 and normalized by the batch norm's statistics."""
        from diffusers import Flux2Pipeline

        latents: torch.Tensor = Flux2Pipeline._patchify_latents(vae.encode(pixels).latent_dist.mode())
        mean, deviation = parts.statistics(vae)
        return (latents - mean) / deviation

    def pixels_of(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decode normalized latents."""
        from diffusers import Flux2Pipeline

        mean, deviation = parts.statistics(vae)
        unpatched = Flux2Pipeline._unpatchify_latents(latents * deviation + mean)
        pixels: torch.Tensor = vae.decode(unpatched, return_dict=False)[0]
        return pixels

    def embed(self, prompts: list[str]) -> list[Conditioning]:
        """Encode prompts to {"prompt_embeds": (512, 3 x width)} each, by the pipelines' own chat templates."""
        from diffusers import Flux2KleinPipeline, Flux2Pipeline

        dev = self._kind.line == "dev"
        encode = (
            Flux2Pipeline._get_mistral_3_small_prompt_embeds if dev else Flux2KleinPipeline._get_qwen3_prompt_embeds
        )
        layers = own.READ_LAYERS[self._kind.line]
        with self.encoder("text_encoder") as encoder:
            embeds = encode(
                encoder, self.tokenizers[0], prompts, max_sequence_length=own.TOKENS, hidden_states_layers=layers
            )
        return [{"prompt_embeds": row} for row in embeds]

    def prompt_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a prompt's encoding; all prompts have one length."""
        config: Any = self.denoiser.config
        return {"prompt_embeds": (own.TOKENS, int(config.joint_attention_dim))}

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the transformer on noisy latents (B, 128, h, w) at timesteps (B,) = 1000 · sigma; noise - latents."""
        embeds = conditioning["prompt_embeds"]
        batch, channels, height, width = noisy.shape
        latent_ids, text_ids = self._position_ids(height, width, embeds.shape[1])
        tokens = noisy.to(self.device, self.dtype).flatten(2).transpose(1, 2)
        guidance = None
        if self._kind.line == "dev":
            guidance = tokens.new_full((batch,), self.guidance)
        prediction: torch.Tensor = self.denoiser(
            hidden_states=tokens,
            timestep=timesteps.to(self.device) / 1000,
            guidance=guidance,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=latent_ids,
            return_dict=False,
        )[0]
        # A transformer may return more tokens than the picture has; the reference scripts cut too.
        tokens = prediction[:, : height * width]
        return tokens.transpose(1, 2).reshape(batch, channels, height, width)

    def _position_ids(self, height: int, width: int, words: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the places of latents (h x w, 4) and words (words, 4), made once a size."""
        import torch
        from diffusers import Flux2Pipeline

        key = (height, width, words)
        if key not in self._ids or self._ids[key][0].device != self.device:
            latents = Flux2Pipeline._prepare_latent_ids(torch.empty(1, 1, height, width))[0]
            text = Flux2Pipeline._prepare_text_ids(torch.empty(1, words, 1))[0]
            self._ids[key] = (latents.to(self.device), text.to(self.device))
        return self._ids[key]

    def draw_latents(
        self,
        positive: list[Conditioning],
        negative: list[Conditioning],
        settings: DrawSettings,
        generators: list[torch.Generator],
        after_step: AfterStep,
    ) -> torch.Tensor:
        """Draw with diffusers' pipeline around the transformer; only klein base reads the negative prompts."""
        from diffusers import Flux2Pipeline

        dev = self._kind.line == "dev"
        values: dict[str, Any] = {"prompt_embeds": self.collate(positive)["prompt_embeds"]}
        if not dev and settings.guidance > 1 and not self._kind.distilled:
            values["negative_prompt_embeds"] = self.collate(negative)["prompt_embeds"]
        guidance = min(settings.guidance, 1.0) if self._kind.distilled else settings.guidance
        latents: torch.Tensor = parts.draw_pipeline(self.denoiser, self.noise_schedule, dev, self._kind.distilled)(
            **values,
            num_inference_steps=settings.steps,
            guidance_scale=guidance,
            height=settings.height,
            width=settings.width,
            generator=generators,
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
        if latents.ndim == 4:  # klein's pipeline lays them out already, unpatched
            patched: torch.Tensor = Flux2Pipeline._patchify_latents(latents)
            return patched
        height, width = settings.height // SPEC.latent_downscale, settings.width // SPEC.latent_downscale
        return latents.transpose(1, 2).reshape(len(latents), -1, height, width)
