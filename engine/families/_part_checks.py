"""Whether the parts that a user gave apart fit the denoiser, told from headers before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families import _autoencoder as autoencoder
from lorasmith.engine.families import _encoder_clip as clip

if TYPE_CHECKING:
    from lorasmith.engine.sources import BaseFiles


def require_fitting(files: BaseFiles, *, latent_channels: int, clip_width: int = 0) -> None:
    """Raise BaseModelError where an autoencoder has other latents, or CLIP-L and CLIP-G are not `clip_width` together.

    0: the denoiser does not tell how wide they are.
    """
    vae = autoencoder.find(files)
    if vae and autoencoder.latent_channels(vae.tensors) != latent_channels:
        raise BaseModelError(
            f"The autoencoder in {vae.path.name} belongs to another base model.",
            why=f"Its latents have {autoencoder.latent_channels(vae.tensors)} channels; {latent_channels} are needed.",
            fix="Check base.vae.",
        )
    sizes = clip.find_sizes(files)
    widths = [clip.width_of(found.tensors) for found in sizes.values()]
    if clip_width and len(widths) == 2 and sum(widths) != clip_width:
        names = " and ".join(sorted({found.path.name for found in sizes.values()}))
        raise BaseModelError(
            f"The text encoders in {names} belong to another base model.",
            why=f"They are {widths[0]} and {widths[1]} wide; the denoiser reads {clip_width} together.",
            fix="Check base.text_encoders: CLIP-L (clip_l.safetensors) and CLIP-G (clip_g.safetensors) are needed.",
        )
