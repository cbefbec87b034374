"""From whatever a file holds to 8-bit sRGB: transparency taken apart, many bits scaled to 8, color profiles applied."""

from __future__ import annotations

import hashlib
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

_BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}
_NAME_LENGTH = 60
DEEP_NOTE = "more than 8 bits a channel: reduced to 8"


def split_alpha(picture: Image.Image, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    """Return the colors with 8 bits a channel, and the alpha channel (`L`) where some pixel is transparent."""
    alpha: Image.Image | None = None
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        notes.append(DEEP_NOTE)
        values = np.asarray(picture)
        key = picture.info.get("transparency")
        if isinstance(key, int):
            alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        picture = Image.fromarray(_to_eight_bits(values, picture.mode))
    elif picture.mode == "LA":
        picture, alpha = picture.split()
    elif picture.has_transparency_data:
        full = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        alpha = full.getchannel("A")
        picture = full.convert("RGB")
    elif picture.mode in ("P", "PA", "1", "YCbCr", "HSV", "RGBX"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    opaque = alpha is None or alpha.getextrema()[0] == 255
    return picture, None if opaque else alpha


def reduce_picture(
    colors: Image.Image, alpha: Image.Image | None, factor: int
) -> tuple[Image.Image, Image.Image | None]:
    """Return both made `factor` times smaller by averaging; what transparent pixels hide is not mixed in."""
    if factor < 2:
        return colors, alpha
    if alpha is None:
        return colors.reduce(factor), None
    joined = colors.convert("RGB")
    joined.putalpha(alpha)
    small = joined.reduce(factor)  # Pillow weighs the colors with their alpha
    return small.convert("RGB"), small.getchannel("A")


def to_srgb(colors: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """Return the colors as RGB in sRGB; a profile that cannot be used is noted and ignored."""
    if profile:
        try:
            return _apply_profile(colors, profile, notes)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            notes.append("its color profile cannot be used and was ignored")
    if colors.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(colors, lab, ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert converted is not None
        return converted
    if colors.mode == "CMYK":
        notes.append("CMYK without a color profile: its colors are approximate")
    return colors if colors.mode == "RGB" else colors.convert("RGB")  # a copy would cost a tenth of the decoding


def lay_on(colors: Image.Image, alpha: Image.Image, background: str, sha256: str) -> Image.Image:
    """Return the picture on `background`: white, gray, black, or the checkerboard that its file's hash draws."""
    if background == "checker":
        backdrop = checkerboard(colors.size, sha256)
    else:
        backdrop = Image.new("RGB", colors.size, _BACKGROUNDS[background])
    return Image.composite(colors, backdrop, alpha)


def checkerboard(size: tuple[int, int], sha256: str) -> Image.Image:
    """Return a board of two colors; colors, squares and their place depend on the hash, so that none is learnt."""
    draw = hashlib.sha256(f"checker {sha256}".encode()).digest()
    first = np.frombuffer(draw[:3], dtype=np.uint8)
    square = max(1, min(size) // (4 + draw[3] % 13))
    columns = (np.arange(size[0]) + draw[4]) // square % 2 == 0
    rows = (np.arange(size[1]) + draw[5]) // square % 2 == 0
    board = Image.fromarray(np.where(rows[:, None] ^ columns[None, :], np.uint8(255), np.uint8(0)))
    light, dark = (Image.new("RGB", size, tuple(color.tolist())) for color in (first, first ^ 0x80))
    return Image.composite(light, dark, board)


def _to_eight_bits(values: npt.NDArray[np.generic], mode: str) -> npt.NDArray[np.uint8]:
    """Return gray values of `mode` I;16…, I or F scaled to 0..255."""
    if mode.startswith("I;16"):
        table = np.rint(np.arange(65536) / 257).astype(np.uint8)
        scaled: npt.NDArray[np.uint8] = table[values.astype(np.uint16, copy=False)]
        return scaled
    numbers = np.nan_to_num(values.astype(np.float32 if mode == "F" else np.float64))
    top = float(numbers.max(initial=0.0))
    if mode == "F":  # floats are 0..1 by custom, but scanners write other ranges
        full = 1.0 if top <= 1.0 else max(255.0, top)
    else:  # 32-bit integers mostly hold 8- or 16-bit values
        full = 255.0 if top <= 255 else 65535.0 if top <= 65535 else float(2**31 - 1)
    shades: npt.NDArray[np.uint8] = np.clip(np.rint(numbers * (255.0 / full)), 0, 255).astype(np.uint8)
    return shades


def _apply_profile(colors: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    name = ImageCms.getProfileDescription(source).strip()[:_NAME_LENGTH]
    if source.profile.xcolor_space.strip() == "RGB" and colors.mode == "L":
        colors = colors.convert("RGB")
    if colors.mode == "RGB" and name.lower().startswith("srgb"):
        return colors  # a transform to itself costs time and moves pixels by rounding
    converted = ImageCms.profileToProfile(
        colors,
        source,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None
    notes.append(f"color profile {name or 'without a name'} turned into sRGB")
    return converted
