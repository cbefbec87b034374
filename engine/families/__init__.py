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
Quantization = Literal["none", "fp8", "int8", "nf4"]
"""Number formats that frozen linear layers can be kept in."""
TimestepSampling = Literal["uniform", "sigmoid", "logit_normal", "mode", "shift", "resolution_shift"]
"""Which noise levels a flow model is trained at how often."""


@dataclass(frozen=True)
class License:
    """The license that models of a family usually have, and what it means for the user."""

    name: str
    url: str
    consequence: str


@dataclass(frozen=True)
class FamilySpec:
    """Facts of a family that are readable without torch.

    `targets` maps a target preset (`attention`, `attention-mlp`, `all-linear`, and those of other trainers that the
    family has) to module-name suffixes in the denoiser; `conv_targets` are those that LoCon adds;
    `text_encoder_targets` those in each of `trainable_text_encoders`. `text_parts` are the parts that encode text.
    `token_limit` counts the tokens of one prompt including start and end, in the encoder that reads most of it;
    `token_limits` names each encoder's. `caption_style` is what the text encoders were trained on. `block_classes` are
    the classes that repeat in the denoiser (for checkpointing and compiling).
    `latent_channels` and `latent_downscale` (pixels per latent, each way) are those of its image encoder;
    `prompt_numbers` is how many numbers the embeddings of one prompt have in the usual variant.
    `guides_in_one_batch` where drawing with guidance computes both prompts at once, not one after the other.
    `layouts` are the key layouts of exported files, the one that most programs load first; `readers` maps each to the
    programs that load a plain LoRA from it, and LAYOUT/KIND (as in `diffusers/lokr`) to those that load another kind
    where that is not what `engine.compatibility` says of all base models. `fused_layouts` are those that store some
    layers fused (`FusedName`). `draw_steps` and `draw_guidance` are how the usual variant draws.
    For flow models `timestep_sampling` is what `auto` means, `shift` the usual shift of `shift` sampling, and a square
    of `latent_patch` latents each way is one token. `uses` says by variant what to train on and use the LoRA on.
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
    text_parts: tuple[str, ...] = ("text_encoder",)
    trainable_text_encoders: tuple[Component, ...] = ("text_encoder",)
    token_limits: Mapping[str, int] = field(default_factory=dict)
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused_layouts: tuple[str, ...] = ()
    draw_steps: int = 20
    draw_guidance: float = 7.0
    guides_in_one_batch: bool = False
    timestep_sampling: TimestepSampling = "uniform"
    shift: float = 1.0
    latent_patch: int = 1
    uses: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseIdentity:
    """What a located base model is, known from headers and small config files alone.

    `label` is shown to the user, e.g. "Stable Diffusion 1.x, epsilon, fp16, 0.86 B". `native_resolution` is the side in
    pixels that the base was trained at. `parts_missing` names what the files lack, e.g. `vae`. `details` may hold
    `license`, this model's own by its card or its variant; "" or absent: the family's; `prompt_numbers`, `draw_steps`
    and `draw_guidance` where this model's differ from the family's; `warning`, what speaks against training on it;
    `text_parts`, where one that may lack does; `training_adapter`, the Hub id (`owner/name` or
    `owner/name/file.safetensors`) of the LoRA that a distilled variant is trained with; and what LoRA files say of
    their base: `architecture`, `ss_base_model_version`.
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
class Placement:
    """How a base model's weights are kept: see `MemorySettings`, whose names these are.

    With `apart` from the start as `Family.save_memory("apart")` says, the autoencoder is loaded only once it is needed,
    and the denoiser waits in main memory until the encoders are released. With `swapped_blocks` it waits there until
    `engine.block_swap` takes it.
    """

    apart: bool = False
    quantize: Quantization = "none"
    quantize_text_encoders: Quantization = "none"
    quantized_matmul: bool = False
    swapped_blocks: int = 0


ON_DEVICE = Placement()
"""Everything on the device, in the format that is computed in."""


class SwappedBlocks(Protocol):
    """Blocks of a denoiser whose weights wait in main memory; see `engine.block_swap`."""

    def to(self, device: torch.device) -> None:
        """Move the denoiser to `device` but for them; away from the family's device they compute in main memory."""
        ...

    def release(self) -> None:
        """Give back what they take on the device until one of them runs again."""
        ...


@dataclass(frozen=True)
class FusedName:
    """The name of a layer that a key layout stores fused with others: `rows` are the dotted paths of all of them.

    Their weights lie one under the other in the fused weight, in this order, e.g. to_q, to_k and to_v in `qkv`.
    """

    name: str
    rows: tuple[str, ...]


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
    guidance: float
    """What a denoiser with built-in guidance is told while training; others do not read it."""
    swapped: SwappedBlocks | None
    """The denoiser's blocks that wait in main memory, which alone may move it then; None: there are none."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] to normalized latents (B, C, h, w); the mode, no random draw."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Encode prompts, each to named tensors without a batch dimension; gradients reach the text encoders."""
        ...

    def blank_prompt(self, tokens: int) -> Conditioning:
        """Return zeros as `encode_prompts` gives one prompt, of `tokens` tokens where prompts keep their own length.

        For counting memory without text encoders: the meta device has none of their results.
        """
        ...

    def collate(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        """Stack (and pad, where lengths differ) the conditioning of several prompts into a batch on the device."""
        ...

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the denoiser on noisy latents (B, C, h, w) at timesteps (B,); same shape as the target.

        For `ddpm` timesteps are whole numbers 0..999. For `flow` they are 1000 · sigma as fp32 with
        noisy = (1 - sigma) · latents + sigma · noise, and the result is an estimate of noise - latents, whatever sign,
        direction of time or packing the denoiser has inside.
        """
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

    def reload_part(self, component: Component) -> torch.nn.Module:
        """Load the denoiser or a text encoder once more in main memory as it is in its files, in `dtype` and unpacked.

        For what needs weights that quantization changed; where the files have `dtype`, they are read as they are used.
        """
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
        placement: Placement = ON_DEVICE,
    ) -> Family:
        """Load every part of the base model, frozen and in eval mode, and keep it as `placement` says."""
        ...

    def load_tokenizers(self, files: BaseFiles) -> list[Any]:
        """Load the tokenizers alone, without torch models, for the trigger page."""
        ...

    def export_name(self, layout: str, component: Component, module: str) -> str | FusedName:
        """Return the name under which `layout` stores the adapter of `module` (dotted path inside the component).

        Raises ExportError where the family has no such layout, or the layout no such component.
        """
        ...

    def load_lora(self, path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
        """Load a LoRA file of any of the family's layouts into `components` with diffusers' own loader.

        Lets every exception and warning of the loader through: the export is proved with it.
        """
        ...


def usual_drawing(family: Family) -> tuple[int, float]:
    """Return the denoising steps and the guidance that this base model is made for."""
    details = family.identity.details
    steps = int(details.get("draw_steps", family.spec.draw_steps))
    return steps, float(details.get("draw_guidance", family.spec.draw_guidance))


def present_text_parts(spec: FamilySpec, identity: BaseIdentity) -> tuple[str, ...]:
    """Return the parts of this base model that encode text: `spec.text_parts` but for one that may lack and does."""
    return tuple(identity.details.get("text_parts", spec.text_parts))


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
