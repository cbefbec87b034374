"""Small datasets on the disk, and what a scan says of them: shared by the tests of layouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.examine import examine_picture
from lorasmith.engine.dataset.items import Dataset, ImageItem, PictureFacts, Progress
from lorasmith.engine.dataset.scan import scan_dataset
from lorasmith.engine.errors import DatasetError


def picture(path: Path, size: tuple[int, int] = (20, 10), color: str = "red", caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def mask(path: Path, size: tuple[int, int] = (20, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 255).save(path)
    return path


def scan(folder: Path, **values: object) -> Dataset:
    return scan_dataset(DatasetSettings.model_validate({"folder": str(folder), **values}))


def by_name(dataset: Dataset) -> dict[str, ImageItem]:
    return {item.relative: item for item in dataset.items}


def captions(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {item.relative: item.captions for item in dataset.items}


def reasons(dataset: Dataset) -> dict[str, str]:
    return {refusal.relative: refusal.reason for refusal in dataset.refused}


def examine_here(paths: Sequence[Path], on_progress: Progress | None = None) -> list[PictureFacts | str]:
    """Decode as `examine_pictures` does, but in this process: starting children is most of the time of a small scan."""
    results: list[PictureFacts | str] = []
    for path in paths:
        try:
            results.append(examine_picture(path))
        except DatasetError as error:
            results.append(error.why)
        if on_progress is not None:
            on_progress(len(results), len(paths))
    return results
