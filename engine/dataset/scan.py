"""Finding the pictures and captions of a dataset; every file is accounted for, and nothing is ever written there.

A picture's caption is the file beside it with the same name and the extension `.txt` or `.caption`, in any case.
Every picture is decoded completely here, so that a damaged one is known before training and not in the middle of it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.captions import read_caption
from lorasmith.engine.dataset.folders import CAPTION_SUFFIXES, caption_stem, folder_repeats, is_caption, list_files
from lorasmith.engine.dataset.images import read_picture
from lorasmith.engine.dataset.items import Dataset, ImageItem, Progress, Refusal
from lorasmith.engine.errors import DatasetError

_LISTED = 20


@dataclass(frozen=True)
class _Candidate:
    path: Path
    relative: str
    repeats: int
    captions: tuple[Path, ...]
    regularization: bool


def scan_dataset(settings: DatasetSettings, on_progress: Progress | None = None) -> Dataset:
    """Read the dataset folder and the regularization folder; `on_progress(done, total)` counts decoded files.

    Raises DatasetError where a folder is missing or empty, or holds no readable picture.
    """
    folders = require_folders(settings)
    folder = folders[0][0]
    candidates: list[_Candidate] = []
    refused: list[Refusal] = []
    captions: list[tuple[Path, str]] = []
    found = 0
    for root, regularization in folders:
        other = [path for path, _ in folders if path is not root]
        files, problems = list_files(root, other, _prefix(root, regularization))
        found += len(files) + len(problems)
        refused += [Refusal(relative, reason) for relative, reason in problems]
        captions += [entry for entry in files if is_caption(entry[0])]
        candidates += _candidates(root, files, settings.repeats, regularization)
    items: list[ImageItem] = []
    for result in _examine_all(candidates, settings.alpha_background, on_progress):
        if isinstance(result, ImageItem):
            items.append(result)
        else:
            refused.append(result)
    refused += _unused_captions(captions, candidates, items)
    items = _note_duplicates(sorted(items, key=lambda item: (item.regularization, item.relative)))
    refused.sort(key=lambda refusal: refusal.relative)
    found -= len({item.caption_path for item in items if item.caption_path is not None})
    dataset = Dataset(folder, tuple(items), tuple(refused), found)
    _require_pictures(dataset, folders)
    return dataset


def missing_captions(dataset: Dataset) -> tuple[ImageItem, ...]:
    """Return the pictures without a caption file; an empty file counts as a caption."""
    return tuple(item for item in dataset.items if item.caption is None)


def require_captions(dataset: Dataset, settings: DatasetSettings) -> Dataset:
    """Apply `dataset.missing_captions`: `exclude` moves pictures without a caption to the refused ones.

    Raises DatasetError that lists them where the user has not chosen yet, or where nothing is left.
    """
    missing = missing_captions(dataset)
    if not missing or settings.missing_captions == "trigger":
        return dataset
    if settings.missing_captions == "ask":
        raise DatasetError(
            f"{len(missing)} of {len(dataset.items)} pictures have no caption.",
            why=_listing([item.relative for item in missing]) + ".",
            fix="Write a .txt file of the same name beside each, or set dataset.missing_captions to trigger (use the "
            "trigger word alone) or exclude (leave them out).",
        )
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


def require_folders(settings: DatasetSettings) -> list[tuple[Path, bool]]:
    """Return the dataset folder and, where one is set, the regularization folder, each with whether it is the latter.

    Raises DatasetError where one is not given, does not exist or is no folder, and where both are the same.
    """
    folder = _require_folder(settings.folder, "dataset.folder")
    folders = [(folder, False)]
    if settings.regularization_folder:
        folders.append((_require_folder(settings.regularization_folder, "dataset.regularization_folder"), True))
    if len(folders) == 2 and folders[1][0].samefile(folder):
        raise DatasetError(
            "dataset.folder and dataset.regularization_folder are the same folder.",
            fix="Give the regularization pictures a folder of their own.",
        )
    return folders


def _require_folder(text: str, key: str) -> Path:
    if not text.strip():
        raise DatasetError("No dataset folder is given.", fix=f"Set {key} to the folder with the pictures.")
    folder = Path(text).expanduser()
    if not folder.exists():
        raise DatasetError(f"The folder {folder} does not exist.", fix=f"Check {key}.")
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder.", fix=f"Set {key} to the folder that holds the pictures.")
    return folder


def _require_pictures(dataset: Dataset, folders: Sequence[tuple[Path, bool]]) -> None:
    for folder, regularization in folders:
        if any(item.regularization == regularization for item in dataset.items):
            continue
        prefix = _prefix(folder, regularization)
        inside = [refusal for refusal in dataset.refused if refusal.relative.startswith(prefix)]
        if not inside:
            raise DatasetError(f"The folder {folder} is empty.", fix="Put pictures into it, or choose another folder.")
        raise DatasetError(
            f"There is no usable picture in {folder}.",
            why=_listing([f"{refusal.relative}: {refusal.reason}" for refusal in inside]) + ".",
            fix="Use PNG, JPEG, WebP, AVIF, GIF, BMP or TIFF pictures.",
        )


def _prefix(folder: Path, regularization: bool) -> str:
    return f"{folder.resolve().name}/" if regularization else ""


def _listing(lines: Sequence[str]) -> str:
    more = len(lines) - _LISTED
    return "; ".join(lines[:_LISTED]) + (f"; and {more} more" if more > 0 else "")


def _candidates(root: Path, files: Sequence[tuple[Path, str]], repeats: int, regularization: bool) -> list[_Candidate]:
    captions: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for path, _ in files:
        if is_caption(path):
            captions[caption_stem(path)].append(path)
    for paths in captions.values():
        paths.sort(key=lambda path: (CAPTION_SUFFIXES.index(path.suffix.lower()), path.name != path.name.lower()))
    return [
        _Candidate(
            path, relative, folder_repeats(root, path) * repeats, tuple(captions[caption_stem(path)]), regularization
        )
        for path, relative in files
        if not is_caption(path)
    ]


def _examine_all(
    candidates: Sequence[_Candidate], background: str, on_progress: Progress | None
) -> list[ImageItem | Refusal]:
    results: list[ImageItem | Refusal] = []
    # Threads are enough: Pillow gives up the interpreter lock while it decodes.
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="scan")
    try:
        for result in pool.map(lambda candidate: _examine(candidate, background), candidates):
            results.append(result)
            if on_progress is not None:
                on_progress(len(results), len(candidates))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _examine(candidate: _Candidate, background: str) -> ImageItem | Refusal:
    try:
        picture = read_picture(candidate.path, background)
    except DatasetError as error:
        return Refusal(candidate.relative, error.why)
    if candidate.repeats == 0:
        return Refusal(candidate.relative, "its folder's name asks for 0 repeats")
    caption, caption_path, notes = None, None, list(picture.notes)
    for path in candidate.captions:
        text, note = read_caption(path)
        if note:
            notes.append(f"caption {path.name}: {note}")
        if text is not None:
            caption, caption_path = text, path
            break
    image = picture.image
    return ImageItem(
        path=candidate.path,
        relative=candidate.relative,
        sha256=picture.sha256,
        width=image.width,
        height=image.height,
        repeats=candidate.repeats,
        captions=() if caption is None else (caption,),
        caption_path=caption_path,
        caption_source="none" if caption is None else "sidecar",
        regularization=candidate.regularization,
        notes=tuple(notes),
        transparent=picture.transparent,
    )


def _unused_captions(
    captions: Iterable[tuple[Path, str]], candidates: Iterable[_Candidate], items: Iterable[ImageItem]
) -> list[Refusal]:
    used = {item.caption_path for item in items}
    accepted = {caption_stem(item.path): item for item in items}
    known = {caption_stem(candidate.path) for candidate in candidates}
    refused = []
    for path, relative in captions:
        if path in used:
            continue
        if caption_stem(path) in accepted:
            other = accepted[caption_stem(path)].caption_path
            text, problem = read_caption(path)
            reason = f"not used as a caption: {f'{other.name} is' if other and text is not None else problem}"
        elif caption_stem(path) in known:
            reason = "caption of a picture that is refused"
        else:
            reason = "caption without a picture of the same name"
        refused.append(Refusal(relative, reason))
    return refused


def _note_duplicates(items: Sequence[ImageItem]) -> list[ImageItem]:
    first: dict[str, str] = {}
    noted = []
    for item in items:
        same = first.setdefault(item.sha256, item.relative)
        noted.append(item if same == item.relative else replace(item, notes=(*item.notes, f"same file as {same}")))
    return noted
