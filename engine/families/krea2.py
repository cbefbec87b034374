"""Krea 2 (Krea, 2026): one stream of prompt and picture tokens, flow matching, prompts read by many layers of Qwen3-VL.

Raw and Turbo; a diffusers folder, or the transformer in one file with its autoencoder and encoder apart.
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
from lorasmith.engine.families import _encoder_qwen3_vl as encoder
from lorasmith.engine.families import _krea2_files as own
from lorasmith.engine.families import _krea2_names as names
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families._model import AfterStep, LoadedModel

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorasmith.engine.sources import BaseFiles

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
"""What every prompt begins with, word for word as in `Krea2Pipeline`."""
TEMPLATE_END = "<|im_end|>\n<|im_start|>assistant\n"
TEMPLATE_TOKENS, END_TOKENS = 34, 5
"""Tokens of the template that the transformer does not see, and those of its end, which it does."""
PATCH = 2
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_gate")
_MLP = ("ff.gate", "ff.up", "ff.down")
SPEC = FamilySpec(
    name="krea2",
    label="Krea 2",
    license=License(
        name="Krea 2 Community License",
        url="https://www.krea.ai/krea-2-licensing",
        consequence="Read it before you sell anything: large companies need a license of their own, and the terms go "
        "with your LoRA.",
    ),
    objective="flow",
    pixel_multiple=16,
    default_resolution=1024,
    token_limit=own.TOKENS,
    token_limits={"Qwen3-VL 4B": own.TOKENS},
    caption_style="prose",
    targets={
        "attention": _ATTENTION,
        "attention-mlp": (*_ATTENTION, *_MLP),
        "all-linear": (*_ATTENTION, *_MLP),
        # What Krea recommends, and diffusers' script has.
        "diffusers": (*_ATTENTION, "ff.up", "ff.down", *names.OUTSIDE),
    },
    conv_targets=(),
    text_encoder_targets=(),
    trainable_text_encoders=(),
    block_classes=("Krea2TransformerBlock",),
    layouts=("comfyui", "diffusers", "kohya"),
    readers={
        "comfyui": ("ComfyUI", "diffusers"),
        "diffusers": ("diffusers", "ComfyUI"),
        "kohya": ("ComfyUI",),
    },
    hub_ids=("krea/Krea-2-Raw", "krea/Krea-2-Turbo"),
    denoiser_parameters=12_820_073_036,
    latent_channels=16,
    latent_downscale=autoencoder.DOWNSCALE,
    prompt_numbers=own.TOKENS * len(own.READ_LAYERS) * own.PROMPT_WIDTH,
    sources=("https://huggingface.co/krea/Krea-2-Raw", "https://github.com/krea-ai/krea-2"),
    draw_steps=28,
    draw_guidance=4.5,
    # musubi-tuner's krea2_shift goes by the number of tokens, as the model's own schedule does.
    timestep_sampling="resolution_shift",
    shift=2.5,
    latent_patch=PATCH,
    uses={
        "raw": "Train on Raw, as Krea recommends. Use the LoRA on Turbo or Raw.",
        "turbo": "Train with the training adapter, which is fetched and not part of your file; Raw is the better base "
        "to train on. Use the LoRA on Turbo.",
    },
)


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return which Krea 2 model the files are, or None; reads headers and configurations only."""
    return own.identify_file(files) if files.kind == "single_file" else own.identify_folder(files)


def load(
    files: BaseFiles,
    identity: BaseIdentity,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement = ON_DEVICE,
) -> Krea2:
    """Load transformer, autoencoder, text encoder and tokenizer, frozen and in eval mode; kept as `placement` says.

    Raises BaseModelError naming the part that is missing or does not fit.
    """
    if identity.parts_missing:
        raise loading.missing_part(files, " and no ".join(identity.parts_missing))
    return Krea2(files, identity, device, dtype, placement)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Load Qwen's tokenizer; raises BaseModelError where it is not on this machine."""
    folder = files.path / "tokenizer"
    return [encoder.load_tokenizer(folder if folder.is_dir() else None)]


def export_name(layout: str, component: Component, module: str) -> str:
    """Return the key of a module's adapter without `.lora_A.weight` and the like.

    `comfyui` has the original names, as Krea's own files; diffusers refuses its own names behind `diffusion_model.`.
    """
    if layout not in SPEC.layouts or component != "denoiser":
        raise ExportError(f"Krea 2 has no {layout} name for {component}.", fix="Check export.layouts.")
    if layout == "diffusers":
        return f"transformer.{module}"
    name = names.original_name(module)
    return f"lora_unet_{name.replace('.', '_')}" if layout == "kohya" else f"diffusion_model.{name}"


def load_lora(path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
    """Load a LoRA file into the transformer as `Krea2Pipeline.load_lora_weights` does."""
    from diffusers import Krea2Pipeline

    loading.load_transformer_lora(Krea2Pipeline, path, components["denoiser"])


class Krea2(LoadedModel):
    """A loaded Krea 2 model (`Family`)."""

    spec = SPEC

    def load_noise_schedule(self) -> Mapping[str, Any]:
        """Return the scheduler's configuration."""
        return self.files.config("scheduler") or own.SCHEDULER

    def load_tokenizers(self) -> list[Any]:
        """Load Qwen's tokenizer."""
        return load_tokenizers(self.files)

    def load_denoiser(self) -> torch.nn.Module:
        """Load the transformer."""
        transformer: torch.nn.Module = own.load_transformer(self.files, self.dtype)
        return transformer

    def load_text_encoder(self, component: Component) -> torch.nn.Module:
        """Load the language model of Qwen3-VL up to the last hidden state that is read."""
        layers, width = max(own.read_layers(self.files)), own.prompt_width(self.files)
        reader: torch.nn.Module = encoder.load(self.files, layers, self.dtype, width)
        return reader

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
        """Encode prompts to {"prompt_embeds": (its tokens, hidden states, width)} each.

        `Krea2Pipeline` pads between a prompt and the end of the template, and counts places without the padding: what
        comes out for the other tokens is the same as without any, which this is.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        tokenizer = self.tokenizers[0]
        limit = own.TOKENS + TEMPLATE_TOKENS - END_TOKENS
        texts = tokenizer([TEMPLATE + prompt for prompt in prompts], max_length=limit, truncation=True).input_ids
        end = tokenizer(TEMPLATE_END).input_ids
        rows = [torch.tensor([*text, *end]) for text in texts]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.device)
        with self.encoder("text_encoder") as reader:
            states = reader(
                input_ids=pad_sequence(rows, batch_first=True).to(self.device),
                attention_mask=mask,
                output_hidden_states=True,
            ).hidden_states
        read = torch.stack([states[layer] for layer in own.read_layers(self.files)], dim=2)
        return [{"prompt_embeds": place[TEMPLATE_TOKENS : len(row)]} for place, row in zip(read, rows, strict=True)]

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
        shape = (min(tokens, own.TOKENS), int(config.num_text_layers), int(config.text_hidden_dim))
        return {"prompt_embeds": shape}

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the transformer on the packed latents at sigma = timesteps / 1000."""
        import torch
        from diffusers import Krea2Pipeline

        prompts, (height, width) = conditioning["prompt_embeds"], noisy.shape[2:]
        grid = (height // PATCH, width // PATCH)
        estimate = self.denoiser(
            hidden_states=_packed(noisy.to(self.device, self.dtype)),
            encoder_hidden_states=prompts,
            timestep=timesteps.to(self.device, torch.float32) / 1000.0,
            position_ids=Krea2Pipeline.prepare_position_ids(prompts.shape[1], *grid, self.device),
            encoder_attention_mask=self._mask(conditioning),
            return_dict=False,
        )[0]
        return _unpacked(estimate, *grid)

    def _mask(self, conditioning: Conditioning) -> torch.Tensor | None:
        """Return which tokens are prompts' own (B, tokens); None where all are, for which attention is faster."""
        import torch

        lengths, longest = conditioning["prompt_lengths"], conditioning["prompt_embeds"].shape[1]
        if all(length == longest for length in lengths.tolist()):
            return None
        return (torch.arange(longest) < lengths[:, None]).to(self.device, non_blocking=True)

    def draw_latents(
        self,
        positive: list[Conditioning],
        negative: list[Conditioning],
        settings: DrawSettings,
        generators: list[torch.Generator],
        after_step: AfterStep,
    ) -> torch.Tensor:
        """Draw with diffusers' pipeline around the transformer; guidance of 1 or less is none, as elsewhere."""
        import torch
        from diffusers import Krea2Pipeline

        pipeline = Krea2Pipeline(
            scheduler=loading.build_scheduler(self.noise_schedule),
            vae=None,  # decoded apart, in the autoencoder's own number format
            text_encoder=None,
            tokenizer=None,
            transformer=self.denoiser,
            text_encoder_select_layers=own.read_layers(self.files),
            is_distilled=self.identity.variant == "turbo",
        )
        pipeline.set_progress_bar_config(disable=True)
        both, count = self.collate([*positive, *negative]), len(positive)
        embeds = both["prompt_embeds"]
        mask = (torch.arange(embeds.shape[1]) < both["prompt_lengths"][:, None]).to(self.device)
        latents: torch.Tensor = pipeline(
            prompt_embeds=embeds[:count],
            prompt_embeds_mask=mask[:count],
            negative_prompt_embeds=embeds[count:],
            negative_prompt_embeds_mask=mask[count:],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance if settings.guidance > 1.0 else 0.0,
            height=settings.height,
            width=settings.width,
            generator=generators,
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
        token = PATCH * SPEC.latent_downscale
        return _unpacked(latents, settings.height // token, settings.width // token)


def _packed(latents: torch.Tensor) -> torch.Tensor:
    """Put each square of latents (B, C, h, w) into a token: (B, h / 2 · w / 2, 4 C)."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def _unpacked(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Undo `_packed` for a grid of `rows` by `columns` tokens."""
    batch, _, numbers = tokens.shape
    squares = tokens.reshape(batch, rows, columns, numbers // PATCH**2, PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * PATCH, columns * PATCH)
