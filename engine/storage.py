"""Writing to the disk so that a crash, a power cut or a full disk leaves either the old file or the new one.

A write counts as done when the data, and the name that leads to it, were both synced. No torch here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

import platformdirs

from lorasmith.engine.combinations import SCHEDULE_FREE
from lorasmith.engine.errors import StorageError

CHUNK_BYTES = 1 << 20

OPTIMIZER_BYTES: Mapping[str, float] = {
    "adamw": 8,
    "adamw8bit": 8,
    "paged_adamw": 8,
    "paged_adamw8bit": 8,
    "adamw_schedulefree": 8,
    "adafactor": 4,
    "lion": 4,
    "lion8bit": 4,
    "paged_lion8bit": 4,
    "prodigy": 16,
    "prodigy_schedulefree": 20,
    "dadaptation": 12,
    "came": 8,
    "ademamix": 12,
    "ademamix8bit": 12,
}
"""State bytes for each trained number; upper bounds (8-bit ones keep weights with few numbers in 32 bits).

What keeps rows and columns instead of whole weights (`adafactor`, `came`) is counted for rank 2."""

ADVICE: Mapping[int, str] = {
    errno.EMFILE: "Allow more open files with `ulimit -n 8192`, or close other programs.",
    errno.ENFILE: "Close other programs on this machine.",
    errno.EROFS: "That disk can only be read: mount it for writing, or choose a folder on another disk.",
    errno.EACCES: "Correct the permissions or the owner of that folder, or choose another one.",
    errno.EPERM: "Correct the permissions or the owner of that folder, or choose another one.",
    errno.EIO: "That disk reports errors (`dmesg` tells more): choose a folder on another disk.",
}
"""What to do about an error that is not a full disk."""

_FREE_SPACE = "Free some space on that disk."

CANNOT_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""How some network and user-space disks answer to a sync that they do not offer, of folders above all."""

EXPORT_BYTES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


def cache_folder() -> Path:
    """Return the folder of everything that can be computed again: $LORASMITH_CACHE, or the user's cache folder."""
    return Path(os.environ.get("LORASMITH_CACHE") or platformdirs.user_cache_dir("lorasmith"))


def state_folder() -> Path:
    """Return the folder of drafts, the queue and the wizard's log: $LORASMITH_STATE, or the user's state folder."""
    return Path(os.environ.get("LORASMITH_STATE") or platformdirs.user_state_dir("lorasmith"))


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut; does nothing where folders cannot be synced."""
    if hasattr(os, "O_DIRECTORY"):
        _sync(folder, os.O_DIRECTORY)


def fsync_file(path: Path) -> None:
    """Force the content of an already written file to the disk."""
    _sync(path)


def _sync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it, where they are missing, so that they survive a power cut; raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        # A folder that may be written to but not listed cannot be opened for the sync.
        with contextlib.suppress(PermissionError):
            fsync_folder(path.parent)


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` under `path` so that readers and crashes see the old content or the new, never a part.

    Permissions follow the user's umask. Raises StorageError naming the path, the bytes needed and the bytes free.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        fsync_file(temporary)
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, len(data), error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write where `path` is or would be made."""
    return shutil.disk_usage(nearest_existing(path)).free


def nearest_existing(path: Path) -> Path:
    """Return `path` or the closest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def require_writable(folder: Path, needed_bytes: int) -> None:
    """Make `folder` and prove that it takes a file and has room for `needed_bytes`.

    Raises StorageError: not a folder, not writable, or too little space (both numbers named).
    """
    try:
        make_folder(folder)
        _write_probe(folder)
    except OSError as error:
        raise StorageError(
            f"Cannot write to the output folder {folder}.",
            why=error.strerror or str(error),
            fix="Choose another run.output_folder, or correct its permissions.",
        ) from error
    free = free_bytes(folder)
    if free < needed_bytes:
        raise StorageError(
            f"Not enough disk space in {folder}: about {readable_size(needed_bytes)} are needed, "
            f"{readable_size(free)} are free.",
            why="That is what the planned checkpoints and the exported file take.",
            fix="Free some space, choose another run.output_folder, or lower checkpoints.keep.",
        )


def _write_probe(folder: Path) -> None:
    """Write a file in `folder` that is gone afterwards; where the disk can, without a name that a kill could leave."""
    name = folder / f".write-test-{secrets.token_hex(4)}"
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        os.write(descriptor, b"lorasmith")
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            name.unlink()


def storage_error(path: Path, needed_bytes: int, error: OSError | str) -> StorageError:
    """Return the StorageError for a failed write, with the path and the needed and free bytes."""
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else error
    try:
        free = free_bytes(path)
    except OSError:
        free = -1
    space = f"{needed_bytes} bytes needed, {free if free >= 0 else 'unknown'} bytes free"
    advice = ADVICE.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    full = is_disk_full(error) or (not advice and 0 <= free < needed_bytes)
    return StorageError(
        f"The disk is full: cannot write {path} ({space})." if full else f"Cannot write {path} ({space}).",
        why=reason,
        fix=_FREE_SPACE if full else advice or "Check that the folder exists and may be written to.",
    )


def read_error(path: Path, error: OSError) -> StorageError:
    """Return the StorageError for a failed read of `path`."""
    advice = ADVICE.get(error.errno or 0, "Check that its disk is there; then try again.")
    return StorageError(f"Cannot read {path}.", why=error.strerror or str(error), fix=advice)


def is_disk_full(error: OSError | str) -> bool:
    """Tell whether a write failed because the disk or the user's quota is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left" in error or "os error 28" in error or "quota exceeded" in error.lower()


def checkpoint_bytes(num_parameters: int, optimizer: str, *, averaged: bool = False, starts: bool = False) -> int:
    """Return how large one checkpoint of `num_parameters` trained numbers becomes at most.

    `averaged` where the run keeps a running average of them as well (`train.ema_decay`); schedule-free optimizers
    always do. `starts` where it keeps what they began with (`adapter.init` from the base's weights).
    """
    averaged = averaged or optimizer in SCHEDULE_FREE
    return int(num_parameters * (4 * (1 + averaged) * (1 + starts) + OPTIMIZER_BYTES[optimizer])) + 1_000_000


def readable_size(num_bytes: float) -> str:
    """Return a size for people, such as `1.4 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
