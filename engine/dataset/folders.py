"""Walking a dataset folder: which files count, which belong to the system, and what folder names say."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

CAPTION_SUFFIXES = (".txt", ".caption")
"""Extensions of captions in lower case, the preferred one first."""
MAX_FOLDER_REPEATS = 1000
"""A larger number at the start of a folder name, such as a date, is taken as part of the name."""
# fmt: off
_SYSTEM_NAMES = frozenset((
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
    "__macosx", "@eadir", "$recycle.bin", "system volume information",
))
# fmt: on


def list_files(root: Path, other: Iterable[Path], prefix: str) -> tuple[list[tuple[Path, str]], list[tuple[str, str]]]:
    """Return all files below `root` but not below `other` folders as (path, relative), and (relative, reason) refused.

    `relative` is the path inside `root` with `/`, after `prefix`. Files of the system and hidden ones are left out.

    Links to folders are followed after everything else and only once each, so that loops end.
    """
    files: list[tuple[Path, str]] = []
    refused: list[tuple[str, str]] = []
    seen = {_identity(folder) for folder in other}
    folders, links = [root], list[Path]()
    while folders or links:
        linked = not folders
        current = folders.pop() if folders else links.pop(0)
        relative = prefix + current.relative_to(root).as_posix()
        try:
            identity = _identity(current)
            if identity in seen or (linked and root.resolve().is_relative_to(current.resolve())):
                if linked:
                    refused.append((relative, "a link to a folder that is read anyway"))
                continue
            seen.add(identity)
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            refused.append((relative, f"the folder cannot be read: {error.strerror or error}"))
            continue
        for entry in entries:
            if _is_system_name(entry.name):
                continue
            path = current / entry.name
            if not os.path.isdir(path):
                files.append((path, prefix + path.relative_to(root).as_posix()))
            elif entry.is_symlink():
                links.append(path)
            else:
                folders.append(path)
    return files, refused


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_system_name(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def is_caption(path: Path) -> bool:
    """Say whether the file's name is that of a caption."""
    return path.suffix.lower() in CAPTION_SUFFIXES


def caption_stem(path: Path) -> tuple[Path, str]:
    """Return what a picture and its caption have in common: the folder and the name without its extension."""
    # macOS stores ü as two characters in names, other systems as one: both are the same name to the user.
    return path.parent, unicodedata.normalize("NFC", path.stem)


def folder_repeats(root: Path, path: Path) -> int:
    """Return the number of the nearest folder below `root` that is named like `10_name`; 1 without one."""
    for name in reversed(path.relative_to(root).parts[:-1]):
        match = re.match(r"([0-9]{1,9})_", name)
        if match and int(match[1]) <= MAX_FOLDER_REPEATS:
            return int(match[1])
    return 1
