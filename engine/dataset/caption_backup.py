"""Copies of caption files before they are replaced, and the way back.

A backup is a folder with the originals under their pictures' paths and a manifest, which is written last: without it
nothing of the dataset was changed yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from lorasmith.engine.errors import StorageError
from lorasmith.engine.storage import atomic_write, fsync_file, fsync_folder, storage_error

MANIFEST = "captions-backup.json"
_ORIGINALS = "originals"
_FORMAT = 1


@dataclass(frozen=True)
class CaptionFile:
    """A caption file to write: whose, where, what, and the bytes that it holds now (None: there is none).

    `mode` are the permissions that it has now, 0 where there is none. `relative` is the picture's path in the dataset.
    """

    relative: str
    path: Path
    data: bytes
    original: bytes | None
    mode: int = 0


@dataclass(frozen=True)
class RestoredCaptions:
    """What was put back: files with their old content, and files that were removed since there was none before.

    `kept` were changed after they had been written, and so were left alone.
    """

    restored: tuple[Path, ...]
    removed: tuple[Path, ...]
    kept: tuple[Path, ...]


def back_up(files: Sequence[CaptionFile], backup: Path) -> None:
    """Copy the originals to `backup`, which is new or empty, and sync them; then the manifest.

    Raises StorageError where that fails; then nothing of it is left, so that it can be tried again.
    """
    made = not backup.exists()
    try:
        copies = _copy_originals(files, backup)
        record = {"version": _FORMAT, "files": [_entry(file, copies.get(file.path)) for file in files]}
        atomic_write(backup / MANIFEST, json.dumps(record, indent=1).encode("ascii"))
        if made:
            fsync_folder(backup.parent)
    except (OSError, StorageError) as error:
        shutil.rmtree(backup if made else backup / _ORIGINALS, ignore_errors=True)
        with contextlib.suppress(OSError):
            (backup / MANIFEST).unlink()
        needed = sum(len(file.original or b"") for file in files)
        failure = storage_error(backup, needed, error) if isinstance(error, OSError) else error
        raise StorageError(
            f"The originals could not be copied, so no caption was written. {failure.what}",
            why=failure.why,
            fix=failure.fix,
        ) from error


def restore_captions(backup: Path, *, overwrite: bool = False) -> RestoredCaptions:
    """Put back what was replaced and remove what was made; doing so twice does no harm.

    A file that was changed since it was written is left alone, except with `overwrite`. Raises StorageError where the
    backup cannot be read or is damaged (before anything is changed), or where the disk fails.
    """
    entries = _read_manifest(backup)
    originals = [_read_original(backup, entry) for entry in entries]
    restored, removed, kept = [], [], []
    for entry, original in zip(entries, originals, strict=True):
        path = Path(entry["path"])
        with contextlib.suppress(OSError):
            _temporary(path).unlink()
        current = _read(path)
        if current == original:
            continue
        if not overwrite and current is not None and _digest(current) != entry["written"]:
            kept.append(path)
        elif original is None:
            _remove(path)
            removed.append(path)
        else:
            replace_file(path, original, entry["mode"])
            restored.append(path)
    return RestoredCaptions(tuple(restored), tuple(removed), tuple(kept))


def replace_file(path: Path, data: bytes, mode: int = 0) -> None:
    """Write a file whole or not at all, with the permissions `mode`, or those of a new file where it is 0.

    Raises StorageError naming the path, the bytes needed and the bytes free.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            _keep_rights(path, temporary, mode)
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, len(data), error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _keep_rights(path: Path, temporary: Path, mode: int) -> None:
    if not mode:
        return
    with contextlib.suppress(OSError):
        # Only the superuser can give files away, and only for the superuser does it matter.
        status = path.stat()
        os.chown(temporary, status.st_uid, status.st_gid)
    os.chmod(temporary, mode)


def _temporary(path: Path) -> Path:
    # Always the same name: what a crash leaves is replaced by the next write and removed by a restore.
    return path.with_name(f".{path.name}.lorasmith-tmp")


def _copy_originals(files: Iterable[CaptionFile], backup: Path) -> dict[Path, str]:
    """Return where inside the backup folder each original is: its picture's path with the name of the caption file."""
    (backup / _ORIGINALS).mkdir(parents=True)
    folders = {backup, backup / _ORIGINALS}
    copies: dict[Path, str] = {}
    for file in files:
        if file.original is None or file.path in copies:
            continue
        copy = _free_name(backup / _ORIGINALS / PurePosixPath(file.relative).with_name(file.path.name))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.original)
        fsync_file(copy)
        folders |= {parent for parent in copy.parents if parent.is_relative_to(backup)}
        copies[file.path] = copy.relative_to(backup).as_posix()
    for folder in sorted(folders):
        fsync_folder(folder)
    return copies


def _free_name(path: Path) -> Path:
    # Folders whose names are not UTF-8 can become alike in `relative`.
    number = 2
    free = path
    while free.exists():
        free, number = path.with_name(f"{path.name}~{number}"), number + 1
    return free


def _entry(file: CaptionFile, copy: str | None) -> dict[str, Any]:
    return {
        "picture": file.relative,
        "path": str(file.path.absolute()),
        "original": copy,
        "original_sha256": None if file.original is None else _digest(file.original),
        "mode": file.mode,
        "written": _digest(file.data),
    }


def _read_manifest(backup: Path) -> list[dict[str, Any]]:
    path = backup / MANIFEST
    try:
        record = json.loads(path.read_bytes())
        entries = [entry for entry in record["files"] if _is_entry(entry)]
        whole = record["version"] == _FORMAT and len(entries) == len(record["files"])
    except OSError as error:
        raise _unusable(backup, error.strerror or str(error)) from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise _unusable(backup, f"{path} is damaged or of another version of lorasmith")
    return entries


def _is_entry(entry: Any) -> bool:
    """Say whether a manifest's entry is one that `back_up` could have written."""
    path, original, mode = entry["path"], entry["original"], entry["mode"]
    inside = original is None or (PurePosixPath(original).parts[0] == _ORIGINALS and ".." not in Path(original).parts)
    named = isinstance(path, str) and Path(path).is_absolute()
    return named and inside and isinstance(mode, int) and isinstance(entry["written"], str)


def _read_original(backup: Path, entry: dict[str, Any]) -> bytes | None:
    if entry["original"] is None:
        return None
    copy = backup / entry["original"]
    data = _read(copy)
    if data is None or _digest(data) != entry["original_sha256"]:
        raise _unusable(backup, f"{copy} is missing or not what was copied")
    return data


def _unusable(backup: Path, why: str) -> StorageError:
    return StorageError(
        f"The captions of {backup} cannot be put back; nothing was changed.",
        why=f"{why}.",
        fix=f"Give the backup folder that was written, the one that holds {MANIFEST}.",
    )


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
        fsync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, 0, error) from error


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error(path, 0, error) from error


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()
