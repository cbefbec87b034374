"""A base model family from outside the package: a small flow transformer of our own, without diffusers' classes.

It shows all that a family is: facts, recognition, loading, encoding, predicting, drawing, and names in files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
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
from lorasmith.engine.families._model import AfterStep, LoadedModel

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.sources import BaseFiles

_ATTENTION = ("to_q", "to_k", "to_v", "to_out")
SPEC = FamilySpec(
    name="pebble",
    label="Pebble",
    license=License("CC0", "https://creativecommons.org/publicdomain/zero/1.0/", "Do what you like with it."),
    objective="flow",
    pixel_multiple=16,
    default_resolution=64,
    token_limit=16,
    caption_style="prose",
    targets={
        "attention": _ATTENTION,
        "attention-mlp": (*_ATTENTION, "up", "down"),
        "all-linear": (*_ATTENTION, "up", "down"),
    },
    conv_targets=(),
    text_encoder_targets=("mix",),
    block_classes=("PebbleBlock",),
    layouts=("diffusers",),
    hub_ids=("nobody/pebble",),
    denoiser_parameters=60_000,
    latent_channels=48,
    latent_downscale=4,
    prompt_numbers=16 * 32,
    readers={"diffusers": ("diffusers",)},
    token_limits={"bytes": 16},
    draw_steps=4,
    draw_guidance=1.0,
    timestep_sampling="logit_normal",
)


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return a pebble's identity, or None."""
    if files.config("").get("_class_name") != "PebblePipeline":
        return None
    parameters = sum(_size(info.shape) for info in files.tensors("denoiser").values())
    missing = tuple(part for part in ("denoiser", "text_encoder", "vae") if not files.weight_files(part))
    label = f"Pebble, fp32, {parameters / 1e6:.2f} M"
    return BaseIdentity("pebble", label, "only", "velocity", 64, parameters, "fp32", missing)


def load(
    files: BaseFiles,
    identity: BaseIdentity,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement = ON_DEVICE,
) -> Pebble:
    """Load all parts."""
    if identity.parts_missing:
        raise loading.missing_part(files, " and no ".join(identity.parts_missing))
    return Pebble(files, identity, device, dtype, placement)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Return nothing: bytes need no tokenizer."""
    return []


def export_name(layout: str, component: Component, module: str) -> str:
    """Return the key of a module's adapter."""
    if layout != "diffusers":
        raise ExportError(f"Pebble has no {layout} name for {component}.")
    return {"denoiser": "transformer.", "text_encoder": "text_encoder."}[component] + module


def load_lora(path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
    """Load a file as peft does, since no other program knows pebbles."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    tensors = load_file(path)
    for component, module in components.items():
        prefix = export_name("diffusers", component, "")
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        ranks = {name.removesuffix(".lora_A.weight"): len(value) for name, value in own.items() if ".lora_A." in name}
        if not ranks:
            continue
        config = LoraConfig(r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=ranks, target_modules=sorted(ranks))
        inject_adapter_in_model(config, module)
        set_peft_model_state_dict(module, own)


class Pebble(LoadedModel):
    """A loaded pebble."""

    spec = SPEC

    def load_noise_schedule(self) -> Mapping[str, Any]:
        """Return a plain flow schedule."""
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}

    def load_tokenizers(self) -> list[Any]:
        """Return nothing."""
        return []

    def load_denoiser(self) -> torch.nn.Module:
        """Load the transformer."""
        return self._part("denoiser")

    def load_text_encoder(self, component: Component) -> torch.nn.Module:
        """Load the embedding of bytes."""
        return self._part(component)

    def load_vae(self) -> Any:
        """Load the patches."""
        return self._part("vae").to(self.vae_dtype)

    def _part(self, part: str) -> torch.nn.Module:
        from safetensors.torch import load_file

        from tests.contracts.outside import pebble_parts

        module: torch.nn.Module = pebble_parts.KINDS[part](self.files.config(part))
        module.load_state_dict(load_file(self.files.weight_files(part)[0]))
        loading.freeze(module.to(self.dtype))
        return module

    def latents_of(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Take patches of four pixels."""
        import torch

        latents: torch.Tensor = torch.nn.functional.pixel_unshuffle(pixels, 4) * vae.scale
        return latents

    def pixels_of(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Put patches back."""
        import torch

        return torch.nn.functional.pixel_shuffle(latents / vae.scale, 4)

    def use_tiles(self, vae: Any, side: int) -> None:
        """Do nothing: patches take no memory."""

    def embed(self, prompts: list[str]) -> list[Conditioning]:
        """Embed the first 16 bytes."""
        import torch

        rows = [(list(prompt.encode()) + [0] * 16)[:16] for prompt in prompts]
        with self.encoder("text_encoder") as encoder:
            embeds = encoder(torch.tensor(rows, device=self.device))
        return [{"prompt_embeds": row} for row in embeds]

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the transformer."""
        embeds = conditioning["prompt_embeds"].to(self.dtype)
        prediction: torch.Tensor = self.denoiser(noisy.to(self.device, self.dtype), timesteps / 1000, embeds)
        return prediction

    def draw_latents(
        self,
        positive: list[Conditioning],
        negative: list[Conditioning],
        settings: DrawSettings,
        generators: list[torch.Generator],
        after_step: AfterStep,
    ) -> torch.Tensor:
        """Walk down the straight line in equal steps."""
        import torch

        size = (48, settings.height // 4, settings.width // 4)
        latents = torch.stack([torch.randn(size, generator=generator) for generator in generators])
        latents, conditioning = latents.to(self.device, self.dtype), self.collate(positive)
        for index in range(settings.steps):
            sigma = 1 - index / settings.steps
            timesteps = torch.full((len(latents),), 1000 * sigma, device=self.device)
            latents = latents - self.predict(latents, timesteps, conditioning) / settings.steps
            after_step(self, index, timesteps, {})
        return latents


def _size(shape: tuple[int, ...]) -> int:
    number = 1
    for side in shape:
        number *= side
    return number


def write_index(folder: Path) -> None:
    """Write the file that pebbles are known by."""
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "PebblePipeline"}))
