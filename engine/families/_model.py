"""What every loaded base model does alike: when its parts are in memory, and how a drawing goes.

A family says how its parts are loaded and called (the methods that raise NotImplementedError); this class knows when.
Main memory never holds two parts that are on their way to the device.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import (
    ON_DEVICE,
    BaseIdentity,
    Component,
    Conditioning,
    DrawSettings,
    FamilySpec,
    MemoryMeasure,
    PictureRequest,
    Placement,
    Quantization,
    SwappedBlocks,
    present_text_parts,
)
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.quantization import pack_module

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lorasmith.engine.sources import BaseFiles

AfterStep = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""What diffusers' pipelines call after each denoising step (`callback_on_step_end`)."""


class LoadedModel:
    """A loaded base model (`Family`) whose parts are those of diffusers and transformers.

    `files` are where its parts are read from, `device` and `dtype` those of its frozen weights.
    """

    spec: ClassVar[FamilySpec]

    def __init__(
        self,
        files: BaseFiles,
        identity: BaseIdentity,
        device: torch.device,
        dtype: torch.dtype,
        placement: Placement = ON_DEVICE,
    ) -> None:
        loading.quiet_libraries()
        self.identity, self.device, self.dtype, self.files = identity, device, dtype, files
        self.vae_dtype = self.choose_vae_dtype()
        self.guidance = 1.0
        self.tile_side = 0
        self.placement = placement
        self.swapped: SwappedBlocks | None = None
        apart = placement.apart
        self._apart, self._draws_on_cpu, self._encodes_images = apart, False, True
        self.noise_schedule: Mapping[str, Any] = self.load_noise_schedule()
        self.tokenizers = [] if loading.builds_skeletons() else self.load_tokenizers()
        waits = apart or placement.swapped_blocks > 0
        self.denoiser: torch.nn.Module = self._settled(self.load_denoiser(), placement.quantize, waits=waits)
        self._first_use: Any = None
        if waits:
            self._first_use = self.denoiser.register_forward_pre_hook(lambda *_: self._wake_denoiser())
        self.text_encoders: dict[Component, torch.nn.Module] = {}
        self._vae: Any = None
        for component in present_text_parts(self.spec, identity):
            encoder = self.load_text_encoder(component)
            self.text_encoders[component] = self._settled(encoder, placement.quantize_text_encoders, waits=apart)
        if not apart:
            self._vae = self._prepared_vae()

    def choose_vae_dtype(self) -> torch.dtype:
        """Return the number format of the autoencoder.

        In fp16 its activations overflow for some pictures, and the latents are NaN.
        """
        import torch

        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def load_noise_schedule(self) -> Mapping[str, Any]:
        """Return the scheduler configuration of the model's own files."""
        raise NotImplementedError

    def load_tokenizers(self) -> list[Any]:
        """Return the tokenizers in the order of the text encoders."""
        raise NotImplementedError

    def load_denoiser(self) -> torch.nn.Module:
        """Load the denoiser in main memory as `dtype`, frozen and in eval mode."""
        raise NotImplementedError

    def load_text_encoder(self, component: Component) -> torch.nn.Module:
        """Load one text encoder in main memory as `dtype`, frozen and in eval mode."""
        raise NotImplementedError

    def load_vae(self) -> Any:
        """Load the autoencoder in main memory as `vae_dtype`, frozen and in eval mode."""
        raise NotImplementedError

    def latents_of(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels (B, 3, H, W) on the device to normalized latents (B, C, h, w); the mode, no random draw."""
        raise NotImplementedError

    def pixels_of(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decode normalized latents (B, C, h, w) to pixels (B, 3, H, W) in [-1, 1]."""
        raise NotImplementedError

    def embed(self, prompts: list[str]) -> list[Conditioning]:
        """Encode at least one prompt; each encoder is used inside `with self.encoder(component)`."""
        raise NotImplementedError

    def draw_latents(
        self,
        positive: list[Conditioning],
        negative: list[Conditioning],
        settings: DrawSettings,
        generators: list[torch.Generator],
        after_step: AfterStep,
    ) -> torch.Tensor:
        """Draw with the family's own pipeline and a scheduler of its own; returns normalized latents (B, C, h, w)."""
        raise NotImplementedError

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the denoiser; see `Family`."""
        raise NotImplementedError

    def prompt_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of a prompt's encoding, `tokens` long where prompts keep their own length."""
        raise NotImplementedError

    def use_tiles(self, vae: Any, side: int) -> None:
        """Let an autoencoder take pictures singly, in overlapping tiles of `side` pixels."""
        vae.enable_slicing()
        vae.enable_tiling()
        vae.tile_sample_min_size = side
        vae.tile_latent_min_size = side // 2 ** (len(vae.config.block_out_channels) - 1)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] to normalized latents (B, C, h, w) in `dtype`."""
        import torch

        if not self._encodes_images:
            raise BaseModelError("The autoencoder is no longer in memory.", why="It was released after caching.")
        if self._vae is None:
            self._vae = self._prepared_vae()
        with torch.no_grad():
            return self.latents_of(self._vae, pixels.to(self.device, self.vae_dtype)).to(self.dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Encode prompts, each to named tensors without a batch dimension; gradients reach the text encoders."""
        if not self.text_encoders:
            raise BaseModelError("The text encoder is no longer in memory.", why="It was released after caching.")
        return self.embed(list(prompts)) if prompts else []

    @contextlib.contextmanager
    def encoder(self, component: Component) -> Iterator[Any]:
        """Give a text encoder on the device; where parts live apart, only while the block runs."""
        encoder = self.text_encoders[component]
        visits = self._apart and not is_trained(encoder)
        if visits:
            self._vae = None
        try:
            if next(encoder.parameters()).device != self.device:
                encoder.to(self.device)
            yield encoder
        finally:
            if visits:
                encoder.to("cpu")

    def blank_prompt(self, tokens: int) -> Conditioning:
        """Return zeros in the shapes of one prompt's encoding; see `Family`."""
        import torch

        shapes = self.prompt_shapes(tokens)
        return {key: torch.zeros(shape, dtype=self.dtype, device=self.device) for key, shape in shapes.items()}

    def collate(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        """Stack prompts of one length to a batch on the device; floats in `dtype`, masks as they are."""
        import torch

        return {key: torch.stack([self._placed(item[key]) for item in conditionings]) for key in conditionings[0]}

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)

    def draw(
        self,
        requests: Sequence[PictureRequest],
        settings: DrawSettings,
        on_step: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """Draw all requests as one batch; each picture's first noise comes from its own CPU generator."""
        import torch

        def after_step(_pipeline: Any, index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(index + 1)
            return values

        training = [module for module in self.denoiser.modules() if module.training]
        self.denoiser.eval()  # or the adapter's dropout would spoil the picture
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        positive, negative = [request.positive for request in requests], [request.negative for request in requests]
        try:
            with torch.no_grad(), self._drawing_device():
                latents = self.draw_latents(positive, negative, settings, generators, after_step)
                vae = self._prepared_vae() if self._vae is None or self._draws_on_cpu else self._vae
                # One at a time: a decoder's memory grows with the batch.
                return [self._picture(vae, row[None].to(self.vae_dtype)) for row in latents]
        finally:
            for module in training:
                module.training = True

    def _picture(self, vae: Any, latents: torch.Tensor) -> Image.Image:
        from diffusers.image_processor import VaeImageProcessor

        to_pictures = partial(VaeImageProcessor().postprocess, output_type="pil")
        picture: Image.Image = to_pictures(self.pixels_of(vae, latents))[0]
        return picture

    def reload_part(self, component: Component) -> torch.nn.Module:
        """Load the denoiser or a text encoder once more, unpacked; see `Family`."""
        return self.load_denoiser() if component == "denoiser" else self.load_text_encoder(component)

    def release_encoders(self, keep_text: bool = False) -> None:
        """Drop the autoencoder, and the text encoders too, from memory; `draw` loads the decoder while it needs it."""
        import torch

        if not keep_text:
            self.text_encoders.clear()
        self._vae, self._encodes_images = None, False
        gc.collect()
        torch.cuda.empty_cache()
        if not self.placement.swapped_blocks:
            self._wake_denoiser()

    def _wake_denoiser(self) -> None:
        """Bring a denoiser that waits in main memory to the device, unless its blocks are swapped."""
        if self._first_use is None:
            return
        if self.swapped is None:
            self.denoiser.to(self.device)
        self._first_use.remove()
        self._first_use = None

    def _move_denoiser(self, device: torch.device) -> None:
        (self.denoiser if self.swapped is None else self.swapped).to(device)

    def save_memory(self, measure: MemoryMeasure) -> bool:
        """Need less memory from now on; see `Family`."""
        if measure == "tiles":
            taken = self.tile_side > 0
            # A half of what the base was made for: a quarter of the memory. Whole latents in the tiles' overlaps.
            self.tile_side = max(32, self.identity.native_resolution // 2 // 32 * 32)
            if self._vae is not None:
                self.use_tiles(self._vae, self.tile_side)
        elif measure == "draw on cpu":
            taken = self._draws_on_cpu or self.device.type == "cpu"
            self._draws_on_cpu = True
        else:
            waiting = [encoder for encoder in self.text_encoders.values() if not is_trained(encoder)]
            taken = self._apart or not (self._vae is not None or (waiting and self.device.type != "cpu"))
            self._apart, self._vae = True, None
            for encoder in waiting:
                encoder.to("cpu")
        return not taken

    @contextlib.contextmanager
    def _drawing_device(self) -> Iterator[None]:
        """Let everything that draws be on the processor inside, where that was asked for."""
        import torch

        self._wake_denoiser()
        if not self._draws_on_cpu:
            yield
            return
        device, self.device = self.device, torch.device("cpu")
        try:
            self._move_denoiser(self.device)
            yield
        finally:
            self.device = device
            # The allocator's cache was not given back, so that there is room for the way back.
            self._move_denoiser(device)

    def _settled(self, module: torch.nn.Module, quantization: Quantization, *, waits: bool = False) -> torch.nn.Module:
        """Lay a part just loaded on the device, or where it `waits` in main memory; packed on the device either way."""
        import torch

        waits_on = torch.device("cpu") if waits and not loading.builds_skeletons() else self.device
        matmul = self.placement.quantized_matmul
        pack_module(module, self.device, quantization, quantized_matmul=matmul, waits_on=waits_on)
        return module

    def _prepared_vae(self) -> Any:
        vae = self.load_vae()
        if self.tile_side:
            self.use_tiles(vae, self.tile_side)
        return vae.to(self.device)


def is_trained(encoder: torch.nn.Module) -> bool:
    """Tell whether a text encoder has weights to be trained."""
    return any(parameter.requires_grad for parameter in encoder.parameters())
