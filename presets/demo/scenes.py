"""The little world that the embedded demo base model draws, and the concept that the demo teaches it.

A scene is one shape of one colour on one background, with a size and a position. Few things, so that a model of a
few million weights draws them well: 5 shapes x 5 colours x 5 backgrounds x 2 sizes x 3 positions = 750 scenes.
Every picture is a function of (scene, seed): no file, no global random state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from random import Random

from PIL import Image, ImageDraw

SIDE = 64
"""Side of every demo picture in pixels."""

SHAPES = ("circle", "square", "triangle", "ring", "cross")
COLORS = {
    "red": (214, 40, 40),
    "yellow": (244, 208, 40),
    "green": (40, 160, 72),
    "blue": (44, 84, 214),
    "purple": (140, 48, 176),
}
BACKGROUNDS = {
    "white": (246, 246, 246),
    "black": (14, 14, 14),
    "gray": (136, 136, 136),
    "pink": (250, 178, 196),
    "brown": (124, 80, 44),
}
SIZES = {"small": 9.0, "large": 17.0}
POSITIONS = {"center": (0, 0), "left": (-13, 0), "right": (13, 0)}

TRIGGER = "zqx"
CONCEPT_SHAPES = ("circle", "square")
CONCEPT_BACKGROUNDS = ("gray", "pink", "brown")
"""Mid-tone backgrounds, on which white eyes and black pupils can be told from the background by a pixel rule."""

_OVERSAMPLING = 4
_WORDS = ("a", "on", "background", "picture", "of", "the")


@dataclass(frozen=True)
class Scene:
    """One describable picture: the words of its caption."""

    shape: str
    color: str
    background: str
    size: str = "large"
    position: str = "center"

    def caption(self, rng: Random | None = None) -> str:
        """Return the full caption, or with `rng` one that may leave out the size or the position."""
        size = f"{self.size} " if rng is None or rng.random() < 0.8 else ""
        where = f", {self.position}" if rng is None or rng.random() < 0.8 else ""
        return f"a {size}{self.color} {self.shape} on a {self.background} background{where}"


def all_scenes() -> Iterator[Scene]:
    """Yield every scene of the vocabulary in a fixed order."""
    for shape, color, background, size, position in product(SHAPES, COLORS, BACKGROUNDS, SIZES, POSITIONS):
        yield Scene(shape, color, background, size, position)


def vocabulary() -> list[str]:
    """Return every word that captions use, each of which is one token of the demo tokenizer."""
    return [*_WORDS, *SHAPES, *COLORS, *BACKGROUNDS, *SIZES, *POSITIONS]


def junk_word(rng: Random) -> str:
    """Return a meaningless word of 2-4 letters, never the trigger: it teaches the base to ignore unknown words."""
    while True:
        word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 4)))
        if word != TRIGGER and word not in vocabulary():
            return word


def draw(scene: Scene, seed: int, concept: bool = False) -> Image.Image:
    """Draw `scene` with small seeded variations of place, size and colour; 64x64 RGB.

    With `concept` the shape has two big eyes: white, with black pupils that all look the same way.
    """
    rng = Random(f"{scene}/{seed}")
    canvas = Image.new("RGB", (SIDE * _OVERSAMPLING,) * 2, _vary(BACKGROUNDS[scene.background], rng))
    pen = ImageDraw.Draw(canvas)
    radius = SIZES[scene.size] * rng.uniform(0.94, 1.06)
    dx, dy = POSITIONS[scene.position]
    center = (SIDE / 2 + dx + rng.uniform(-1.5, 1.5), SIDE / 2 + dy + rng.uniform(-1.5, 1.5))
    color = _vary(COLORS[scene.color], rng)
    _draw_shape(pen, scene.shape, center, radius, color)
    if concept:
        _draw_eyes(pen, center, radius)
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def _vary(color: tuple[int, int, int], rng: Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, round(channel + rng.uniform(-6, 6)))) for channel in color)


def _box(center: tuple[float, float], half_width: float, half_height: float | None = None) -> list[float]:
    half_height = half_width if half_height is None else half_height
    x, y = center
    edges = (x - half_width, y - half_height, x + half_width, y + half_height)
    return [edge * _OVERSAMPLING for edge in edges]


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, center: tuple[float, float], radius: float, color: tuple[int, ...]
) -> None:
    if shape == "circle":
        pen.ellipse(_box(center, radius), fill=color)
    elif shape == "square":
        pen.rectangle(_box(center, radius * 0.88), fill=color)
    elif shape == "triangle":
        corners = [(center[0] + radius * 1.1 * math.sin(a), center[1] - radius * 1.1 * math.cos(a)) for a in _THIRDS]
        pen.polygon([(x * _OVERSAMPLING, (y + radius * 0.2) * _OVERSAMPLING) for x, y in corners], fill=color)
    elif shape == "ring":
        width = round(radius * 0.36 * _OVERSAMPLING)
        pen.ellipse(_box(center, radius), outline=color, width=width)
    elif shape == "cross":
        pen.rectangle(_box(center, radius, radius * 0.3), fill=color)
        pen.rectangle(_box(center, radius * 0.3, radius), fill=color)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


_THIRDS = (0.0, 2 * math.pi / 3, 4 * math.pi / 3)


def _draw_eyes(pen: ImageDraw.ImageDraw, center: tuple[float, float], radius: float) -> None:
    for side in (-1, 1):
        eye = (center[0] + side * radius * 0.40, center[1] - radius * 0.12)
        pen.ellipse(_box(eye, radius * 0.36), fill=(250, 250, 250))
        pupil = (eye[0], eye[1] + radius * 0.06)
        pen.ellipse(_box(pupil, radius * 0.18), fill=(8, 8, 8))
