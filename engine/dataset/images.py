"""Opening a picture: the one place that decodes pictures, so that every user of one sees the same pixels.

The order: decode fully → turn upright (EXIF) → 8 bits → color profile to sRGB → transparency onto a background → RGB.
A file from outside may hold anything; every reason not to use it becomes a DatasetError that names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import stat
import struct
import threading
import zlib
from dataclasses import dataclass
from functools import cache
from io import BufferedReader, BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from lorasmith.engine.errors import DatasetError

DECODE_VERSION = "1"
"""Part of every cache key: to be raised whenever the same file gives other pixels than before."""
MAX_PIXELS = 200_000_000
"""Pictures with more pixels are refused: a small file can unpack to more than the machine's memory."""
NOT_A_PICTURE = "not a picture"

# Pillow warns above this and raises above twice this; pictures in between are refused here without the difference.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

# Only formats that are recognised by their first bytes and decoded inside Pillow: EPS, for one, starts Ghostscript.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "QOI")
_SAME_FORMAT = {"MPO": "JPEG", "DIB": "BMP"}
# fmt: off
_OTHER_PICTURES = frozenset((
    ".heic", ".heif", ".jxl", ".psd", ".psb", ".xcf", ".kra", ".tga", ".svg", ".eps", ".ico", ".exr", ".hdr", ".dds",
    ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2",
))
# fmt: on
_BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
# Decoders raise far more than OSError on damaged files; Warning is for programs that turn warnings into errors.
_FILE_ERRORS = (
    OSError, ValueError, IndexError, KeyError, TypeError, AttributeError, ArithmeticError, MemoryError, SyntaxError,
    EOFError, RuntimeError, BufferError, AssertionError, struct.error, zlib.error, ImageCms.PyCMSError,
    Image.DecompressionBombError, Warning,
)  # fmt: skip
# One huge picture needs gigabytes while it is decoded; several at once would need as many times more.
_HUGE_PIXELS = 40_000_000
_one_huge_picture = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """A decoded picture: RGB pixels, the file's sha256, whether any pixel was transparent, remarks for the user."""

    image: Image.Image
    sha256: str
    transparent: bool
    notes: tuple[str, ...]


def open_image(path: Path, background: str = "white") -> Image.Image:
    """Return the picture as upright RGB in sRGB, transparency laid on `background` (white, gray or black).

    Raises DatasetError whose `why` is the reason.
    """
    image = read_picture(path, background).image
    return image.copy() if isinstance(image, ImageFile.ImageFile) else image  # a copy has no tie to the file


def read_picture(path: Path, background: str = "white") -> Picture:
    """Return what `open_image` returns, with the file's hash and remarks.

    Raises DatasetError whose `why` is the reason.
    """
    try:
        _refuse_special_file(path)
        with path.open("rb") as file:
            picture = Image.open(file, formats=_known_formats())
            pixels = picture.width * picture.height
            if pixels > MAX_PIXELS:
                raise Image.DecompressionBombError
            with _one_huge_picture if pixels > _HUGE_PIXELS else contextlib.nullcontext():
                return _finish(picture, file, path.suffix.lower(), background)
    except DatasetError:
        raise
    except _FILE_ERRORS as error:
        raise _refusal(path, _reason(error, path.suffix.lower())) from None


def _refuse_special_file(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise _refusal(path, "a link to nothing")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        raise _refusal(path, "not an ordinary file")
    if status.st_size == 0:
        raise _refusal(path, "the file is empty")


def _refusal(path: Path, reason: str) -> DatasetError:
    return DatasetError(f"{path} cannot be used.", why=reason)


def _reason(error: BaseException, suffix: str) -> str:
    if isinstance(error, UnidentifiedImageError):
        if suffix in _OTHER_PICTURES:
            return f"{suffix[1:].upper()} files cannot be read here; convert it to PNG or JPEG"
        return f"damaged, or no real {suffix} file" if suffix in Image.registered_extensions() else NOT_A_PICTURE
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"larger than {MAX_PIXELS // 1_000_000} megapixels"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or str(error)
    return f"damaged: {error}" if str(error) else f"damaged ({type(error).__name__})"


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _finish(picture: Image.Image, file: BufferedReader, suffix: str, background: str) -> Picture:
    notes = _format_notes(picture, suffix)
    picture.load()
    upright = _turn_upright(picture, notes)
    profile = picture.info.get("icc_profile")
    colors, alpha = _split_alpha(upright, notes)
    image = _to_srgb(colors, profile, notes)
    if alpha is not None:
        notes.append(f"transparent: laid on {background}")
        backdrop = Image.new("RGB", image.size, _BACKGROUNDS[background])
        image = Image.composite(image, backdrop, alpha)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    image.info = {}  # the file's metadata must reach neither previews nor exports
    return Picture(image, digest, alpha is not None, tuple(notes))


def _format_notes(picture: Image.Image, suffix: str) -> list[str]:
    notes = []
    kind = picture.format or ""
    kind = _SAME_FORMAT.get(kind, kind)
    named = Image.registered_extensions().get(suffix, "")
    if _SAME_FORMAT.get(named, named) != kind:
        notes.append(f"named {suffix or 'without extension'}, but is a {kind} file")
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # an MPO is a JPEG with a second view for 3-D or a thumbnail
        notes.append(f"only the first of its {frames} frames is used")
    return notes


def _turn_upright(picture: Image.Image, notes: list[str]) -> Image.Image:
    # After load(): Pillow turns TIFF files by itself, and then drops the tag.
    try:
        turn = _TURNS.get(picture.getexif().get(_EXIF_ORIENTATION, 1))
    except _FILE_ERRORS:
        notes.append("its EXIF data is damaged and was ignored")
        return picture
    if turn is None:
        return picture
    notes.append("turned upright as its EXIF data says")
    return picture.transpose(turn)


def _split_alpha(picture: Image.Image, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    """Return the colors with 8 bits a channel, and the alpha channel where some pixel is transparent."""
    alpha: Image.Image | None = None
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        notes.append("more than 8 bits a channel: reduced to 8")
        values = np.asarray(picture)
        key = picture.info.get("transparency")
        if isinstance(key, int):
            alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        picture = Image.fromarray(_to_eight_bits(values, picture.mode))
    elif picture.mode == "LA":
        picture, alpha = picture.split()
    elif picture.has_transparency_data:
        full = picture.convert("RGBA")
        picture, alpha = full.convert("RGB"), full.getchannel("A")
    elif picture.mode in ("P", "1", "YCbCr", "HSV", "RGBX"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    opaque = alpha is None or alpha.getextrema()[0] == 255
    return picture, None if opaque else alpha


def _to_eight_bits(values: npt.NDArray[np.generic], mode: str) -> npt.NDArray[np.uint8]:
    """Return gray values of `mode` I;16…, I or F scaled to 0..255."""
    numbers = np.nan_to_num(values.astype(np.float64))
    top = float(numbers.max(initial=0.0))
    if mode.startswith("I;16"):
        full = 65535.0
    elif mode == "F":  # floats are 0..1 by custom, but scanners write other ranges
        full = 1.0 if top <= 1.0 else max(255.0, top)
    else:  # 32-bit integers mostly hold 8- or 16-bit values
        full = 255.0 if top <= 255 else 65535.0 if top <= 65535 else float(2**31 - 1)
    return np.clip(np.rint(numbers * (255.0 / full)), 0, 255).astype(np.uint8)


def _to_srgb(colors: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
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


def _apply_profile(colors: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    name = ImageCms.getProfileDescription(source).strip()
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
