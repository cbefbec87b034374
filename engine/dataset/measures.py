"""Measures of a picture: perceptual hash, sharpness, light, borders, and how hard it was compressed as a JPEG.

All are taken of one small gray copy, so that they cost less than the decoding and pictures of any size compare.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image

from lorasmith.engine.dataset.items import Measures

MEASURES_VERSION = "2"
"""Part of the scan cache's key: to be raised whenever a measure gives other values than before."""
MEASURED_SIDE = 512
"""Longer side of the copy that is measured; smaller pictures are measured as they are."""
_BLUR_LENGTH = 9
_CRISP = 0.78
_STEP_NOISE = 1
_ENOUGH = 128
_HASH_SIDE, _HASH_PIXELS = 8, 32
_BAR_TOLERANCE = 12
_BAR_SHARE = 0.01
_BAR_STEP, _BAR_END = 8, 0.35
_BAR_NOISE = 0.01

_Gray = npt.NDArray[np.uint8]

# fmt: off
# Luminance quantization of quality 50, in rows: ITU-T T.81, table K.1.
_LUMA_TABLE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)
# fmt: on


def measure_picture(image: Image.Image, jpeg_tables: Mapping[int, list[int]] | None = None) -> Measures:
    """Return the measures of an upright RGB picture of any size; `jpeg_tables` are those of a JPEG file."""
    gray = gray_copy(image)
    pixels: _Gray = np.asarray(gray)
    light = brightness_and_contrast(gray)
    return Measures(
        perceptual_hash=perceptual_hash(gray),
        sharpness=round(sharpness(pixels), 4),
        brightness=round(light[0], 4),
        contrast=round(light[1], 4),
        border=round(border_share(pixels), 4),
        jpeg_quality=jpeg_quality(jpeg_tables) if jpeg_tables else None,
    )


def gray_copy(image: Image.Image) -> Image.Image:
    """Return the luma of the picture (`L`), its longer side at most MEASURED_SIDE pixels."""
    gray = image.convert("L")
    longest = max(gray.size)
    if longest <= MEASURED_SIDE:
        return gray
    size = tuple(max(1, round(side * MEASURED_SIDE / longest)) for side in gray.size)
    # Whole factors are averaged first: that is many times faster, and as sharp.
    return gray.resize((size[0], size[1]), Image.Resampling.HAMMING, reducing_gap=1.0)


def brightness_and_contrast(gray: Image.Image) -> tuple[float, float]:
    """Return the mean and the standard deviation of the luma, both 0..1."""
    counts = np.asarray(gray.histogram(), dtype=np.float64) / (gray.width * gray.height)
    shades = np.arange(256) / 255
    mean = float(counts @ shades)
    return mean, float(np.sqrt(counts @ (shades - mean) ** 2))


def perceptual_hash(gray: Image.Image) -> int:
    """Return 64 bits that stay nearly the same when a picture is resized, recompressed or changed a little.

    The bits say which of the lowest 8 x 8 frequencies of a 32 x 32 copy lie above their median. They are those of
    `imagehash.phash`, which is not called because it takes a second to load scipy, in every worker.
    Source: Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010.
    """
    side = (_HASH_PIXELS, _HASH_PIXELS)
    small = np.asarray(gray.resize(side, Image.Resampling.LANCZOS, reducing_gap=3.0), dtype=np.float64)
    waves = _cosines()
    low = waves @ small @ waves.T
    bits = (low > np.median(low)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def sharpness(pixels: _Gray) -> float:
    """Return how crisp the edges are, from 0 (blurred, or nothing to see) to about 1, and more for noise.

    Crete et al., The Blur Effect, 2007: blurring changes differences between neighbors little where the picture is
    blurred already. With a box filter the neighbors' difference after blurring is that of pixels a filter's length
    apart. Strong edges count most, so a sharp subject before a soft background is sharp. The direction that is more
    blurred decides, as after a shake of the camera. The measure is a ratio: contrast cancels out.
    """
    if min(pixels.shape) <= _BLUR_LENGTH:
        return 0.0
    # Every second line across is as good as all of them, and half the work.
    down = pixels[:, :: 2 if pixels.shape[1] >= _ENOUGH else 1].astype(np.int16)
    along = pixels[:: 2 if pixels.shape[0] >= _ENOUGH else 1].T.astype(np.int16, order="C")
    kept = min(_kept_edges(down), _kept_edges(along))
    return kept / _CRISP


def _kept_edges(values: npt.NDArray[np.int16]) -> float:
    """Return the share of the differences along rows that a box filter along columns takes away, 0..1."""
    before, after = (_BLUR_LENGTH - 1) // 2, _BLUR_LENGTH // 2
    middle = values[before : len(values) - after]
    step = middle[1:] - middle[:-1]
    np.abs(step, out=step)
    step *= step > _STEP_NOISE  # what is left of a soft slope in 8 bits are steps of one, which look crisp
    total = int(step.sum(dtype=np.int32))
    if total == 0:
        return 0.0
    across = values[_BLUR_LENGTH:] - values[:-_BLUR_LENGTH]
    np.abs(across, out=across)
    step *= _BLUR_LENGTH
    step -= across
    return int(np.maximum(step, 0, out=step).sum(dtype=np.int32)) / (_BLUR_LENGTH * total)


def border_share(pixels: _Gray) -> float:
    """Return the share of the area that even bars at opposite edges take, 0 where there are none.

    A bar is even, and ends along most of its length at once: the plain ground around an object is no bar.
    """
    rows = _bars(pixels)
    columns = _bars(pixels.T)
    height, width = pixels.shape
    inner = (height - rows) * (width - columns)
    return 1.0 - inner / (height * width) if inner > 0 else 0.0


def _bars(pixels: _Gray) -> int:
    """Return how many rows even bars at the top and the bottom take together; 0 unless there are both."""
    top, bottom = _bar(pixels), _bar(pixels[::-1])
    return top + bottom if min(top, bottom) >= max(1.0, _BAR_SHARE * pixels.shape[0]) else 0


def _bar(pixels: _Gray) -> int:
    """Return the rows of the even bar at the top; 0 where all rows are even or it has no straight end."""
    shade = int(pixels[0].mean())
    if np.count_nonzero(np.abs(pixels[0].astype(np.int16) - shade) > _BAR_TOLERANCE) > _BAR_NOISE * pixels.shape[1]:
        return 0  # nearly always, and for a fraction of the work
    differs = np.abs(pixels.astype(np.int16) - shade) > _BAR_TOLERANCE
    uneven = differs.mean(axis=1) > _BAR_NOISE
    if not uneven.any():
        return 0
    end = int(uneven.argmax())
    # Resizing mixes the last row of a bar with the picture, so the rows around it are compared.
    steps = np.abs(pixels[min(end + 1, len(pixels) - 1)].astype(np.int16) - pixels[end - 1]) > _BAR_STEP
    return end if steps.mean() >= _BAR_END else 0


def jpeg_quality(tables: Mapping[int, list[int]]) -> int | None:
    """Return the quality 1..100 of the reference encoder whose luminance table is the most like the file's.

    The reference (libjpeg, jcparam.c) scales table K.1 by 50 / quality, above 50 by 2 - quality / 50.
    """
    table = np.asarray(tables.get(0, ()), dtype=np.float64)
    if table.shape != (64,):
        return None
    distance = np.abs(np.log(_quality_tables() / np.maximum(table, 1.0))).sum(axis=1)
    return int(distance.argmin()) + 1


@functools.cache
def _quality_tables() -> npt.NDArray[np.float64]:
    """Return the reference tables (100, 64) of the qualities 1 to 100."""
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    tables: npt.NDArray[np.float64] = np.asarray(
        np.clip((np.asarray(_LUMA_TABLE) * scale[:, None] + 50) // 100, 1, 255), dtype=np.float64
    )
    return tables


@functools.cache
def _cosines() -> npt.NDArray[np.float64]:
    """Return the lowest rows (8, 32) of the type-II discrete cosine transform, unscaled as in scipy."""
    index = np.arange(_HASH_PIXELS)
    waves: npt.NDArray[np.float64] = np.cos(
        np.pi * np.arange(_HASH_SIDE)[:, None] * (2 * index + 1) / (2 * _HASH_PIXELS)
    )
    waves *= 2.0
    return waves
