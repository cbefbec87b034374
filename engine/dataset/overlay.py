"""Edited captions and left-out pictures, beside the dataset and not in it.

An overlay is a file of JSON lines, one an edit: `{"file": "10_cat/a.png", "captions": ["a cat"], "by": "person"}` or
`{"file": "b.png", "exclude": true, "by": "person"}`. Later lines count; lines are only ever added, so that a crash
costs at most the edit that was being written. `file` is a picture's `relative` path.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.engine.errors import DatasetError
from lorasmith.engine.storage import fsync_folder, storage_error

PERSON = "person"
"""The author of what a person wrote; captioners have their own names, and never write over a person's text."""


@dataclass(frozen=True)
class Edit:
    """What counts for one picture instead of its files: `captions` None leaves those of the dataset."""

    captions: tuple[str, ...] | None = None
    exclude: bool = False
    by: str = PERSON


def default_overlay(folder: Path) -> Path:
    """Return where the edits of a dataset go by default: `NAME.captions.jsonl` in the current folder.

    Where the current folder belongs to the dataset, which is only read, it is beside the dataset instead.
    """
    dataset = folder.resolve()
    name = f"{dataset.name or 'dataset'}.captions.jsonl"
    return dataset.parent / name if Path.cwd().resolve().is_relative_to(dataset) else Path(name)


def read_overlay(path: Path) -> dict[str, Edit]:
    """Return the newest edit of each picture by its `relative` path; nothing where there is no file.

    A torn last line, as a crash leaves it, is passed over. Raises DatasetError naming the line of anything else.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _problem(path, error.strerror or str(error)) from None
    edits: dict[str, Edit] = {}
    *lines, torn = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            file, edit = _parse(path, number, line)
            edits[file] = edit
    if torn.strip():
        try:
            file, edit = _parse(path, len(lines) + 1, torn)
        except DatasetError:
            return edits
        edits[file] = edit
    return edits


def append_edits(path: Path, edits: Mapping[str, Edit]) -> None:
    """Add edits by `relative` path and sync them to the disk; raises StorageError where that fails."""
    text = "".join(_line(file, edit) for file, edit in edits.items())
    data = text.encode("ascii")
    try:
        new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not new:
            _drop_torn_line(path)
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if new:
            fsync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, len(data), error) from error


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a crash left unfinished; one that a person's editor left without its end gets it."""
    data = path.read_bytes()
    torn = data.rpartition(b"\n")[2]
    if not torn:
        return
    with path.open("r+b") as file:
        try:
            _parse(path, 0, torn)
        except DatasetError:
            file.truncate(len(data) - len(torn))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def _line(file: str, edit: Edit) -> str:
    record: dict[str, Any] = {"file": file, "by": edit.by}
    if edit.captions is not None:
        record["captions"] = list(edit.captions)
    if edit.exclude:
        record["exclude"] = True
    return json.dumps(record, ensure_ascii=True) + "\n"


def _parse(path: Path, number: int, line: bytes) -> tuple[str, Edit]:
    try:
        record = json.loads(line)
        file, captions = record["file"], record.get("captions")
        exclude, by = record.get("exclude", False), record.get("by", PERSON)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _problem(path, f'line {number} is no edit like {{"file": "a.png", "captions": ["a cat"]}}') from None
    texts = captions is None or (isinstance(captions, list) and all(isinstance(text, str) for text in captions))
    if not (isinstance(file, str) and texts and isinstance(exclude, bool) and isinstance(by, str)):
        raise _problem(path, f"line {number} has a value of the wrong kind")
    return file, Edit(None if captions is None else tuple(captions), exclude, by)


def _problem(path: Path, why: str) -> DatasetError:
    return DatasetError(
        f"The edited captions in {path} cannot be read.",
        why=f"{why[0].upper()}{why[1:]}.",
        fix="Correct the file, or set dataset.overlay to another one.",
    )
