"""Pictures with the statistics of photographs: fine texture over large shapes, different for every seed."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw


def photo(seed: int, size: tuple[int, int] = (768, 512)) -> Image.Image:
    """Return a picture whose amplitudes fall with frequency as in photographs, with some hard edges."""
    draws = np.random.default_rng(seed)
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    channels = []
    for _ in range(3):
        waves = (draws.normal(size=frequency.shape) + 1j * draws.normal(size=frequency.shape)) / frequency**1.2
        texture = np.fft.irfft2(waves, s=(height, width))
        channels.append(texture / texture.std() * 40 + draws.integers(80, 170))
    image = Image.fromarray(np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8))
    brush = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, radius = draws.integers(0, width), draws.integers(0, height), draws.integers(10, width // 4)
        box = (int(x - radius), int(y - radius // 2), int(x + radius), int(y + radius // 2))
        color = tuple(int(value) for value in draws.integers(0, 255, 3))
        (brush.ellipse if draws.random() < 0.5 else brush.rectangle)(box, fill=color)
    return image


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    """Return the picture as a JPEG of that quality gives it back."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    with Image.open(file) as read:
        return read.convert("RGB")
