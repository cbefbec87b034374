"""What happens to pictures without a caption, as the user chose: nothing is decided for them in silence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.folders import named_repeats
from lorasmith.engine.dataset.items import CaptionSource, Dataset, ImageItem, Refusal
from lorasmith.engine.errors import DatasetError

MAX_LISTED = 20
_CAMERA_NAMES = re.compile(r"(img|dsc[a-z]?|pxl|dji|mvimg|vid|screenshot|image|picture|photo|untitled|download)", re.I)


def missing_captions(dataset: Dataset) -> tuple[ImageItem, ...]:
    """Return the pictures without a caption; an empty file counts as a caption."""
    return tuple(item for item in dataset.items if item.caption is None)


def require_captions(dataset: Dataset, settings: DatasetSettings) -> Dataset:
    """Apply `dataset.missing_captions`: names become captions, `exclude` moves pictures to the refused ones.

    Raises DatasetError that lists the pictures where the user has not chosen yet, where a name holds no words, or where
    nothing is left.
    """
    missing = missing_captions(dataset)
    choice = settings.missing_captions
    if not missing or choice == "trigger":
        return dataset
    if choice == "ask":
        raise DatasetError(
            f"{len(missing)} of {len(dataset.items)} pictures have no caption.",
            why=listed([item.relative for item in missing]) + ".",
            fix="Write a .txt file of the same name beside each, or set dataset.missing_captions to trigger (use the "
            "trigger word alone), filename or folder (make captions of names) or exclude (leave them out).",
        )
    return _exclude(dataset, missing) if choice == "exclude" else _name(dataset, missing, choice == "folder")


def filename_caption(name: str) -> str:
    """Return the words of a file name: "red_circle-012.png" becomes "red circle", "IMG_2041.jpg" nothing."""
    text = re.sub(r"[_\s]+", " ", PurePosixPath(name).stem).strip(" ,.-")
    # Numbers, "(2)" and "copy" at the end tell files apart and say nothing of the picture.
    text = re.sub(r"(?:[\s.-]*(?:\(\d+\)|\b\d+|(?<=[a-z])\d{2,}|- copy|\bcopy))+$", "", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\w)-(?=\w)", " ", text) if " " not in text else text
    text = text.strip(" ,.-")
    return "" if _CAMERA_NAMES.fullmatch(text) or not re.search(r"[^\W\d_]{2}", text) else text


def folder_caption(item: ImageItem, dataset: Dataset) -> str:
    """Return the class name of the picture's `10_name` folder, or the words of the folder that it lies in."""
    if item.class_name.strip():
        return _words(item.class_name)
    inside = PurePosixPath(item.relative).parent.name
    name = inside or (dataset.folder.resolve().name if dataset.folder.is_dir() else dataset.folder.stem)
    facts = named_repeats(name)
    return _words(facts[1] if facts else name)


def listed(lines: Sequence[str]) -> str:
    """Return the first lines in one sentence, and how many more there are."""
    more = len(lines) - MAX_LISTED
    return "; ".join(lines[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")


def _name(dataset: Dataset, missing: Sequence[ImageItem], by_folder: bool) -> Dataset:
    captions = {
        item.relative: folder_caption(item, dataset) if by_folder else filename_caption(item.relative)
        for item in missing
    }
    without = [name for name, caption in captions.items() if not caption]
    if without:
        place = "lie in a folder whose name" if by_folder else "have a file name that"
        raise DatasetError(
            f"{len(without)} of {len(missing)} pictures without a caption {place} holds no words.",
            why=listed(without) + ".",
            fix="Rename them, write captions, or set dataset.missing_captions to trigger or exclude.",
        )
    source: CaptionSource = "folder" if by_folder else "filename"
    items = tuple(
        replace(item, captions=(captions[item.relative],), caption_source=source) if item.caption is None else item
        for item in dataset.items
    )
    return replace(dataset, items=items)


def _exclude(dataset: Dataset, missing: Sequence[ImageItem]) -> Dataset:
    left_out = tuple(Refusal(item.relative, "it has no caption") for item in missing)
    items = tuple(item for item in dataset.items if item.caption is not None)
    if all(item.regularization for item in items):
        raise DatasetError(
            f"No picture in {dataset.folder} has a caption.",
            why="dataset.missing_captions = exclude leaves nothing to train on.",
            fix="Write captions, or set dataset.missing_captions to trigger.",
        )
    refused = tuple(sorted(dataset.refused + left_out, key=lambda refusal: refusal.relative))
    return replace(dataset, items=items, refused=refused)


def _words(name: str) -> str:
    return re.sub(r"[_\s]+", " ", name).strip()
