"""What FLUX.1 and Chroma do alike once they are loaded: latents, tokens of 2 x 2 latents, positions, schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasmith.engine.families import _flux_files as own
from lorasmith.engine.families import _loading as loading
from lorasmith.engine.families._model import LoadedModel

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.families import DrawSettings

PATCH = 2
"""Latents each way in one token."""
DYNAMIC_SCHEDULE: Mapping[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""FLUX.1-dev's scheduler configuration: noise levels are shifted more for larger pictures."""


class FluxModel(LoadedModel):
    """A loaded transformer that reads pictures as rows of 2 x 2 latents, from FLUX.1's autoencoder."""

    _places: tuple[tuple[int, int, torch.device], torch.Tensor] | None = None

    def load_vae(self) -> Any:
        """Load the autoencoder."""
        return own.load_vae(self.files, self.vae_dtype)

    def latents_of(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encode to shifted and scaled latents (B, 16, H / 8, W / 8); the mode of the posterior."""
        latents = vae.encode(pixels).latent_dist.mode()
        normalized: torch.Tensor = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return normalized

    def pixels_of(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decode shifted and scaled latents."""
        stored = latents / vae.config.scaling_factor + vae.config.shift_factor
        pixels: torch.Tensor = vae.decode(stored, return_dict=False)[0]
        return pixels

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents (B, C, h, w) as tokens (B, h / 2 · w / 2, 4 C)."""
        from diffusers import FluxPipeline

        tokens: torch.Tensor = FluxPipeline._pack_latents(latents.contiguous(), *latents.shape)
        return tokens

    def unpacked(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return tokens as latents (B, C, height, width), counted in latents."""
        from diffusers import FluxPipeline

        factor = self.spec.latent_downscale
        latents: torch.Tensor = FluxPipeline._unpack_latents(tokens, height * factor, width * factor, factor)
        return latents

    def positions(self, height: int, width: int, text_tokens: int) -> dict[str, torch.Tensor]:
        """Return the place of each token on the device: rows and columns for the picture, zeros for the prompt.

        `height` and `width` are counted in latents. The picture's last ones are kept, since batches of one size follow
        each other and making them would copy to the device in each step.
        """
        import torch
        from diffusers import FluxPipeline

        wanted = (height, width, self.device)
        if self._places is None or self._places[0] != wanted:
            rows, columns = height // PATCH, width // PATCH
            places = FluxPipeline._prepare_latent_image_ids(1, rows, columns, self.device, torch.float32)
            self._places = (wanted, places)
        return {"img_ids": self._places[1], "txt_ids": torch.zeros(text_tokens, 3, device=self.device)}

    def latents_drawn_by(self, pipeline: Any, settings: DrawSettings, values: Mapping[str, Any]) -> torch.Tensor:
        """Return the latents (B, C, h, w) that a pipeline made of the transformer alone draws with `values`."""
        pipeline.vae_scale_factor = factor = self.spec.latent_downscale
        pipeline.set_progress_bar_config(disable=True)
        tokens = pipeline(
            num_inference_steps=settings.steps,
            height=settings.height,
            width=settings.width,
            guidance_scale=settings.guidance,
            output_type="latent",
            **values,
        ).images
        side = factor * PATCH
        return self.unpacked(tokens, settings.height // side * PATCH, settings.width // side * PATCH)

    def own_scheduler(self) -> Any:
        """Return a scheduler for one drawing."""
        return loading.build_scheduler(self.noise_schedule)
