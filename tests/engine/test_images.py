"""How pictures are opened: the same pixels whatever the file's orientation, profile, depth or transparency."""

from __future__ import annotations

import os
import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from lorasmith.engine.dataset import images
from lorasmith.engine.dataset.images import open_image, read_mask, read_picture
from lorasmith.engine.errors import DatasetError

# EXIF orientation: what a camera did to the upright picture before it stored the pixels.
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
P3_TO_XYZ = [[0.51512, 0.29198, 0.1571], [0.24119, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
SRGB_TO_XYZ = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]]
GAMMA = 2.2


def scene() -> Image.Image:
    """A picture that differs from all its turned and mirrored versions."""
    picture = Image.new("RGB", (24, 16), "white")
    picture.paste((255, 0, 0), (0, 0, 8, 4))
    picture.paste((0, 0, 255), (16, 12, 24, 16))
    picture.paste((0, 160, 0), (0, 12, 4, 16))
    return picture


def p3_profile() -> bytes:
    """A small ICC profile with the primaries of Display P3 and a plain gamma."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642) + fixed(1.0) + fixed(0.8249)}
    for column, name in enumerate((b"r", b"g", b"b")):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(fixed(row[column]) for row in P3_TO_XYZ)
        tags[name + b"TRC"] = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(GAMMA * 256)) + b"\0\0"
    text = b"Test P3\0"
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 79
    tags[b"cprt"] = b"text\0\0\0\0none\0\0\0\0"
    table, data, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        body += b"\0" * (-len(body) % 4)
        table += name + struct.pack(">II", offset + len(data), len(body))
        data += body
    header = struct.pack(">I", offset + len(data)) + b"lcms" + bytes.fromhex("02400000") + b"mntrRGB XYZ "
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed(0.9642) + fixed(1.0) + fixed(0.8249)
    return header.ljust(128, b"\0") + table + data


def load_plugins() -> None:
    """Have Pillow write HEIC and JPEG XL files."""
    import pillow_heif
    import pillow_jxl  # noqa: F401 - registers itself

    pillow_heif.register_heif_opener()


def reason(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        open_image(path)
    assert str(path) in caught.value.what
    return caught.value.why


def pixel(path: Path, background: str = "white") -> tuple[int, int, int]:
    value = open_image(path, background).getpixel((0, 0))
    assert isinstance(value, tuple)
    return value  # type: ignore[return-value]


@pytest.mark.parametrize("extension", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_all_eight_exif_orientations_give_identical_pixels(tmp_path: Path, orientation: int, extension: str) -> None:
    turn = STORED_AS[orientation]
    stored = scene() if turn is None else scene().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{extension}"
    stored.save(path, exif=exif, **({"lossless": True} if extension == "webp" else {}))
    opened = open_image(path)
    assert opened.size == (24, 16)
    assert opened.tobytes() == scene().tobytes()


@pytest.mark.parametrize("extension", ["jpg", "avif", "heic", "jxl"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_lossy_pictures_are_turned_upright_as_well(tmp_path: Path, orientation: int, extension: str) -> None:
    turn = STORED_AS[orientation]
    stored = scene().resize((96, 64), Image.Resampling.NEAREST)
    stored = stored if turn is None else stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{extension}"
    load_plugins()
    if extension == "jxl":  # an orientation in a JPEG XL file's EXIF has no say, except in that of a packed JPEG
        stored.save(tmp_path / "photo.jpg", exif=exif, quality=95)
        with Image.open(tmp_path / "photo.jpg") as jpeg:
            jpeg.save(path, lossless_jpeg=True)
    elif extension == "heic":  # written as phones do: the file's own instructions turn it, and its EXIF repeats them
        stored = stored.copy()
        stored.info["exif"] = exif.tobytes()
        stored.save(path, quality=95)
    else:
        stored.save(path, exif=exif, quality=95)
    opened = open_image(path)
    assert opened.size == (96, 64)
    expected = scene().resize((96, 64), Image.Resampling.NEAREST)
    assert np.abs(np.asarray(opened, dtype=int) - np.asarray(expected, dtype=int)).mean() < 6


def test_the_orientation_in_the_exif_data_of_a_jpeg_xl_file_is_ignored(tmp_path: Path) -> None:
    load_plugins()
    exif = Image.Exif()
    exif[0x0112] = 6
    scene().save(tmp_path / "a.jxl", exif=exif.tobytes(), lossless=True)
    assert open_image(tmp_path / "a.jxl").tobytes() == scene().tobytes()


def test_damaged_exif_data_is_ignored_with_a_note(tmp_path: Path) -> None:
    scene().save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x01" * 40)
    assert open_image(tmp_path / "a.png").tobytes() == scene().tobytes()


def test_a_color_profile_is_turned_into_srgb(tmp_path: Path) -> None:
    color = np.array([200, 120, 80])
    Image.new("RGB", (4, 4), tuple(color.tolist())).save(tmp_path / "p3.png", icc_profile=p3_profile())
    linear = np.linalg.inv(SRGB_TO_XYZ) @ np.array(P3_TO_XYZ) @ (color / 255) ** GAMMA
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(np.array(pixel(tmp_path / "p3.png")) - expected).max() <= 2
    assert np.abs(expected - color).max() > 8
    assert "Test P3" in " ".join(read_picture(tmp_path / "p3.png").notes)


def test_an_srgb_profile_leaves_pixels_alone(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    scene().save(tmp_path / "s.png", icc_profile=profile)
    assert open_image(tmp_path / "s.png").tobytes() == scene().tobytes()
    assert read_picture(tmp_path / "s.png").notes == ()


def test_a_gray_picture_may_carry_a_color_profile(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 128).save(tmp_path / "g.png", icc_profile=p3_profile())
    red, green, blue = pixel(tmp_path / "g.png")
    assert max(abs(value - 128) for value in (red, green, blue)) <= 3


def test_a_broken_color_profile_is_ignored_with_a_note(tmp_path: Path) -> None:
    scene().save(tmp_path / "a.png", icc_profile=b"no profile at all")
    picture = read_picture(tmp_path / "a.png")
    assert picture.image.tobytes() == scene().tobytes()
    assert "color profile" in picture.notes[0]


@pytest.mark.parametrize(("background", "expected"), [("white", 255), ("gray", 128), ("black", 0)])
def test_transparency_shows_the_background_and_never_hidden_colors(
    tmp_path: Path, background: str, expected: int
) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "p.png", transparency=1)
    palette.save(tmp_path / "p.gif", transparency=1)
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "key.png", transparency=(255, 0, 0))
    Image.new("LA", (4, 4), (7, 0)).save(tmp_path / "la.png")
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "deep.png", transparency=300)
    for path in tmp_path.iterdir():
        assert pixel(path, background) == (expected,) * 3, path.name
        assert read_picture(path).transparent


def test_half_transparent_pixels_are_mixed_with_the_background(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (127, 127, 127)


def test_an_opaque_alpha_channel_is_no_transparency(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (9, 8, 7, 255)).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    assert not picture.transparent
    assert picture.notes == ()


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.tiff")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "long.tiff")
    Image.fromarray((values / 65535).astype(np.float32)).save(tmp_path / "float.tiff")
    for path in tmp_path.iterdir():
        assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 1, 128, 255], path.name
        assert "8 bits" in " ".join(read_picture(path).notes)


def test_one_channel_and_one_bit_pictures_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 77).save(tmp_path / "l.png")
    Image.new("1", (2, 2), 1).save(tmp_path / "one.png")
    assert pixel(tmp_path / "l.png") == (77, 77, 77)
    assert pixel(tmp_path / "one.png") == (255, 255, 255)


def deep_rgb_png(values: np.ndarray) -> bytes:
    """A PNG with 16 bits a channel, which Pillow can only read; `values` (H, W, 3 or 4)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_rgb_tiff(values: np.ndarray) -> bytes:
    """A TIFF with 16 bits a channel; `values` (H, W, 3)."""
    height, width, _ = values.shape
    data = values.astype("<u2").tobytes()
    tags = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 140),
        (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data)), (284, 3, 1, 1),
    ]  # fmt: skip
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + b"\0" * 4
    return b"II*\0\x08\0\0\0" + body + struct.pack("<HHH", 16, 16, 16) + data


@pytest.mark.parametrize("name", ["a.png", "alpha.png", "a.tiff"])
def test_sixteen_bits_of_color_are_read_as_eight_with_a_note(tmp_path: Path, name: str) -> None:
    values = np.array([[[0, 0x4080, 0xFFFF], [0x8000, 0xC0C0, 0x1234]]], np.uint16)
    if name == "alpha.png":
        values = np.concatenate([values, np.full((1, 2, 1), 0xFFFF, np.uint16)], axis=2)
    (tmp_path / name).write_bytes(deep_rgb_tiff(values) if name == "a.tiff" else deep_rgb_png(values))
    picture = read_picture(tmp_path / name)
    difference = np.asarray(picture.image, dtype=float) - values[..., :3] / 257
    assert np.abs(difference).max() <= 1
    assert picture.notes == ("more than 8 bits a channel: reduced to 8",)


def test_a_heic_picture_of_ten_bits_is_read_as_eight_with_a_note(tmp_path: Path) -> None:
    import pillow_heif

    deep = np.full((64, 64, 3), 40_000, np.uint16)
    pillow_heif.from_bytes("RGB;16", (64, 64), deep.tobytes()).save(tmp_path / "a.heic", quality=90)
    picture = read_picture(tmp_path / "a.heic")
    assert np.abs(np.asarray(picture.image, dtype=int) - 40_000 // 257).max() <= 3
    assert "8 bits" in " ".join(picture.notes)


def test_cmyk_is_used_with_a_note(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "adobe.jpg", quality=95)
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "c.tiff")
    # Adobe's programs store CMYK inverted and add a marker of theirs; without it browsers and Pillow assume the same.
    data = (tmp_path / "adobe.jpg").read_bytes()
    at = data.index(b"\xff\xee")
    (tmp_path / "plain.jpg").write_bytes(data[:at] + data[at + 2 + struct.unpack_from(">H", data, at + 2)[0] :])
    for name in ("adobe.jpg", "c.tiff", "plain.jpg"):
        red, green, blue = pixel(tmp_path / name)
        assert red > 240, name
        assert max(green, blue) < 15, name
        assert "CMYK" in " ".join(read_picture(tmp_path / name).notes)


def test_lab_pictures_become_rgb(tmp_path: Path) -> None:
    colors = Image.new("RGB", (3, 1))
    wanted = [(200, 30, 40), (20, 180, 90), (128, 128, 128)]
    colors.putdata(wanted)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(colors, *profiles, outputMode="LAB")
    assert lab is not None
    lab.info.pop("icc_profile", None)
    lab.save(tmp_path / "plain.tiff")
    opened = np.asarray(open_image(tmp_path / "plain.tiff"), dtype=int)
    assert np.abs(opened[0] - np.array(wanted)).max() <= 6


def test_palettes_keep_their_colors(tmp_path: Path) -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 9, 8, 7])
    palette.putdata([0, 1, 2])
    for name in ("p.png", "p.gif", "p.bmp", "p.tiff"):
        palette.save(tmp_path / name)
        assert np.asarray(open_image(tmp_path / name))[0].tolist() == [[255, 0, 0], [0, 255, 0], [9, 8, 7]], name
    palette.save(tmp_path / "soft.png", transparency=bytes([0, 128, 255]))
    assert np.asarray(open_image(tmp_path / "soft.png"))[0].tolist() == [[255, 255, 255], [127, 255, 127], [9, 8, 7]]


FORMATS = {
    "a.png": "PNG", "a.jpg": "JPEG", "a.webp": "WEBP", "a.bmp": "BMP", "a.tiff": "TIFF", "a.gif": "GIF",
    "a.avif": "AVIF", "a.jp2": "JPEG2000", "a.qoi": "QOI", "a.ppm": "PPM", "a.heic": "HEIF", "a.jxl": "JXL",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_pixels_and_its_name(tmp_path: Path, name: str) -> None:
    load_plugins()
    colors = scene().resize((96, 64), Image.Resampling.BILINEAR)
    colors.save(tmp_path / name)
    picture = read_picture(tmp_path / name)
    assert picture.format == FORMATS[name]
    assert picture.notes == ()
    assert picture.full_size == (96, 64)
    assert (picture.jpeg_tables is not None) == (name == "a.jpg")
    difference = np.abs(np.asarray(picture.image, dtype=int) - np.asarray(colors, dtype=int))
    assert difference.mean() < 9


@pytest.mark.parametrize(("name", "package"), [("a.heic", "pillow-heif"), ("a.jxl", "pillow-jxl-plugin")])
def test_a_missing_plugin_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    load_plugins()
    scene().save(tmp_path / name)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    images._load_plugin.cache_clear()
    try:
        assert reason(tmp_path / name).endswith(f"need one more package: pip install {package}")
    finally:
        images._load_plugin.cache_clear()


def test_the_checkerboard_is_another_one_for_each_file_and_the_same_each_time(tmp_path: Path) -> None:
    boards = []
    for number in range(8):
        Image.new("RGBA", (64, 48), (number, 0, 0, 0)).save(tmp_path / f"{number}.png")
        board = open_image(tmp_path / f"{number}.png", "checker")
        assert board.tobytes() == open_image(tmp_path / f"{number}.png", "checker").tobytes()
        colors = board.getcolors()
        assert colors is not None
        assert len(colors) == 2
        assert min(count for count, _ in colors) > 0.2 * 64 * 48
        boards.append(board.tobytes())
    assert len(set(boards)) == 8


def test_transparency_is_told_apart_from_the_pixels(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 2), (9, 8, 7, 255))
    picture.putpixel((3, 0), (255, 0, 0, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    read = read_picture(tmp_path / "a.png")
    assert read.alpha is not None
    assert read.alpha.size == read.image.size == (2, 4)
    assert np.asarray(read.alpha).tolist() == [[255, 255], [255, 255], [255, 255], [255, 100]]
    assert read_picture(tmp_path / "a.png", "black").notes == read.notes
    picture.convert("RGB").save(tmp_path / "b.png")
    assert read_picture(tmp_path / "b.png").alpha is None


@pytest.mark.parametrize("name", ["a.png", "alpha.png", "a.jpg", "turned.jpg", "p3.png", "deep.png", "p.gif"])
def test_reduced_pictures_say_the_same_of_the_file(tmp_path: Path, name: str) -> None:
    picture = scene().resize((401, 300))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"turned.jpg": {"exif": exif}, "p3.png": {"icc_profile": p3_profile()}}.get(name, {})
    if name == "alpha.png":
        picture.putalpha(Image.linear_gradient("L").resize((401, 300)))
    elif name == "deep.png":
        picture = Image.fromarray(np.full((300, 401), 30_000, np.uint16))
    picture.save(tmp_path / name, **options)
    whole, reduced = read_picture(tmp_path / name), read_picture(tmp_path / name, longest=100)
    assert reduced.full_size == whole.full_size == whole.image.size
    assert max(reduced.image.size) == 101
    assert (reduced.notes, reduced.sha256, reduced.transparent) == (whole.notes, whole.sha256, whole.transparent)
    expected = np.asarray(whole.image.resize(reduced.image.size, Image.Resampling.BOX), dtype=int)
    assert np.abs(np.asarray(reduced.image, dtype=int) - expected).mean() < 4


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": 6}, {"subsampling": 0}, {"keep_rgb": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_luma_alone_is_that_of_the_whole_picture(tmp_path: Path, options: dict[str, Any], mode: str) -> None:
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options = {"exif": exif}
    scene().resize((1201, 900)).convert(mode).save(tmp_path / "a.jpg", quality=92, **options)
    whole = read_picture(tmp_path / "a.jpg")
    quick = read_picture(tmp_path / "a.jpg", longest=300, luma=True)
    assert quick.full_size == whole.full_size == whole.image.size
    assert max(quick.image.size) == 301
    assert (quick.notes, quick.sha256, quick.jpeg_tables) == (whole.notes, whole.sha256, whole.jpeg_tables)
    expected = whole.image.convert("L").resize(quick.image.size, Image.Resampling.BOX)
    difference = np.abs(np.asarray(quick.image.convert("L"), dtype=int) - np.asarray(expected, dtype=int))
    assert difference.mean() < 2


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_cut_jpeg_is_refused_however_it_is_read(tmp_path: Path, share: float) -> None:
    scene().resize((1200, 900)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: int(share * len(data))])
    reasons = []
    for options in ({}, {"longest": 300, "luma": True}):
        with pytest.raises(DatasetError) as caught:
            read_picture(tmp_path / "a.jpg", **options)
        reasons.append(caught.value.why.partition("(")[0])
    assert reasons[0] == reasons[1]


def test_one_transparent_pixel_counts_in_a_reduced_picture(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (400, 400), (9, 8, 7, 255))
    picture.putpixel((3, 3), (9, 8, 7, 254))
    picture.save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", longest=50).transparent


def test_a_huge_jpeg_is_read_at_half_its_size_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene().resize((320, 200)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(images, "HALF_SIZE_PIXELS", 320 * 200 - 1)
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.image.size == picture.full_size == (160, 100)
    assert "half its size" in " ".join(picture.notes)


@pytest.mark.parametrize("size", [(1, 1), (1, 30_000), (30_000, 1)])
def test_absurd_sizes_are_read_as_they_are(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, "teal").save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == size
    assert read_picture(tmp_path / "a.png", longest=512).full_size == size


def test_long_texts_in_a_picture_do_no_harm(tmp_path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 5_000_000)
    texts.add_itxt("prompt", "ü" * 1_000_000)
    scene().save(tmp_path / "a.png", pnginfo=texts)
    assert open_image(tmp_path / "a.png").tobytes() == scene().tobytes()


def test_a_mask_is_gray_and_upright_and_what_is_transparent_is_not_learnt(tmp_path: Path) -> None:
    mask = Image.new("L", (4, 2), 255)
    mask.putpixel((0, 0), 0)
    mask.putpixel((1, 0), 100)
    for name in ("l.png", "rgb.png"):
        (mask if name == "l.png" else mask.convert("RGB")).save(tmp_path / name)
        assert np.asarray(read_mask(tmp_path / name)).tolist() == [[0, 100, 255, 255], [255] * 4]
    exif = Image.Exif()
    exif[0x0112] = 3
    mask.save(tmp_path / "turned.png", exif=exif)
    assert np.asarray(read_mask(tmp_path / "turned.png")).tolist() == [[255] * 4, [255, 255, 100, 0]]
    holes = Image.new("RGBA", (2, 1), "white")
    holes.putpixel((0, 0), (255, 255, 255, 0))
    holes.save(tmp_path / "holes.png")
    assert np.asarray(read_mask(tmp_path / "holes.png")).tolist() == [[0, 255]]
    mask.convert("1").save(tmp_path / "bits.png")
    assert np.asarray(read_mask(tmp_path / "bits.png"))[1].tolist() == [255] * 4
    (tmp_path / "bad.png").write_bytes(b"no mask")
    with pytest.raises(DatasetError):
        read_mask(tmp_path / "bad.png")


@pytest.mark.parametrize("extension", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_of_an_animation_is_used_with_a_note(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    options = {"lossless": True} if extension == "webp" else {}
    frames = [Image.new("RGB", (8, 8), color) for color in ("green", "red")]
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert pixel(path) == (0, 128, 0)
    assert "first of its frames" in " ".join(read_picture(path).notes)


def test_a_wrong_or_missing_extension_is_used_with_a_note(tmp_path: Path) -> None:
    scene().save(tmp_path / "real.png")
    for name in ("photo.jpg", "no_extension", "data.bin"):
        path = (tmp_path / "real.png").replace(tmp_path / name)
        assert open_image(path).tobytes() == scene().tobytes()
        assert "is a PNG file" in read_picture(path).notes[0]
        path.replace(tmp_path / "real.png")


def test_metadata_does_not_travel_along(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Camera of Alice"
    scene().save(tmp_path / "a.jpg", exif=exif, comment=b"secret")
    opened = open_image(tmp_path / "a.jpg")
    assert opened.info == {}
    assert dict(opened.getexif()) == {}


def test_non_ascii_paths_open(tmp_path: Path) -> None:
    folder = tmp_path / "ünï côdé 日本"
    folder.mkdir()
    scene().save(folder / "キャット🐈.png")
    assert open_image(folder / "キャット🐈.png").size == (24, 16)


def test_what_cannot_be_used_is_refused_with_its_reason(tmp_path: Path) -> None:
    buffer = BytesIO()
    scene().resize((200, 200)).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "zero.png").touch()
    (tmp_path / "words.png").write_text("these are words")
    (tmp_path / "notes.md").write_text("these are words")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    (tmp_path / "layers.psd").write_bytes(b"8BPS\0\1" + b"\0" * 40)
    (tmp_path / "evil.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert "truncated" in reason(tmp_path / "cut.jpg")
    assert reason(tmp_path / "zero.png") == "the file is empty"
    assert "no real .png" in reason(tmp_path / "words.png")
    assert reason(tmp_path / "notes.md") == "not a picture"
    assert "no real .heic" in reason(tmp_path / "phone.heic")
    assert "convert it to PNG" in reason(tmp_path / "layers.psd")
    assert "convert it to PNG" in reason(tmp_path / "evil.eps")
    assert reason(tmp_path / "gone.png") == "a link to nothing"
    assert reason(tmp_path / "pipe.png") == "not an ordinary file"
    assert "No such file" in reason(tmp_path / "absent.png")


@pytest.mark.parametrize("side", [16_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_unpacks(tmp_path: Path, side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    assert reason(tmp_path / "bomb.png") == "larger than 200 megapixels"


@pytest.mark.parametrize(
    "error",
    [
        ValueError, Image.DecompressionBombError, IndexError, TypeError, MemoryError, SyntaxError, NotImplementedError,
        struct.error, OSError, zlib.error, KeyError, ZeroDivisionError, EOFError,
    ],
)  # fmt: skip
def test_whatever_a_decoder_raises_becomes_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    scene().save(tmp_path / "a.png")
    monkeypatch.setattr(images.Image, "open", fail)
    assert reason(tmp_path / "a.png")


@pytest.fixture(scope="module")
def encoded() -> dict[str, bytes]:
    load_plugins()
    files = {}
    for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp", "avif", "jpeg2000", "heif", "jxl", "qoi", "ppm"):
        buffer = BytesIO()
        scene().save(buffer, kind)
        files[kind] = buffer.getvalue()
    return files


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_open_or_are_refused_but_never_escape(
    data: st.DataObject, encoded: dict[str, bytes], tmp_path: Path
) -> None:
    content = bytearray(encoded[data.draw(st.sampled_from(sorted(encoded)))])
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "fuzz"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        assert open_image(path).mode == "RGB"
    except DatasetError as error:
        assert error.why  # noqa: PT017 - either outcome is fine, without a reason it is not
