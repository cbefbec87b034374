"""Opening a picture: the one place that decodes pictures, so that every user of one sees the same pixels.

The order: decode fully → 8 bits → turn upright (EXIF) → color profile to sRGB → transparency onto a background → RGB.
A file from outside may hold anything; every reason not to use it becomes a DatasetError that names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import stat
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from io import BufferedReader
from pathlib import Path

from PIL import AvifImagePlugin, Image, ImageCms, ImageFile, UnidentifiedImageError

from lorasmith.engine.dataset.colors import DEEP_NOTE, lay_on, reduce_picture, split_alpha, to_srgb
from lorasmith.engine.errors import DatasetError

DECODE_VERSION = "2"
"""Part of every cache key: to be raised whenever the same file gives other pixels than before."""
MAX_PIXELS = 200_000_000
"""Pictures with more pixels are refused: a small file can unpack to more than the machine's memory."""
MAX_FILE_BYTES = 2 << 30
"""Larger files are refused: some decoders read all of a file before they look at it."""
HALF_SIZE_PIXELS = 100_000_000
"""JPEG files with more pixels are decoded at half their size, which libjpeg does without the memory for all of them."""
NOT_A_PICTURE = "not a picture"

# Pillow warns above this and raises above twice this; pictures in between are refused here without the difference.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

# Only formats that are recognised by their first bytes and decoded inside Pillow: EPS, for one, starts Ghostscript.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "QOI")
_SAME_FORMAT = {"MPO": "JPEG", "DIB": "BMP"}
_PLUGIN_SUFFIXES = {".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF", ".jxl": "JXL"}
_PLUGIN_PACKAGES = {"HEIF": "pillow-heif", "JXL": "pillow-jxl-plugin"}
# fmt: off
_OTHER_PICTURES = frozenset((
    ".psd", ".psb", ".xcf", ".kra", ".tga", ".svg", ".eps", ".ico", ".exr", ".hdr", ".dds",
    ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2",
))
# fmt: on
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
_REASON_LENGTH = 200
# There is a picture being decoded for each core already.
_DECODE_THREADS = 1
# One huge picture needs gigabytes while it is decoded; several at once would need as many times more.
_HUGE_PIXELS = 40_000_000
_one_huge_picture = threading.Lock()

Admit = Callable[[Image.Image], None]
"""Called with the opened picture before it is decoded; what it raises comes out of the reading function."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    `image` is upright RGB in sRGB; `full_size` its width and height before `longest` reduced it. `transparent` says
    whether some pixel is; then `alpha` is the transparency (`L`, 0 where nothing shows, the size of `image`). `format`
    is Pillow's name of the file's kind, `jpeg_tables` the quantization tables of a JPEG file in rows, by their number.
    """

    image: Image.Image
    sha256: str
    transparent: bool
    notes: tuple[str, ...]
    format: str
    alpha: Image.Image | None
    full_size: tuple[int, int]
    jpeg_tables: dict[int, list[int]] | None = None


def open_image(path: Path, background: str = "white") -> Image.Image:
    """Return the picture as upright RGB in sRGB, transparency laid on `background` (white, gray, black or checker).

    Raises DatasetError whose `why` is the reason.
    """
    image = read_picture(path, background).image
    return image.copy() if isinstance(image, ImageFile.ImageFile) else image  # a copy has no tie to the file


def read_picture(
    path: Path,
    background: str = "white",
    *,
    longest: int | None = None,
    admit: Admit | None = None,
    luma: bool = False,
) -> Picture:
    """Return what `open_image` returns, with the file's hash and remarks.

    With `longest` the picture is decoded completely all the same, and then made smaller by a whole factor, so that its
    longer side keeps at least that many pixels: colors are then converted in a fraction of the time. With `luma` a
    JPEG may come out as `L`: all of its data is read and checked, and only the arithmetic that makes pixels of it is
    saved, which is half of the work. Raises DatasetError whose `why` is the reason.
    """
    with _explained(path), path.open("rb") as file:
        picture = _open(file, path.suffix.lower())
        if admit is not None:
            admit(picture)
        with _one_huge_picture if picture.width * picture.height > _HUGE_PIXELS else contextlib.nullcontext():
            notes = _format_notes(picture, path.suffix.lower())
            wish = _Wish(background, longest, luma)
            return _finish(picture, file, notes, wish, _save_work(picture, notes, wish))


def read_mask(path: Path) -> Image.Image:
    """Return a mask as upright `L` pixels, white where the picture is to be learnt; transparent parts count as black.

    Raises DatasetError whose `why` is the reason.
    """
    return read_picture(path, "black").image.convert("L")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        _refuse_special_file(path)
        yield
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
    if status.st_size > MAX_FILE_BYTES:
        raise _refusal(path, f"larger than {MAX_FILE_BYTES >> 30} GiB")


def _refusal(path: Path, reason: str) -> DatasetError:
    return DatasetError(f"{path} cannot be used.", why=reason)


def _reason(error: BaseException, suffix: str) -> str:
    if isinstance(error, UnidentifiedImageError):
        if suffix in _OTHER_PICTURES:
            return f"{suffix[1:].upper()} files cannot be read here; convert it to PNG or JPEG"
        known = suffix in Image.registered_extensions() or suffix in _PLUGIN_SUFFIXES
        return f"damaged, or no real {suffix} file" if known else NOT_A_PICTURE
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"larger than {MAX_PIXELS // 1_000_000} megapixels"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or str(error)
    text = str(error).strip().partition("\n")[0][:_REASON_LENGTH]
    # The JPEG XL plug-in says "Generic Error" and how to build it to learn more.
    return f"damaged: {text}" if text and "libjxl" not in text else f"damaged ({type(error).__name__})"


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    AvifImagePlugin.DEFAULT_MAX_THREADS = _DECODE_THREADS
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(file: BufferedReader, suffix: str) -> Image.Image:
    head = file.read(64)
    file.seek(0)
    plugin = _needed_plugin(head)
    if plugin and not _load_plugin(plugin):
        raise DatasetError(
            f"{file.name} cannot be used.",
            why=f"{suffix[1:].upper() or plugin} files need one more package: pip install {_PLUGIN_PACKAGES[plugin]}",
        )
    picture = Image.open(file, formats=(plugin,) if plugin else _known_formats())
    if picture.width * picture.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return picture


def _needed_plugin(head: bytes) -> str:
    """Return the format that a file starting with `head` has and Pillow lacks, or nothing."""
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):  # ISO/IEC 18181: bare codestream, container
        return "JXL"
    if head[4:8] == b"ftyp" and not any(brand in head[8:] for brand in (b"avif", b"avis")):
        return "HEIF" if head[8:12] in (b"mif1", b"msf1") or head[8:11] in (b"hei", b"hev") else ""
    return ""


@cache
def _load_plugin(name: str) -> bool:
    Image.init()
    try:
        if name == "HEIF":
            import pillow_heif

            pillow_heif.register_heif_opener(
                thumbnails=False, depth_images=False, aux_images=False, decode_threads=_DECODE_THREADS
            )
        else:
            from pillow_jxl import JpegXLImagePlugin  # registers itself

            JpegXLImagePlugin.DECODE_THREADS = _DECODE_THREADS
    except ImportError:
        return False
    return name in Image.OPEN


@dataclass(frozen=True)
class _Wish:
    """How a picture is to be read; see `read_picture`."""

    background: str
    longest: int | None
    luma: bool


def _finish(
    picture: Image.Image, file: BufferedReader, notes: list[str], wish: _Wish, size: tuple[int, int]
) -> Picture:
    kind = picture.format or ""
    tables = getattr(picture, "quantization", None)
    picture.load()
    turn = _turn(picture, notes)
    profile = picture.info.get("icc_profile")
    width, height = size
    factor = 1 if wish.longest is None else max(1, max(picture.size) // wish.longest)
    colors, alpha = reduce_picture(*split_alpha(picture, notes), factor)
    if turn is not None:
        colors, alpha = colors.transpose(turn), alpha and alpha.transpose(turn)
        width, height = (height, width) if turn in (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8]) else (width, height)
    image = colors if wish.luma and colors.mode == "L" and not profile else to_srgb(colors, profile, notes)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if alpha is not None:
        notes.append("partly transparent")
        image = lay_on(image.convert("RGB"), alpha, wish.background, digest)
    image.info = {}  # the file's metadata must reach neither previews nor exports
    kind = _SAME_FORMAT.get(kind, kind)
    return Picture(image, digest, alpha is not None, tuple(notes), kind, alpha, (width, height), tables)


def _format_notes(picture: Image.Image, suffix: str) -> list[str]:
    """Return remarks about the kind of file."""
    notes = []
    kind = picture.format or ""
    kind = _SAME_FORMAT.get(kind, kind)
    named = _PLUGIN_SUFFIXES.get(suffix) or Image.registered_extensions().get(suffix, "")
    if _SAME_FORMAT.get(named, named) != kind:
        notes.append(f"named {suffix or 'without extension'}, but is a {kind} file")
    # Not the number of frames: counting those of a GIF means to read all of it.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":  # an MPO's second picture is for 3-D
        notes.append("only the first of its frames is used")
    deep = any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ()))
    if picture.mode in ("RGB", "RGBA", "CMYK", "LAB") and (deep or picture.info.get("bit_depth", 8) > 8):
        notes.append(DEEP_NOTE)
    return notes


def _save_work(picture: Image.Image, notes: list[str], wish: _Wish) -> tuple[int, int]:
    """Have libjpeg decode no more of a JPEG than is needed; return the width and height that count as the picture's.

    That is half of them for a huge one.
    """
    width, height = picture.size
    if picture.format not in ("JPEG", "MPO"):
        return width, height
    huge = width * height > HALF_SIZE_PIXELS
    if huge:
        notes.append(f"over {HALF_SIZE_PIXELS // 1_000_000} megapixels: read at half its size")
        width, height = (width + 1) // 2, (height + 1) // 2
    # A color profile needs the colors; without one, their luma is a channel of the file.
    if wish.luma and wish.longest and "icc_profile" not in picture.info:
        factor = max(1, max(width, height) // wish.longest)
        picture.draft("L", (width // factor, height // factor))
    elif huge:
        picture.draft(picture.mode, (width, height))
    return width, height


def _turn(picture: Image.Image, notes: list[str]) -> Image.Transpose | None:
    # After load(): Pillow turns TIFF files by itself, and then drops the tag. JPEG XL is turned by its decoder, and its
    # EXIF orientation has no say (ISO/IEC 18181-2), except for a JPEG packed into one, which comes out as it was.
    if picture.format == "JXL" and not getattr(picture, "jpeg", False):
        return None
    try:
        turn = _TURNS.get(picture.getexif().get(_EXIF_ORIENTATION, 1))
    except _FILE_ERRORS:
        notes.append("its EXIF data is damaged and was ignored")
        return None
    if turn is not None:
        notes.append("turned upright as its EXIF data says")
    return turn
