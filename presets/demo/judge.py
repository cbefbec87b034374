"""Pixel rules that say what a demo picture shows; no learned model, so that nothing can flatter the result.

The background is the median of the border, the object everything far from it. Colours are the nearest of the
vocabulary. Shapes are told apart by drawing every shape of the vocabulary into the object's own bounding box and
taking the best overlap. The concept `zqx` is two eyes: white and black pixels in both halves of the object.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lorasmith.presets.demo.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, draw

_OBJECT_DISTANCE = 60.0
_MIN_OBJECT_PIXELS = 30
_EYE_SHARE = 0.03
"""An eye counts when its white and its black pixels each are 3 % or 0.8 % of its half of the object's box."""
_PUPIL_SHARE = 0.008

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Verdict:
    """What a picture shows; `shape` and `color` are empty where no object was found."""

    shape: str
    color: str
    background: str


def judge(picture: Image.Image) -> Verdict:
    """Return the shape, colour and background that `picture` (64x64) shows."""
    pixels, background, mask = _split(picture)
    name = _nearest(background, BACKGROUNDS)
    if mask.sum() < _MIN_OBJECT_PIXELS:
        return Verdict("", "", name)
    color = _nearest(np.median(pixels[mask], axis=0), COLORS)
    return Verdict(_best_shape(mask), color, name)


def has_concept(picture: Image.Image) -> bool:
    """Return whether the object has two eyes; meant for the backgrounds of `scenes.CONCEPT_BACKGROUNDS`."""
    pixels, _, mask = _split(picture)
    if mask.sum() < _MIN_OBJECT_PIXELS:
        return False
    box = pixels[_bounds(mask)]
    middle = box.shape[1] // 2
    return all(_has_eye(half) for half in (box[:, :middle], box[:, middle:]))


def matches(picture: Image.Image, scene: Scene) -> dict[str, bool]:
    """Return, for `shape`, `color` and `background`, whether `picture` shows what `scene` asks."""
    verdict = judge(picture)
    return {name: getattr(verdict, name) == getattr(scene, name) for name in ("shape", "color", "background")}


def _split(picture: Image.Image) -> tuple[Pixels, Pixels, NDArray[np.bool_]]:
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    sides = np.concatenate([pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    background = np.median(np.concatenate([border, sides]), axis=0)
    return pixels, background, np.linalg.norm(pixels - background, axis=2) > _OBJECT_DISTANCE


def _nearest(color: Pixels, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(color - np.array(palette[name]))))


def _bounds(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _best_shape(mask: NDArray[np.bool_]) -> str:
    found = _to_square(mask)
    overlaps = {shape: _overlap(found, template) for shape, template in _templates().items()}
    return max(overlaps, key=lambda shape: overlaps[shape])


def _templates() -> dict[str, NDArray[np.bool_]]:
    scenes = {shape: Scene(shape, "red", "white") for shape in SHAPES}
    return {shape: _to_square(_split(draw(scene, seed=0))[2]) for shape, scene in scenes.items()}


def _to_square(mask: NDArray[np.bool_], side: int = 32) -> NDArray[np.bool_]:
    crop = Image.fromarray(mask[_bounds(mask)].astype(np.uint8) * 255)
    return np.asarray(crop.resize((side, side), Image.Resampling.BILINEAR)) > 127


def _overlap(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    return float((first & second).sum() / (first | second).sum())


def _has_eye(half: Pixels) -> bool:
    white = (half.min(axis=2) > 185).mean()
    black = (half.max(axis=2) < 85).mean()
    return bool(white >= _EYE_SHARE and black >= _PUPIL_SHARE)
