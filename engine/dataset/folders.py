"""Walking a dataset folder: which files count, which belong to the system, and what folder names say."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from lorasmith.engine.dataset.items import Refusal

MAX_FOLDER_REPEATS = 1000
"""A larger number at the start of a folder name, such as a date, is taken as part of the name."""
# fmt: off
_SYSTEM_NAMES = frozenset((
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
    "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found",
))
# fmt: on


@dataclass
class FoundFiles:
    """What lies below a folder: files as (path, relative), what cannot be walked, and how many names are the system's.

    `relative` is the path inside the folder with `/`, printable and unique whatever bytes the names are made of.
    """

    files: list[tuple[Path, str]] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    system: int = 0


def list_files(root: Path, other: Iterable[Path], prefix: str, recursive: bool = True) -> FoundFiles:
    """Return what lies below `root` but not below `other` folders; every `relative` starts with `prefix`.

    Links to folders are followed after everything else and only once each, so that loops end. Without `recursive`,
    sub-folders are refused by name.
    """
    found = FoundFiles()
    seen = {_identity(folder) for folder in other}
    real_root = root.resolve()
    folders, links = [(root, prefix)], list[tuple[Path, str]]()
    while folders or links:
        linked = not folders
        folder, inside = folders.pop() if folders else links.pop(0)
        try:
            identity = _identity(folder)
            if identity in seen or (linked and real_root.is_relative_to(folder.resolve())):
                if linked:
                    found.refused.append(Refusal(inside.rstrip("/"), "a link to a folder that is read anyway"))
                continue
            if folder is not root and not recursive:
                found.refused.append(Refusal(inside.rstrip("/"), "a sub-folder: the dataset file reads none"))
                continue
            seen.add(identity)
            below = _list_folder(folder, inside, found)
        except OSError as error:
            reason = f"the folder cannot be read: {error.strerror or error}"
            found.refused.append(Refusal(inside.rstrip("/") or printable(folder.name), reason))
            continue
        for path, name, link in below:
            (links if link else folders).append((path, name))
    _make_unique(found)
    return found


def printable(text: str) -> str:
    r"""Return a file name or path as text that can be shown and stored: bytes that are not UTF-8 become `\xe9`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    return text


def same_name(text: str) -> str:
    """Return what names that are the same to the user have in common.

    macOS stores ü as two characters in names, other systems as one.
    """
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def named_repeats(name: str) -> tuple[int, str] | None:
    """Return repeats and class name of a folder that is named like `10_name`; None for other names."""
    match = re.match(r"([0-9]{1,9})_(.*)", name, re.DOTALL)
    if match is None or int(match[1]) > MAX_FOLDER_REPEATS:
        return None
    return int(match[1]), printable(match[2]).strip()


@lru_cache(maxsize=1024)
def folder_repeats(folder: str) -> tuple[int, str]:
    """Return repeats and class name of the nearest folder named like `10_name`: the last such part of a path with `/`.

    `folder` is the path inside the dataset, whose own name does not count. Without such a part it is (1, "").
    """
    for name in reversed(folder.split("/")):
        facts = named_repeats(name)
        if facts is not None:
            return facts
    return 1, ""


def _list_folder(folder: Path, inside: str, found: FoundFiles) -> list[tuple[Path, str, bool]]:
    """Add the files of one folder to `found` and return its sub-folders as (path, relative with `/`, is a link)."""
    below = []
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_NAMES:
            found.system += 1
            continue
        path, relative = folder / entry.name, inside + printable(entry.name)
        link = entry.is_symlink()
        if os.path.isdir(entry.path) if link else entry.is_dir():
            below.append((path, f"{relative}/", link))
        else:
            found.files.append((path, relative))
    return below


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _make_unique(found: FoundFiles) -> None:
    """Number names that became alike when they were made printable."""
    taken: set[str] = set()
    for index, (path, relative) in enumerate(found.files):
        name, number = relative, 2
        while name in taken:
            name, number = f"{relative}~{number}", number + 1
        taken.add(name)
        if name != relative:
            found.files[index] = (path, name)
