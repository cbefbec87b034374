"""A folder of some hundred hostile and odd files, the same each time: what a scan must survive.

    python -m tests.hostile FOLDER

Every kind of picture cut off and changed at many places, files that unpack to gigabytes, names and links that break
programs, captions in every encoding, and things that are no files at all.
"""

from __future__ import annotations

import gzip
import os
import random
import socket
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

CUTS = (0.02, 0.1, 0.3, 0.6, 0.9, 0.999)
FLIPS = 9


def build_hostile_folder(folder: Path) -> int:
    """Fill the new folder, which then holds more good pictures than one; return how many files it holds."""
    folder.mkdir(parents=True)
    rng = random.Random(7)
    for name, data in encoded().items():
        _write(folder / "whole" / name, data)
        _damage(folder, name, data, rng)
    for build in (_odd_pngs, _bombs, _odd_jpegs, _odd_tiffs, _odd_gifs, _wrong_names, _odd_sizes):
        for name, data in build():
            _write(folder / build.__name__.strip("_") / name, data)
    for number in range(12):
        _write(folder / "noise" / f"{number}.{('png', 'jpg', 'webp')[number % 3]}", rng.randbytes(1 + number * 997))
    _captions(folder / "captions")
    _odd_names(folder / "names")
    _no_files(folder / "special")
    _system_files(folder)
    return sum(1 for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def scene(size: tuple[int, int] = (96, 64), mode: str = "RGB") -> Image.Image:
    """Return a picture with detail."""
    rng = np.random.default_rng(size[0])
    small = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded() -> dict[str, bytes]:
    """Return a small whole file of each kind that can be written here, by name."""
    frames = [scene((96, 64)), scene((96, 64)).transpose(Image.Transpose.ROTATE_180)]
    kinds: dict[str, tuple[str, dict[str, object]]] = {
        "plain.png": ("PNG", {}), "palette.png": ("PNG", {}), "alpha.png": ("PNG", {}), "plain.jpg": ("JPEG", {}),
        "progressive.jpg": ("JPEG", {"progressive": True}), "cmyk.jpg": ("JPEG", {}), "plain.webp": ("WEBP", {}),
        "animated.webp": ("WEBP", {"save_all": True, "append_images": frames}), "plain.bmp": ("BMP", {}),
        "animated.gif": ("GIF", {"save_all": True, "append_images": frames}), "plain.tiff": ("TIFF", {}),
        "lzw.tiff": ("TIFF", {"compression": "tiff_lzw"}), "jpeg.tiff": ("TIFF", {"compression": "jpeg"}),
        "plain.avif": ("AVIF", {"speed": 10}), "plain.jp2": ("JPEG2000", {}), "plain.ppm": ("PPM", {}),
        "plain.qoi": ("QOI", {}), "animated.png": ("PNG", {"save_all": True, "append_images": frames}),
    }  # fmt: skip
    modes = {"palette.png": "P", "alpha.png": "RGBA", "cmyk.jpg": "CMYK", "animated.gif": "P"}
    files = {}
    for name, (kind, options) in kinds.items():
        files[name] = _saved(scene(mode=modes.get(name, "RGB")), kind, **options)
    for name, module, kind in (("plain.heic", "pillow_heif", "HEIF"), ("plain.jxl", "pillow_jxl", "JXL")):
        try:
            plugin = __import__(module)
        except ImportError:
            continue
        if kind == "HEIF":
            plugin.register_heif_opener()
        files[name] = _saved(scene(), kind)
    return files


def _saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _damage(folder: Path, name: str, data: bytes, rng: random.Random) -> None:
    stem, _, suffix = name.rpartition(".")
    for cut in CUTS:
        _write(folder / "cut" / f"{stem}-{cut}.{suffix}", data[: max(1, int(len(data) * cut))])
    for number in range(FLIPS):
        changed = bytearray(data)
        # A third of the changes hit the header, where sizes and offsets are.
        end = min(len(data), 64) if number % 3 == 0 else len(data)
        for _ in range(1 + number):
            changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
        _write(folder / "flipped" / f"{stem}-{number}.{suffix}", bytes(changed))


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, color: int = 2) -> bytes:
    """Return a PNG file with this header and these chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def _zeros(num_bytes: int) -> bytes:
    """Return zeros packed as zlib does, made of one packed megabyte again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compressobj(9, zlib.DEFLATED, -15)
    end = rest.compress(bytes(num_bytes & ((1 << 20) - 1))) + rest.flush()
    checksum = (num_bytes % 65521 << 16) | 1  # Adler-32 of zeros
    return b"\x78\x9c" + block * (num_bytes >> 20) + end + struct.pack(">I", checksum)


def _odd_pngs() -> Iterator[tuple[str, bytes]]:
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + b"\x40\x80\xc0" * 8) * 8))
    megabytes = _zeros(80 << 20)
    yield "no-pixels.png", png(8, 8)
    yield "wrong-checksum.png", png(8, 8, pixels)[:-20] + b"\0" * 20
    yield "chunk-that-never-ends.png", png(8, 8, struct.pack(">I", 0x7FFFFFFF) + b"IDAT" + b"x")
    yield "text-bomb.png", png(8, 8, chunk(b"zTXt", b"a\0\0" + megabytes), pixels)
    yield "texts.png", png(8, 8, *[chunk(b"tEXt", b"a\0" + b"x" * 900_000)] * 90, pixels)
    yield "profile-bomb.png", png(8, 8, chunk(b"iCCP", b"a\0\0" + megabytes), pixels)
    yield "no-profile.png", png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(b"nonsense" * 99)), pixels)
    yield "frames.png", png(8, 8, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), pixels)
    yield "zero-width.png", png(0, 8, pixels)
    yield "most-pixels.png", png(2**31 - 1, 2**31 - 1, pixels)
    yield "depth-3.png", png(8, 8, pixels, depth=3)
    yield "palette-missing.png", png(8, 8, pixels, color=3)
    yield (
        "exif-loop.png",
        png(8, 8, chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x87i\0\4\0\0\0\1\0\0\0\x08\0\0\0\x08"), pixels),
    )
    wrong = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    yield "lab-profile.png", _saved(scene(), "PNG", icc_profile=wrong)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("prompt", "x" * 3_000_000)
    yield "workflow.png", _saved(scene(), "PNG", pnginfo=texts)


def _bombs() -> Iterator[tuple[str, bytes]]:
    yield "gray-169-megapixels.png", png(13_000, 13_000, chunk(b"IDAT", _zeros(13_000 * 13_001)), color=0)
    yield "color-196-megapixels.png", png(14_000, 14_000, chunk(b"IDAT", _zeros(14_000 * 42_001)))
    yield "deep-90-megapixels.png", png(9_500, 9_500, chunk(b"IDAT", _zeros(9_500 * 76_001)), depth=16, color=6)
    yield "palette-25-megapixels.gif", _saved(Image.new("P", (5_000, 5_000)), "GIF")
    yield "progressive-36-megapixels.jpg", _saved(Image.new("RGB", (6_000, 6_000)), "JPEG", progressive=True)
    yield "alpha-16-megapixels.webp", _saved(Image.new("RGBA", (4_000, 4_000), (9, 9, 9, 9)), "WEBP", method=0)
    yield "declared.gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + b"\0" * 6 + b",\0\0\0\0;"
    yield "declared.bmp", b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6)
    yield "declared.qoi", b"qoif" + struct.pack(">IIBB", 2**32 - 1, 2**32 - 1, 4, 0) + b"\0" * 50
    yield "declared.ppm", b"P6 4000000000 4000000000 255\n" + b"\0" * 99
    yield "declared.webp", b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6 + b"\0" * 40
    yield "bomb.svgz", gzip.compress(bytes(1 << 20))


def _odd_jpegs() -> Iterator[tuple[str, bytes]]:
    data = _saved(scene(), "JPEG")
    size = data.index(b"\xff\xc0") + 5
    yield "declared-65535.jpg", data[:size] + b"\xff\xff\xff\xff" + data[size + 4 :]
    yield "declared-0.jpg", data[:size] + b"\0\0\0\0" + data[size + 4 :]
    yield "comments.jpg", data[:2] + (b"\xff\xfe\xff\xff" + b"x" * 65533) * 40 + data[2:]
    yield "exif-nonsense.jpg", data[:2] + b"\xff\xe1\x01\x02Exif\0\0" + b"\xff" * 250 + data[2:]
    yield "tables-twice.jpg", data[:20] + data[20:] + data[2:]
    yield "marker-storm.jpg", data[:2] + b"\xff" * 500_000 + data[2:]
    yield "restart.jpg", data[:-2] + b"\xff\xd0\xff\xd1" * 5000 + b"\xff\xd9"
    yield "only-start.jpg", b"\xff\xd8\xff\xe0"


def _odd_tiffs() -> Iterator[tuple[str, bytes]]:
    def tiff(*tags: tuple[int, int, int, int], following: int = 0, rest: bytes = b"") -> bytes:
        body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
        return b"II*\0\x08\0\0\0" + body + struct.pack("<I", following) + rest

    size = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    strip = [(273, 4, 1, 150), (278, 3, 1, 8), (279, 4, 1, 64)]
    yield "loop.tiff", tiff(*size, *strip, following=8, rest=b"\x80" * 200)
    yield "huge-tag.tiff", tiff(*size, *strip, (700, 1, 2**32 - 1, 8), rest=b"\x80" * 200)
    yield "huge-size.tiff", tiff((256, 4, 1, 2**31), (257, 4, 1, 2**31), *size[2:], *strip, rest=b"\x80" * 200)
    yield "huge-strip.tiff", tiff(*size, strip[0], strip[1], (279, 4, 1, 2**32 - 1), rest=b"\x80" * 200)
    yield "no-strip.tiff", tiff(*size)
    yield "many-tags.tiff", tiff(*size, *strip, *[(40_000 + n, 4, 1, n) for n in range(20_000)], rest=b"\x80" * 200)
    yield "nothing.tiff", b"II*\0\xff\xff\xff\xff"
    yield "float.tiff", _saved(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF")
    yield "big.tiff", b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**63) + b"\0" * 50
    yield "cmyk.tiff", _saved(scene(mode="CMYK"), "TIFF")
    yield "lab.tiff", _saved(scene(mode="LAB"), "TIFF")
    yield "fax.tiff", _saved(scene(mode="1"), "TIFF", compression="group4")


def _odd_gifs() -> Iterator[tuple[str, bytes]]:
    head = b"GIF89a" + struct.pack("<HH", 4, 4) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\4\4\1\0\0\0" + b",\0\0\0\0" + struct.pack("<HH", 4, 4) + b"\0\2\3\x84\x51\0\0"
    yield "thousand-frames.gif", head + frame * 5000 + b";"
    yield "no-frame.gif", head + b";"
    yield "comment-storm.gif", head + (b"\x21\xfe\xff" + b"c" * 255) * 4000 + b"\0" + frame + b";"
    yield "frame-outside.gif", head + frame.replace(b",\0\0\0\0", b",\xff\xff\xff\xff") + b";"
    yield "bad-code.gif", head + frame.replace(b"\2\3\x84\x51", b"\2\3\xff\xff") + b";"


def _wrong_names() -> Iterator[tuple[str, bytes]]:
    files = encoded()
    names = {"jpeg.png": "plain.jpg", "png.jpg": "plain.png", "webp.gif": "plain.webp", "gif.tiff": "animated.gif",
             "no_extension": "plain.png", "picture.txt.png": "plain.jpg", "picture.mp4": "plain.bmp",
             "picture.docx": "plain.png", "avif.heic": "plain.avif", "two.dots.JPG": "plain.jpg"}  # fmt: skip
    for name, source in names.items():
        yield name, files[source]
    for suffix in ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tiff", "avif", "heic", "jxl", "jp2", "qoi", "ppm"):
        yield f"empty.{suffix}", b""
    for suffix in ("png", "heic", "jxl", "psd", "svg", "eps", "dng", "tga", "html", "mp4", "safetensors", "exe", "py"):
        yield f"words.{suffix}", b"%!PS-Adobe-3.0 EPSF-3.0\n<svg xmlns='http://www.w3.org/2000/svg'/> these are words\n"
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("inside.png", files["plain.png"])
    yield "nested.zip", packed.getvalue()
    yield "both.png", files["plain.png"] + packed.getvalue()
    yield "page.gif", b"GIF89a/*" + b"\0" * 4 + b"*/=1;alert(1)//" + b"\0" * 30


def _odd_sizes() -> Iterator[tuple[str, bytes]]:
    for width, height in ((1, 1), (1, 30_000), (30_000, 1), (2, 2), (65_500, 2), (7, 11)):
        yield f"{width}x{height}.png", _saved(Image.new("RGB", (width, height), "teal"), "PNG")
        yield f"{width}x{height}.jpg", _saved(Image.new("RGB", (width, height), "teal"), "JPEG")


def _captions(folder: Path) -> None:
    texts = {
        "utf8": "a café".encode(), "bom": "\ufeffa dog".encode(), "utf16": "a dog".encode("utf-16"),
        "cp1252": "a “dog”".encode("cp1252"), "binary": bytes(range(256)), "empty": b"", "blank": b" \n\t\n",
        "long": b"dog, " * 50_000, "lines": b"a dog\r\nanother\r\n\r\n", "escape": b"a \x1b[2Jdog \x07",
        "huge": b"x" * 3_000_000, "marks": "\u202ea dog\u200b".encode(),
    }  # fmt: skip
    for number, (name, text) in enumerate(texts.items()):
        _write(folder / f"{name}.png", _saved(scene((96 + number, 64)), "PNG"))
        _write(folder / f"{name}.txt", text)
    _write(folder / "lonely.txt", b"a caption without a picture")
    _write(folder / "metadata.jsonl", b'{"file_name": "../../etc/passwd", "text": "x"}\nnot json\n{"file_name": 3}\n')
    _write(folder / "captions.csv", b'file,caption\n"unclosed,\n\0\0')


def _odd_names(folder: Path) -> None:
    data = _saved(scene((40, 40)), "PNG")
    names = [
        "ünï côdé 日本.png", "キャット🐈.png", os.fsdecode(b"latin-\xe9.png"), os.fsdecode(b"\xff\xfe.png"),
        "new\nline.png", "esc\x1b[31mred\x1b]0;title\x07.png", "\u202egnp.exe.png", " space .png",
        "-rf.png", "$(reboot).png", "a;b|c&d.png",
        "quote\"'.png", "*.png", "~.png", "CON.png", "n" * 250 + ".png", "%s%n.png", "[markup].png", "back\\slash.png",
    ]  # fmt: skip
    for number, name in enumerate(names):
        _write(folder / name, data + bytes([number]))
    deep = folder.joinpath(*["d" * 20] * 40)
    _write(deep / "deep.png", data + b"deep")


def _no_files(folder: Path) -> None:
    data = _saved(scene((50, 40)), "PNG")
    _write(folder / "real.png", data)
    (folder / "empty folder").mkdir()
    makers: dict[str, Callable[[Path], object]] = {
        "link-to-nothing.png": lambda path: path.symlink_to("nothing"),
        "link-to-itself.png": lambda path: path.symlink_to(path.name),
        "link.png": lambda path: path.symlink_to("real.png"),
        "link-to-device.png": lambda path: path.symlink_to("/dev/zero"),
        "link-to-folder": lambda path: path.symlink_to("."),
        "link-up": lambda path: path.symlink_to("../.."),
        "pipe.png": os.mkfifo,
        "hard.png": lambda path: path.hardlink_to(folder / "real.png"),
    }
    for name, make in makers.items():
        make(folder / name)
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket may have 108 bytes
        try:
            server.bind("socket.png")
        finally:
            os.chdir(here)
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(3 << 30)
    with (folder / "sparse.webp").open("wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8L")
        file.truncate(1900 << 20)
    _write(folder / "secret.png", data)
    (folder / "secret.png").chmod(0)


def _system_files(folder: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._plain.png", ".hidden/a.png", "__MACOSX/a.png"):
        _write(folder / name, b"system")


if __name__ == "__main__":
    print(build_hostile_folder(Path(sys.argv[1])))
