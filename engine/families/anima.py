"""Anima (CircleStone Labs, 2026): NVIDIA's Cosmos Predict 2 for anime pictures, prompts read by Qwen3 and T5's words.

A diffusers folder, or ComfyUI's file with its autoencoder and encoder apart. diffusers has a modular pipeline for it
alone, whose loop cannot be watched, so that the few lines of drawing are here.
"""

from __future__ import annotations

import re
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
from lorasmith.engine.families import _anima_files as own
from lorasmith.engine.families import _autoencoder_qwen as autoencoder
from lorasmith.engine.families import _encoder_qwen as qwen
from lorasmith.engine.families import _encoder_t5 as t5
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families._model import AfterStep, LoadedModel

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.sources import BaseFiles

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_MLP = ("ff.net.0.proj", "ff.net.2")
_MODULATION = tuple(f"norm{place}.linear_{layer}" for place in (1, 2, 3) for layer in (1, 2))
_OUTSIDE = {
    "patch_embed.proj": "x_embedder.proj.1",
    "time_embed.t_embedder.linear_1": "t_embedder.1.linear_1",
    "time_embed.t_embedder.linear_2": "t_embedder.1.linear_2",
    "norm_out.linear_1": "final_layer.adaln_modulation.1",
    "norm_out.linear_2": "final_layer.adaln_modulation.2",
    "proj_out": "final_layer.linear",
}
_IN_BLOCKS = {
    **{
        f"attn{number}.to_{own_name}": f"{kind}_attn.{theirs}"
        for number, kind in ((1, "self"), (2, "cross"))
        for own_name, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out.0", "output_proj"))
    },
    **{
        f"norm{number}.linear_{layer}": f"adaln_modulation_{kind}.{layer}"
        for number, kind in ((1, "self_attn"), (2, "cross_attn"), (3, "mlp"))
        for layer in (1, 2)
    },
    "ff.net.0.proj": "mlp.layer1",
    "ff.net.2": "mlp.layer2",
}
_BLOCK = re.compile(r"transformer_blocks\.(?P<number>\d+)\.(?P<inside>.+)")
SPEC = FamilySpec(
    name="anima",
    label="Anima",
    license=License(
        name="CircleStone Labs Non-Commercial License",
        url="https://huggingface.co/circlestone-labs/Anima/blob/main/LICENSE.md",
        consequence="The model is for non-commercial use; the license says what you may sell of your LoRA and art.",
    ),
    objective="flow",
    pixel_multiple=16,
    default_resolution=1024,
    token_limit=own.TOKENS,
    token_limits={"Qwen3 0.6B": own.TOKENS, "T5's words": own.TOKENS},
    caption_style="tags",
    targets={
        "attention": _ATTENTION,
        "attention-mlp": (*_ATTENTION, *_MLP),
        "all-linear": (*_ATTENTION, *_MLP, *_MODULATION),
    },
    conv_targets=(),
    text_encoder_targets=(),
    text_parts=("text_encoder", "text_conditioner"),
    trainable_text_encoders=(),
    block_classes=("CosmosTransformerBlock",),
    layouts=("comfyui", "diffusers", "kohya"),
    readers={"comfyui": ("ComfyUI", "diffusers"), "diffusers": ("diffusers",), "kohya": ("ComfyUI",)},
    hub_ids=("circlestone-labs/Anima-Base-v1.0-Diffusers",),
    denoiser_parameters=1_956_405_248,
    latent_channels=16,
    latent_downscale=autoencoder.DOWNSCALE,
    prompt_numbers=own.TOKENS * own.PROMPT_WIDTH,
    sources=("https://huggingface.co/circlestone-labs/Anima",),
    draw_steps=30,
    draw_guidance=4.0,
    # sd-scripts docs/anima_train_network.md: sigmoid, shift 1
    timestep_sampling="sigmoid",
    shift=3.0,
    latent_patch=2,
    uses={
        "base": "Train on the base. Use the LoRA on it, on its fine-tunes and on Turbo.",
        "turbo": "Turbo loses its few steps when it is trained: train on the base, and use the LoRA on Turbo.",
    },
)


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return which Anima model the files are, or None; reads headers and configurations only."""
    return own.identify_file(files) if files.kind == "single_file" else own.identify_folder(files)


def load(
    files: BaseFiles,
    identity: BaseIdentity,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement = ON_DEVICE,
) -> Anima:
    """Load transformer, autoencoder, text encoder, conditioner and tokenizers, frozen; kept as `placement` says.

    Raises BaseModelError naming the part that is missing or does not fit.
    """
    if identity.parts_missing:
        raise loading.missing_part(files, " and no ".join(identity.parts_missing))
    return Anima(files, identity, device, dtype, placement)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Load Qwen's and T5's tokenizers; raises BaseModelError where one is not on this machine."""
    folder = files.path / "tokenizer"
    words = t5.load_tokenizer() if files.kind == "single_file" else t5.folder_tokenizer(files, "t5_tokenizer")
    return [qwen.load_tokenizer(folder if folder.is_dir() else None), words]


def export_name(layout: str, component: Component, module: str) -> str:
    """Return the key of a module's adapter without `.lora_A.weight` and the like."""
    if layout not in SPEC.layouts or component != "denoiser":
        raise ExportError(f"Anima has no {layout} name for {component}.", fix="Check export.layouts.")
    if layout == "diffusers":
        return f"transformer.{module}"
    name = _original_name(module)
    return f"lora_unet_{name.replace('.', '_')}" if layout == "kohya" else f"diffusion_model.{name}"


def _original_name(module: str) -> str:
    match = _BLOCK.fullmatch(module)
    if match is None:
        return _OUTSIDE.get(module, module)
    return f"blocks.{match['number']}.{_IN_BLOCKS.get(match['inside'], match['inside'])}"


def load_lora(path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
    """Load a LoRA file into the transformer as `AnimaModularPipeline.load_lora_weights` does."""
    from diffusers.loaders import AnimaLoraLoaderMixin as Loader

    state, metadata = Loader.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True, return_lora_metadata=True
    )
    Loader.load_lora_into_transformer(
        state, transformer=components["denoiser"], metadata=metadata, low_cpu_mem_usage=True
    )


class Anima(LoadedModel):
    """A loaded Anima model (`Family`)."""

    spec = SPEC

    def load_noise_schedule(self) -> Mapping[str, Any]:
        """Return the scheduler's configuration."""
        return self.files.config("scheduler") or own.SCHEDULER

    def load_tokenizers(self) -> list[Any]:
        """Load Qwen's and T5's tokenizers."""
        return load_tokenizers(self.files)

    def load_denoiser(self) -> torch.nn.Module:
        """Load the transformer."""
        transformer: torch.nn.Module = own.load_transformer(self.files, self.dtype)
        return transformer

    def load_text_encoder(self, component: Component) -> torch.nn.Module:
        """Load Qwen3, or the network between it and the transformer."""
        loader = own.load_text_encoder if component == "text_encoder" else own.load_conditioner
        encoder: torch.nn.Module = loader(self.files, self.dtype)
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
        """Encode prompts to {"prompt_embeds": (512, width)} each, zeros behind its own tokens, as diffusers does.

        The transformer reads the zeros too: prompts are not masked.
        """
        read, words = (self._tokens(tokenizer, prompts) for tokenizer in self.tokenizers)
        with self.encoder("text_encoder") as encoder:
            states = encoder(**read).last_hidden_state * read["attention_mask"].unsqueeze(-1)
        with self.encoder("text_conditioner") as conditioner:
            embeds = conditioner(
                source_hidden_states=states.to(self.dtype),
                target_input_ids=words["input_ids"],
                target_attention_mask=words["attention_mask"],
                source_attention_mask=read["attention_mask"],
            )
        return [{"prompt_embeds": row} for row in embeds]

    def _tokens(self, tokenizer: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Return ids and mask (B, tokens) on the device; Qwen has no token for an empty prompt, so one is masked."""
        import torch

        rows = tokenizer(prompts, max_length=own.TOKENS, truncation=True).input_ids
        ids = [torch.tensor(row or [0]) for row in rows]
        mask = [torch.full((max(1, len(row)),), int(bool(row))) for row in rows]
        padded = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(self.device) for part in (ids, mask))
        return dict(zip(("input_ids", "attention_mask"), padded, strict=True))

    def prompt_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a prompt's encoding; all prompts have one length."""
        config: Any = self.denoiser.config
        return {"prompt_embeds": (own.TOKENS, int(config.text_embed_dim))}

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the transformer on the latents as a video of one frame at sigma = timesteps / 1000."""
        import torch

        sigmas = timesteps.to(self.device, torch.float32) / 1000.0
        return self._velocity(noisy.to(self.device, self.dtype), sigmas, conditioning["prompt_embeds"])

    def _velocity(self, latents: torch.Tensor, sigmas: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        frame = latents.unsqueeze(2)
        velocity: torch.Tensor = self.denoiser(
            hidden_states=frame,
            timestep=sigmas,
            encoder_hidden_states=prompts,
            condition_mask=frame.new_zeros((len(frame), 1, *frame.shape[2:])),  # no picture is padded
            return_dict=False,
        )[0]
        return velocity.squeeze(2)

    def draw_latents(
        self,
        positive: list[Conditioning],
        negative: list[Conditioning],
        settings: DrawSettings,
        generators: list[torch.Generator],
        after_step: AfterStep,
    ) -> torch.Tensor:
        """Draw as `AnimaModularPipeline` does; guidance of 1 or less is none."""
        import numpy as np
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        side = SPEC.latent_downscale
        shape = (len(positive), SPEC.latent_channels, settings.height // side, settings.width // side)
        latents: torch.Tensor = randn_tensor(shape, generator=generators, device=self.device, dtype=torch.float32)
        wanted, unwanted = (self.collate(prompts)["prompt_embeds"] for prompts in (positive, negative))
        scheduler = loading.build_scheduler(self.noise_schedule)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / settings.steps, settings.steps), device=self.device)
        scheduler.set_begin_index(0)
        for index, time in enumerate(scheduler.timesteps):
            noisy = latents.to(self.dtype)
            sigmas = time.expand(len(latents)).to(self.dtype) / scheduler.config.num_train_timesteps
            velocity = self._velocity(noisy, sigmas, wanted)
            if settings.guidance > 1.0:
                plain = self._velocity(noisy, sigmas, unwanted)
                velocity = plain + settings.guidance * (velocity - plain)
            latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
            after_step(None, index, time, {"latents": latents})
        return latents
