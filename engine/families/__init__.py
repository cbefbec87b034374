"""Base model families: the narrow protocol, and how families are found.

A family is one module in this package with `SPEC`, `identify`, `load` and `export_name` (`FamilyModule`), plus one
preset file `presets/NAME.toml`. Nothing outside this package may ask which family it is: what differs is a field of
the spec or a method. Modules here are imported without torch, so that the wizard can read their facts; whatever needs
torch is imported inside the functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from lorasmith.engine.errors import BaseModelError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL import Image

    from lorasmith.engine.sources import BaseFiles

Component = str
"""What an adapter attaches to: `denoiser`, `text_encoder`, later `text_encoder_2` …"""
Conditioning = dict[str, "torch.Tensor"]
"""Named tensors of one prompt without a batch dimension, or of a batch with one."""
Prediction = Literal["epsilon", "v_prediction", "velocity"]
MemoryMeasure = Literal["apart", "tiles", "draw on cpu"]
"""Ways to need less memory; see `Family.save_memory`."""


@dataclass(frozen=True)
class License:
    """The license that models of a family usually have, and what it means for the user."""

    name: str
    url: str
    consequence: str


@dataclass(frozen=True)
class FamilySpec:
    """Facts of a family that are readable without torch.

    `targets` maps an adapter target preset (`attention`, `attention-mlp`) to module-name suffixes in the denoiser;
    `conv_targets` are those that LoCon adds; `text_encoder_targets` those in each text encoder.
    `token_limit` counts the tokens of one prompt including start and end. `caption_style` is what the text encoders
    were trained on. `block_classes` are the classes that repeat in the denoiser (for checkpointing and compiling).
    `latent_channels` and `latent_downscale` (pixels per latent, each way) are those of its image encoder;
    `prompt_numbers` is how many numbers the embeddings of one prompt have in the usual variant.
    `activation_mib_per_megapixel` is the memory that one picture's training step takes in a denoiser of
    `denoiser_parameters` in 16 bits with a rank 16 attention LoRA: without and with gradient checkpointing.
    """

    name: str
    label: str
    license: License
    objective: Literal["ddpm", "flow"]
    pixel_multiple: int
    default_resolution: int
    token_limit: int
    caption_style: Literal["tags", "prose"]
    targets: Mapping[str, tuple[str, ...]]
    conv_targets: tuple[str, ...]
    text_encoder_targets: tuple[str, ...]
    block_classes: tuple[str, ...]
    layouts: tuple[str, ...]
    hub_ids: tuple[str, ...]
    denoiser_parameters: int
    latent_channels: int
    latent_downscale: int
    prompt_numbers: int
    sources: tuple[str, ...] = ()
    activation_mib_per_megapixel: tuple[float, float] | None = None


@dataclass(frozen=True)
class BaseIdentity:
    """What a located base model is, known from headers and small config files alone.

    `label` is shown to the user, e.g. "Stable Diffusion 1.x, epsilon, fp16, 0.86 B". `native_resolution` is the side in
    pixels that the base was trained at. `parts_missing` names what the files lack, e.g. `vae`. `details` may hold
    `license`, the one that the model's own card names; "" or absent: the family's; and `prompt_numbers`, where this
    model's differ from the family's.
    """

    family: str
    label: str
    variant: str
    prediction: Prediction
    native_resolution: int
    parameters: int
    precision: str
    parts_missing: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PictureRequest:
    """One picture to draw: the conditioning of its prompt and negative prompt, and the seed of its first noise."""

    positive: Conditioning
    negative: Conditioning
    seed: int


@dataclass(frozen=True)
class DrawSettings:
    """How pictures are drawn; sizes in pixels."""

    steps: int
    guidance: float
    height: int
    width: int


class Family(Protocol):
    """A loaded base model. `device` and `dtype` are those of the frozen weights and the computation."""

    spec: FamilySpec
    identity: BaseIdentity
    denoiser: torch.nn.Module
    """Frozen UNet or transformer that adapters attach to."""
    text_encoders: dict[Component, torch.nn.Module]
    """Frozen text encoders by component name; empty after `release_encoders`."""
    device: torch.device
    dtype: torch.dtype
    noise_schedule: Mapping[str, Any]
    """The scheduler configuration as the model's own files give it (for `ddpm`: betas, prediction type, zero SNR)."""
    tile_side: int
    """Side in pixels of the tiles that pictures are encoded and decoded in; 0 while they are taken whole."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] to normalized latents (B, C, h, w); the mode, no random draw."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Encode prompts, each to named tensors without a batch dimension; gradients reach the text encoders."""
        ...

    def collate(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        """Stack (and pad, where lengths differ) the conditioning of several prompts into a batch on the device."""
        ...

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the denoiser on noisy latents (B, C, h, w) at timesteps (B,) in 0..999; same shape as the target."""
        ...

    def draw(
        self,
        requests: Sequence[PictureRequest],
        settings: DrawSettings,
        on_step: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """Draw pictures with the family's own pipeline and scheduler, all requests as one batch.

        Loads the image decoder when it was released, and lets it go again. `on_step(k)` is called after each denoising
        step; what it raises ends the drawing.
        """
        ...

    def release_encoders(self, keep_text: bool = False) -> None:
        """Drop the autoencoder and, unless they are trained and so kept, the text encoders from memory."""
        ...

    def save_memory(self, measure: MemoryMeasure) -> bool:
        """Work with less memory from now on, if more slowly; False where that changes nothing, or nothing more.

        `apart`: encoders that are not trained are on the device only while they encode; the results are the same.
        `tiles`: the autoencoder takes pictures singly in overlapping tiles of `tile_side` pixels; larger pictures come
        out slightly different. `draw on cpu`: `draw` computes on the processor and leaves the device's memory alone.
        """
        ...


class FamilyModule(Protocol):
    """What each module of this package has."""

    SPEC: FamilySpec

    def identify(self, files: BaseFiles) -> BaseIdentity | None:
        """Return what the files are if they belong to this family, from headers and configs alone."""
        ...

    def load(
        self,
        files: BaseFiles,
        identity: BaseIdentity,
        device: torch.device,
        dtype: torch.dtype,
        *,
        apart: bool = False,
    ) -> Family:
        """Load every part of the base model, frozen and in eval mode.

        With `apart` from the start as `Family.save_memory("apart")` says, and the autoencoder only once it is needed.
        """
        ...

    def load_tokenizers(self, files: BaseFiles) -> list[Any]:
        """Load the tokenizers alone, without torch models, for the trigger page."""
        ...

    def export_name(self, layout: str, component: Component, module: str) -> str:
        """Return the name under which `layout` stores the adapter of `module` (dotted path inside the component)."""
        ...

    def load_lora(self, path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
        """Load a LoRA file of any of the family's layouts into `components` with diffusers' own loader.

        Lets every exception and warning of the loader through: the export is proved with it.
        """
        ...


@cache
def families() -> dict[str, FamilyModule]:
    """Return every family module of this package by name."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    modules = [cast(FamilyModule, importlib.import_module(f"{__name__}.{name}")) for name in names]
    return {module.SPEC.name: module for module in modules if hasattr(module, "SPEC")}


def identify_base(files: BaseFiles, wanted: str = "auto") -> tuple[FamilyModule, BaseIdentity]:
    """Find the family that `files` belong to.

    Raises BaseModelError where no family knows them, or where `wanted` is another family than the files are.
    """
    if wanted != "auto" and wanted not in families():
        raise BaseModelError(f"Unknown family {wanted}.", fix=f"Known families: {', '.join(sorted(families()))}.")
    for module in families().values():
        identity = module.identify(files)
        if identity is None:
            continue
        if wanted not in ("auto", identity.family):
            raise BaseModelError(
                f"{files.origin} is {identity.label}, not {wanted}.",
                fix="Set base.family to auto, or choose another base model.",
            )
        return module, identity
    raise BaseModelError(
        f"{files.origin} is no base model that lorasmith knows.",
        why=files.describe(),
        fix=f"Known families: {', '.join(module.SPEC.label for module in families().values())}.",
    )
