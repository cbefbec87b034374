"""Captions brought into the user's own files, only on request.

This is the one place that writes into a dataset. First everything that could go wrong is looked for, then each file
that will be replaced is copied (`caption_backup`); only then are files replaced, one by one, each whole or not at all.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasmith.engine.dataset.caption_backup import (
    CaptionFile,
    back_up,
    replace_file,
)
from lorasmith.engine.dataset.captions import MAX_CAPTION_BYTES
from lorasmith.engine.dataset.folders import same_name
from lorasmith.engine.dataset.items import Dataset, ImageItem
from lorasmith.engine.dataset.overlay import Edit
from lorasmith.engine.errors import DatasetError, StorageError
from lorasmith.engine.storage import cache_folder

_LISTED = 5
_CAPTION_SUFFIXES = (".txt", ".caption")
_NO_PLAIN_TEXT = (".json", ".jsonl", ".csv")
_Places = Mapping[tuple[Path, str], Path]


@dataclass(frozen=True)
class WrittenCaptions:
    """What was written: replaced and new caption files.

    `pictures` have the captions of the edits in files of their own now, `unchanged` of them had them already; `unknown`
    are in the edits and not in the dataset; all by their `relative` paths. `notes` say what else the user should know.
    """

    replaced: tuple[Path, ...]
    created: tuple[Path, ...]
    pictures: tuple[str, ...]
    unchanged: tuple[str, ...]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]
    backup: Path


def write_captions(dataset: Dataset, edits: Mapping[str, Edit], backup: Path) -> WrittenCaptions:
    """Write the captions of `edits` (by `relative` path) to the files beside their pictures, as UTF-8.

    An existing caption file keeps its name and permissions, else one with `.txt` is made. `backup` must be new or empty
    and outside the dataset; what was there before is copied to it and synced before anything is written.
    Raises DatasetError before anything is written where the dataset is an archive, a place is read-only or a caption
    cannot be stored; StorageError where the disk fails, which names what was written by then.
    """
    files = plan_writing(dataset, edits, backup)
    changing = [file for file in files if not _holds_already(file)]
    if changing:
        back_up(changing, backup)
        _write_all(changing, backup)
    known = {item.relative for item in dataset.items}
    return WrittenCaptions(
        replaced=tuple(dict.fromkeys(file.path for file in changing if file.original is not None)),
        created=tuple(dict.fromkeys(file.path for file in changing if file.original is None)),
        pictures=tuple(file.relative for file in files),
        unchanged=tuple(file.relative for file in files if _holds_already(file)),
        unknown=tuple(relative for relative in edits if relative not in known),
        notes=tuple(_notes(dataset, edits, files)),
        backup=backup,
    )


def plan_writing(dataset: Dataset, edits: Mapping[str, Edit], backup: Path) -> list[CaptionFile]:
    """Return the caption files that `write_captions` would write, those that hold their text already among them.

    Raises DatasetError where it would refuse to.
    """
    _require_own_files(dataset)
    _require_backup_place(dataset, backup)
    edited = [(item, edits[item.relative].captions) for item in dataset.items if item.relative in edits]
    places = _captions_beside({item.path.parent for item, captions in edited if captions})
    files = [_caption_file(item, captions, places) for item, captions in edited if captions]
    _require_no_sharing(dataset, files)
    _require_writable([file for file in files if not _holds_already(file)])
    return files


def _require_own_files(dataset: Dataset) -> None:
    unpacked = (cache_folder() / "archives").resolve()
    for item in dataset.items:
        if item.path.resolve().is_relative_to(unpacked):
            raise DatasetError(
                "Captions cannot be written into an archive.",
                why=f"{item.relative} was unpacked from it; the archive itself is only read.",
                fix="Unpack the archive into a folder and use that one, or keep the captions in the overlay.",
            )


def _require_backup_place(dataset: Dataset, backup: Path) -> None:
    place = backup.resolve()
    folders = {dataset.folder.resolve(), *(parent.resolve() for parent in {item.path.parent for item in dataset.items})}
    if any(place.is_relative_to(folder) for folder in folders):
        raise DatasetError(
            f"The backup folder {backup} is inside the dataset.",
            why="Its copies would be taken for captions of the dataset.",
            fix="Choose a folder outside.",
        )
    if backup.exists() and (not backup.is_dir() or any(backup.iterdir())):
        raise DatasetError(
            f"The backup folder {backup} is not empty.",
            why="What it holds could be the only copy of earlier captions.",
            fix="Choose a new folder.",
        )


def _captions_beside(folders: Iterable[Path]) -> _Places:
    """Return the caption files of some folders by the picture that they belong to, the one that is used of several."""
    found: dict[tuple[Path, str], Path] = {}
    for folder in folders:
        try:
            names = [Path(entry.path) for entry in os.scandir(folder) if not entry.is_dir()]
        except OSError as error:
            raise _cannot(folder, error.strerror or str(error)) from None
        captions = [path for path in names if path.suffix.lower() in _CAPTION_SUFFIXES]
        captions.sort(key=lambda path: (_CAPTION_SUFFIXES.index(path.suffix.lower()), path.name != path.name.lower()))
        for path in captions:
            found.setdefault(_stem(path), path)
    return found


def _caption_file(item: ImageItem, captions: Sequence[str], places: _Places) -> CaptionFile:
    """Return what to write for a picture: into the file in use, else the one beside it, else a new one."""
    path = item.caption_path
    if path is None or path.suffix.lower() in _NO_PLAIN_TEXT:
        path = places.get(_stem(item.path), item.path.with_suffix(_CAPTION_SUFFIXES[0]))
    data = _as_bytes(item, captions)
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise _cannot(path, "It is a link or no ordinary file; what it leads to may serve others")
        original = path.read_bytes()
    except FileNotFoundError:
        return CaptionFile(item.relative, path, data, None)
    except OSError as error:
        raise _cannot(path, error.strerror or str(error)) from None
    if original.endswith(b"\n") and not data.endswith(b"\n"):
        data += b"\n"
    return CaptionFile(item.relative, path, data, original, stat.S_IMODE(status.st_mode))


def _stem(path: Path) -> tuple[Path, str]:
    """Return what a picture and its caption have in common: the folder and the name without its extension."""
    return path.parent, same_name(path.stem)


def _as_bytes(item: ImageItem, captions: Sequence[str]) -> bytes:
    several = len(captions) > 1
    text = "\n".join(" ".join(caption.split()) if several else caption for caption in captions)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise _unstorable(item, "It holds half of a character, which no text file can") from None
    if b"\0" in data:
        raise _unstorable(item, "It holds a null character, which no text file does")
    if len(data) > MAX_CAPTION_BYTES:
        raise _unstorable(item, f"It is larger than {MAX_CAPTION_BYTES // 1000} kB and could not be read again")
    return data


def _holds_already(file: CaptionFile) -> bool:
    """Say whether the file holds that text already, as UTF-8 and but for spaces around it."""
    if file.original is None:
        return False
    try:
        return file.original.decode("utf-8").strip() == file.data.decode("utf-8").strip()
    except UnicodeDecodeError:
        return False


def _require_no_sharing(dataset: Dataset, files: Sequence[CaptionFile]) -> None:
    """Refuse a caption file that is also that of a picture that keeps, or gets, another caption."""
    by_path: dict[Path, CaptionFile] = {}
    for file in files:
        other = by_path.setdefault(file.path, file)
        if other.data != file.data:
            raise _shared(file.path, other.relative, file.relative)
    written = {file.relative for file in files}
    new = {_stem(file.path): file for file in files if file.original is None}
    for item in dataset.items:
        sharing = by_path.get(item.caption_path) if item.caption_path else new.get(_stem(item.path))
        if sharing is not None and item.relative not in written and not _holds_already(sharing):
            raise _shared(sharing.path, sharing.relative, item.relative)


def _require_writable(files: Sequence[CaptionFile]) -> None:
    for folder in sorted({file.path.parent for file in files}):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise _cannot(folder, "The folder is read-only")
    for file in files:
        if file.original is not None and not os.access(file.path, os.W_OK):
            raise _cannot(file.path, "The file is read-only")


def _write_all(files: Sequence[CaptionFile], backup: Path) -> None:
    for place, file in enumerate(files):
        try:
            replace_file(file.path, file.data, file.mode)
        except StorageError as error:
            written = _listing([other.relative for other in files[:place]])
            left = _listing([other.relative for other in files[place:]])
            raise StorageError(
                f"Captions were written for {place} of {len(files)} pictures, then it stopped: {error.what}",
                why=f"{error.why}. Written: {written}. Not written: {left}.",
                fix=f"{error.fix} To put the originals back: lorasmith caption restore {backup}",
            ) from error


def _notes(dataset: Dataset, edits: Mapping[str, Edit], files: Sequence[CaptionFile]) -> Iterator[str]:
    edited = [(item, edits[item.relative]) for item in dataset.items if item.relative in edits]
    own = {file.path for file in files}
    lists = [item.caption_path for item, edit in edited if edit.captions and item.caption_path not in (None, *own)]
    if lists:
        names = _listing(list(dict.fromkeys(str(path.name) for path in lists if path)))
        yield f"{len(lists)} captions also stand in {names}; the files beside the pictures count instead of it."
    several = sum(len(edit.captions or ()) > 1 for _, edit in edited)
    if several:
        yield f"{several} pictures have several captions, written one a line: set captions.lines to choose."
    bare = sum(edit.captions == () for _, edit in edited)
    if bare:
        yield f"{bare} pictures are to have no caption; their files were not removed."
    excluded = sum(edit.exclude for edit in edits.values())
    if excluded:
        yield f"{excluded} pictures are left out by the overlay alone; no picture is ever removed."


def _listing(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return (", ".join(names[:_LISTED]) or "none") + (f" and {more} more" if more > 0 else "")


def _cannot(path: Path, why: str) -> DatasetError:
    return DatasetError(
        f"No caption was written: {path} cannot be changed.",
        why=f"{why}.",
        fix="Correct that, or keep the captions in the overlay, which counts for training all the same.",
    )


def _unstorable(item: ImageItem, why: str) -> DatasetError:
    return DatasetError(
        f"No caption was written: that of {item.relative} cannot be stored.",
        why=f"{why}.",
        fix="Edit the caption; tidying captions removes such characters.",
    )


def _shared(path: Path, one: str, other: str) -> DatasetError:
    return DatasetError(
        f"No caption was written: {path} belongs to both {one} and {other}.",
        why="Pictures that differ only in their extension share one caption file.",
        fix="Rename one of the pictures, or give both the same caption.",
    )
