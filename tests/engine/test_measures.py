"""Measures of pictures: what each follows, and what it must not follow."""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from lorasmith.engine.dataset.items import Measures
from lorasmith.engine.dataset.measures import gray_copy, jpeg_quality, measure_picture, perceptual_hash


def photo(seed: int = 0, size: tuple[int, int] = (640, 480)) -> Image.Image:
    """Shapes with crisp edges of all directions and sizes over soft shading, as photographs have."""
    rng = np.random.default_rng(seed)
    shading = Image.fromarray(rng.integers(60, 200, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(shading)
    for _ in range(140):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        radius = float(rng.exponential(min(size) / 24)) + 2
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        corners = [(x + radius * np.cos(angle), y + radius * np.sin(angle)) for angle in rng.uniform(0, 6.3, 3)]
        draw.polygon(corners, fill=color)
        draw.ellipse((x - radius / 2, y - radius / 3, x, y), fill=color[::-1])
    return shading


def blurred(picture: Image.Image, radius: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(radius))


def distance(first: Image.Image, second: Image.Image) -> int:
    return (measure_picture(first).perceptual_hash ^ measure_picture(second).perceptual_hash).bit_count()


def as_jpeg(picture: Image.Image, **options: object) -> Image.Image:
    buffer = BytesIO()
    picture.save(buffer, "JPEG", **options)
    return Image.open(buffer)


@pytest.mark.parametrize("seed", range(4))
def test_crisp_pictures_have_a_sharpness_of_about_one_and_blur_lowers_it_step_by_step(seed: int) -> None:
    values = [measure_picture(blurred(photo(seed), radius)).sharpness for radius in (0, 0.7, 1, 1.5, 2, 3, 4, 6)]
    assert 0.9 < values[0] < 1.25
    assert all(more > less for more, less in pairwise(values))
    assert values[4] < 0.6
    assert values[-1] < 0.3


@pytest.mark.parametrize("scale", [0.4, 0.65, 0.8, 1.5, 2.0, 3.1])
def test_sharpness_is_free_of_size(scale: float) -> None:
    picture = photo()
    size = (round(picture.width * scale), round(picture.height * scale))
    other = measure_picture(picture.resize(size, Image.Resampling.LANCZOS)).sharpness
    assert other == pytest.approx(measure_picture(picture).sharpness, rel=0.2)


@given(contrast=st.floats(0.15, 1.0), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_sharpness_is_free_of_contrast(contrast: float, seed: int) -> None:
    picture = photo(seed, (256, 256))
    weak = ImageEnhance.Contrast(picture).enhance(contrast)
    assert measure_picture(weak).sharpness == pytest.approx(measure_picture(picture).sharpness, rel=0.12)
    assert measure_picture(weak).contrast == pytest.approx(measure_picture(picture).contrast * contrast, rel=0.1)


def test_a_sharp_subject_before_a_soft_background_is_sharp() -> None:
    picture = blurred(photo(), 8)
    picture.paste(photo().crop((200, 120, 440, 360)), (200, 120))
    found = measure_picture(picture).sharpness
    assert found > 0.55
    assert found > 2 * measure_picture(blurred(photo(), 8)).sharpness


def test_a_shake_in_one_direction_is_blur() -> None:
    picture = photo()
    frames = [np.roll(np.asarray(picture, dtype=np.float64), shift, axis=1) for shift in range(9)]
    shaken = Image.fromarray(np.mean(frames, axis=0).astype(np.uint8))
    assert measure_picture(shaken).sharpness < 0.6
    assert measure_picture(shaken.transpose(Image.Transpose.ROTATE_90)).sharpness < 0.6


def test_an_enlarged_picture_is_blurred() -> None:
    assert measure_picture(photo(size=(160, 120)).resize((1280, 960), Image.Resampling.BICUBIC)).sharpness < 0.75


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (9, 9), (3, 30_000)])
def test_tiny_and_narrow_pictures_have_measures(size: tuple[int, int]) -> None:
    found = measure_picture(Image.new("RGB", size, (51, 51, 51)))
    assert found == Measures(found.perceptual_hash, 0.0, 0.2, 0.0, 0.0)


@given(shade=st.integers(0, 255))
@settings(deadline=None)
def test_even_pictures_have_their_brightness_and_nothing_else(shade: int) -> None:
    found = measure_picture(Image.new("RGB", (40, 30), (shade,) * 3))
    assert found.brightness == pytest.approx(shade / 255, abs=1e-4)
    assert (found.contrast, found.sharpness, found.border) == (0.0, 0.0, 0.0)


def test_brightness_and_contrast_are_mean_and_deviation_of_the_luma() -> None:
    picture = Image.new("RGB", (40, 40), "black")
    picture.paste("white", (0, 0, 40, 10))
    found = measure_picture(picture)
    assert found.brightness == pytest.approx(0.25)
    assert found.contrast == pytest.approx((0.25 * 0.75) ** 0.5, abs=1e-4)
    assert measure_picture(Image.new("RGB", (9, 9), (0, 255, 0))).brightness == pytest.approx(0.587, abs=0.005)


@pytest.mark.parametrize("seed", range(12))
def test_the_hash_has_the_bits_of_imagehash(seed: int) -> None:
    gray = gray_copy(photo(seed, (60, 80)))
    assert perceptual_hash(gray) == int(str(imagehash.phash(gray)), 16)


def test_near_duplicates_differ_in_few_bits_and_other_pictures_in_many() -> None:
    picture = photo()
    near = {
        "smaller": picture.resize((200, 150)),
        "recompressed": as_jpeg(picture, quality=25),
        "brighter": ImageEnhance.Brightness(picture).enhance(1.2),
        "blurred": blurred(picture, 2),
        "cut": picture.crop((4, 3, 636, 477)),
    }
    assert {name: bits for name, other in near.items() if (bits := distance(picture, other)) > 6} == {}
    assert min(distance(picture, photo(seed)) for seed in range(1, 30)) > 10


@pytest.mark.parametrize(
    ("shade", "sides"),
    [
        (0, "letterbox"), (0, "pillarbox"), (0, "frame"), (128, "letterbox"), (128, "pillarbox"),
        (255, "letterbox"), (255, "pillarbox"), (255, "frame"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("quality", [None, 60])
def test_bars_at_opposite_edges_are_measured(shade: int, sides: str, quality: int | None) -> None:
    picture = photo()
    if sides in ("letterbox", "frame"):
        picture.paste((shade,) * 3, (0, 0, 640, 60))
        picture.paste((shade,) * 3, (0, 420, 640, 480))
    if sides in ("pillarbox", "frame"):
        picture.paste((shade,) * 3, (0, 0, 80, 480))
        picture.paste((shade,) * 3, (560, 0, 640, 480))
    expected = {"letterbox": 0.25, "pillarbox": 0.25, "frame": 1 - 0.75 * 0.75}[sides]
    measured = measure_picture(picture if quality is None else as_jpeg(picture, quality=quality))
    assert measured.border == pytest.approx(expected, abs=0.02)


def test_what_only_looks_like_bars_is_none() -> None:
    assert measure_picture(photo()).border == 0.0
    on_white = Image.new("RGB", (400, 400), "white")
    ImageDraw.Draw(on_white).ellipse((100, 100, 300, 300), fill="red")
    assert measure_picture(on_white).border == 0.0
    sky = photo()
    sky.paste((200, 220, 255), (0, 0, 640, 160))
    assert measure_picture(sky).border == 0.0, "at one edge only"
    fading = Image.linear_gradient("L").resize((400, 400)).convert("RGB")
    assert measure_picture(fading).border == 0.0


@pytest.mark.parametrize("quality", range(1, 101))
def test_the_quality_of_a_jpeg_is_read_from_its_tables(quality: int) -> None:
    tables = as_jpeg(Image.new("RGB", (8, 8)), quality=quality).quantization  # type: ignore[attr-defined]
    assert jpeg_quality(tables) == quality


def test_tables_of_other_encoders_give_the_nearest_quality() -> None:
    tables = as_jpeg(Image.new("RGB", (8, 8)), quality=80).quantization  # type: ignore[attr-defined]
    other = [max(1, round(value * (1 + 0.05 * (-1) ** index))) for index, value in enumerate(tables[0])]
    assert jpeg_quality({0: other}) == pytest.approx(80, abs=2)
    assert jpeg_quality({}) is None
    assert jpeg_quality({0: [1, 2, 3]}) is None
    assert jpeg_quality({0: [0] * 64}) == 100
