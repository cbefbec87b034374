"""What is known of a dataset: its pictures, what decoding and measuring each told, and the files that are not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CaptionSource = Literal["none", "sidecar", "metadata", "overlay", "filename", "folder"]
Progress = Callable[[int, int], None]
"""Called with how many files are done and how many there are."""


@dataclass(frozen=True)
class Measures:
    """What was measured of an upright picture on white.

    `perceptual_hash` has 64 bits; near-duplicates differ in few. `sharpness` is free of size and contrast: about 1 for
    a crisp photograph, near 0 for a blurred one. `brightness` (mean) and `contrast` (standard deviation) of the luma,
    and the `border` (the share of the area that even bars at opposite edges take) are 0..1. `jpeg_quality` is 1..100,
    None for files that are no JPEG.
    """

    perceptual_hash: int
    sharpness: float
    brightness: float
    contrast: float
    border: float
    jpeg_quality: int | None = None


@dataclass(frozen=True)
class PictureFacts:
    """What a picture file's bytes and name tell, whatever the settings are; pixels count after turning upright."""

    sha256: str
    width: int
    height: int
    format: str
    transparent: bool
    notes: tuple[str, ...]
    measures: Measures


@dataclass(frozen=True)
class ImageItem:
    """An accepted picture.

    `relative` is its path inside the dataset with `/`, which is unique in the run: further datasets and regularization
    pictures start with their folder's name. `width` and `height` are pixels after turning upright. `repeats` is how
    often it is used in an epoch: the folder's `10_name` times `dataset.repeats` times the dataset's weight; 1.5 means
    once, and in half of the epochs once more. `captions` are the texts as they stand in its source, one or several of
    equal right; empty where there is none. `mask_path` is the file of its mask, `mask_sha256` that file's hash,
    `mask_share` how white it is on average, 0..1 (None: not known).
    `dataset` counts the run's datasets from 0; `class_name` is the `name` of its `10_name` folder.
    """

    path: Path
    relative: str
    sha256: str
    width: int
    height: int
    repeats: float = 1.0
    captions: tuple[str, ...] = ()
    caption_path: Path | None = None
    caption_source: CaptionSource = "none"
    regularization: bool = False
    notes: tuple[str, ...] = ()
    transparent: bool = False
    format: str = ""
    measures: Measures | None = None
    mask_path: Path | None = None
    mask_sha256: str = ""
    mask_share: float | None = None
    dataset: int = 0
    class_name: str = ""

    @property
    def caption(self) -> str | None:
        """The first caption, None where there is none."""
        return self.captions[0] if self.captions else None


@dataclass(frozen=True)
class Refusal:
    """A file that is not used, and why."""

    relative: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """What was found: len(items) + len(refused) == found.

    `found` counts everything below the folders that is not a folder: pictures, other files, broken links, captions and
    masks that belong to no accepted picture; also folders that cannot be read and links to folders that were read
    already. Not counted are the captions, caption lists and masks in use, and the `system` files: names that start with
    a dot, `Thumbs.db`, `desktop.ini`, `__MACOSX` and the like. `notes` tell of the dataset as a whole: settings that a
    Kohya file names, list entries and edits without a picture.
    """

    folder: Path
    items: tuple[ImageItem, ...]
    refused: tuple[Refusal, ...]
    found: int
    system: int = 0
    notes: tuple[str, ...] = ()
