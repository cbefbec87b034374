"""ZIP archives as datasets, unpacked with limits into the cache.

An archive from outside may lie about everything: names that lead out of the folder, links, sizes, a few kilobytes that
unpack to terabytes. Whatever is not an ordinary file with an ordinary name and size is refused with its reason. What is
unpacked lies under the archive's hash, appears there in one step, and is used again by later runs.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import re
import secrets
import shutil
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorasmith.engine.dataset.items import Refusal
from lorasmith.engine.errors import DatasetError
from lorasmith.engine.storage import CHUNK_BYTES, cache_folder, free_bytes, readable_size, sha256_file, storage_error

MAX_ENTRIES = 200_000
MAX_FILE_BYTES = 2 << 30
"""Larger files would be refused as pictures anyway."""
MAX_TOTAL_BYTES = 256 << 30
MAX_RATIO = 200
"""A file that unpacks to more times its packed size is refused, once it is larger than RATIO_FREE_BYTES."""
RATIO_FREE_BYTES = 16 << 20
MAX_DIRECTORY_BYTES = 64 << 20
"""The list of entries is read into memory whole."""
_NAME_BYTES, _PATH_BYTES = 255, 1000
_CONTENTS = "contents.json"
_STALE_SECONDS = 24 * 3600
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_DRIVE = re.compile(r"[A-Za-z]:")
_UTF8_NAME, _ENCRYPTED = 0x800, 0x1
# What a damaged entry makes zipfile and the decompressors raise.
_ENTRY_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError, struct.error, KeyError,
    IndexError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class UnpackedArchive:
    """The folder with what was unpacked, and the entries that were not, by their names inside the archive."""

    folder: Path
    refused: tuple[Refusal, ...]


def is_archive(path: Path) -> bool:
    """Say whether the path is a file that is named, or begins, like a ZIP archive."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return path.suffix.lower() == ".zip" or file.read(4) in (b"PK\3\4", b"PK\5\6")
    except OSError:
        return path.suffix.lower() == ".zip"


def open_archive(path: Path) -> UnpackedArchive:
    """Unpack the archive below the cache folder, unless it is there already, and return where.

    Raises DatasetError where it is damaged or over a limit, StorageError where there is no room for what is in it.
    """
    try:
        size = path.stat().st_size
        target = cache_folder() / "archives" / sha256_file(path)
    except OSError as error:
        raise _problem(path, error.strerror or str(error)) from None
    _remove_stale(target.parent)
    known = _unpacked(target)
    if known is not None:
        return known
    try:
        _require_small_directory(path)
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _require_limits(path, size, entries)
            return _unpack(archive, entries, target)
    except (*_ENTRY_ERRORS, NotImplementedError) as error:
        raise _problem(path, f"the archive is damaged ({str(error)[:200] or type(error).__name__})") from None


def _unpack(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], target: Path) -> UnpackedArchive:
    """Unpack into a folder beside the target that takes its name when all is there."""
    reasons = [_reason(entry, _name(entry)) for entry in entries]
    needed = sum(entry.file_size for entry, reason in zip(entries, reasons, strict=True) if not reason)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        if free_bytes(target) < needed:
            raise storage_error(target, needed, "the archive holds more than that disk has room for")
        (temporary / "files").mkdir(parents=True)
        sizes: dict[str, int] = {}
        refused: list[tuple[str, str]] = []
        for entry, reason in zip(entries, reasons, strict=True):
            name = _name(entry)
            relative = "/".join(_parts(name))
            reason = reason or ("a second entry of the same name" if relative in sizes else "")
            reason = reason or _write_entry(archive, entry, temporary / "files" / relative)
            if reason:
                refused.append((name, reason))
            else:
                sizes[relative] = entry.file_size
        (temporary / _CONTENTS).write_text(json.dumps({"files": sizes, "refused": refused}), encoding="ascii")
        os.sync()  # after a power cut a file may have its size and none of its bytes
        _put_in_place(temporary, target)
    except OSError as error:
        raise storage_error(target, needed, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    unpacked = _unpacked(target)
    if unpacked is None:
        raise storage_error(target, needed, "what was unpacked is gone again")
    return unpacked


def _put_in_place(temporary: Path, target: Path) -> None:
    with contextlib.suppress(OSError):  # fails where another run was faster, or where something broken is in the way
        temporary.rename(target)
        return
    if _unpacked(target) is None:
        target.rename(temporary.with_suffix(".old.tmp"))
        shutil.rmtree(temporary.with_suffix(".old.tmp"), ignore_errors=True)
        temporary.rename(target)


def _unpacked(target: Path) -> UnpackedArchive | None:
    """Return what lies at the target, None unless all of it is there."""
    try:
        contents = json.loads((target / _CONTENTS).read_bytes())
        folder = target / "files"
        for relative, size in contents["files"].items():
            if (folder / relative).stat().st_size != size:
                return None
        return UnpackedArchive(folder, tuple(Refusal(name, reason) for name, reason in contents["refused"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _require_small_directory(path: Path) -> None:
    """Refuse an archive whose list of entries would fill the memory.

    Its length stands in the record that ends the list: APPNOTE.TXT 4.3.16, with 64 bits 4.3.14.
    """
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16) - 128))
        tail = file.read()
    for signature, offset, form in ((b"PK\5\6", 12, "<L"), (b"PK\6\6", 40, "<Q")):
        for at in _positions(tail, signature):
            field = tail[at + offset : at + offset + struct.calcsize(form)]
            size = struct.unpack(form, field)[0] if len(field) == struct.calcsize(form) else 0
            if MAX_DIRECTORY_BYTES < size < 0xFFFFFFFF or size > 0xFFFFFFFF:
                raise _problem(path, f"its list of files takes {readable_size(size)}")


def _positions(data: bytes, part: bytes) -> Iterator[int]:
    at = data.find(part)
    while at >= 0:
        yield at
        at = data.find(part, at + 1)


def _require_limits(path: Path, size: int, entries: list[zipfile.ZipInfo]) -> None:
    if len(entries) > MAX_ENTRIES:
        raise _problem(path, f"it holds {len(entries)} files, more than {MAX_ENTRIES}")
    total = sum(entry.file_size for entry in entries)
    if total > MAX_TOTAL_BYTES:
        raise _problem(path, f"it unpacks to {readable_size(total)}, more than {readable_size(MAX_TOTAL_BYTES)}")
    if sum(entry.compress_size for entry in entries) > size:
        raise _problem(path, "its files overlap, as they do in archives that are made to fill a disk")


def _reason(entry: zipfile.ZipInfo, name: str) -> str:
    """Return why an entry must not be unpacked, nothing where it may."""
    parts = _parts(name)
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if name.startswith(("/", "\\")) or _DRIVE.match(name) or ".." in parts or not parts:
        return "its name leads out of the archive"
    if _CONTROL.search(name) or (entry.orig_filename != entry.filename and "\0" in entry.orig_filename):
        return "its name holds control characters"
    if len(name.encode()) > _PATH_BYTES or max(len(part.encode()) for part in parts) > _NAME_BYTES:
        return "its name is too long"
    if kind not in (0, stat.S_IFREG):
        return "a link" if kind == stat.S_IFLNK else "not an ordinary file"
    if entry.flag_bits & _ENCRYPTED:
        return "encrypted: unpack the archive yourself"
    if entry.file_size > MAX_FILE_BYTES:
        return f"larger than {readable_size(MAX_FILE_BYTES)}"
    if entry.file_size > max(RATIO_FREE_BYTES, MAX_RATIO * entry.compress_size):
        return f"it unpacks to more than {MAX_RATIO} times its size"
    return ""


def _write_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> str:
    """Unpack one entry; return why it cannot be, with nothing left of it. Raises OSError where writing fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("xb")
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        return "a file and a folder have the same name"
    written = 0
    try:
        with file, archive.open(entry) as source:
            while chunk := source.read(CHUNK_BYTES):
                written += len(chunk)
                if written > entry.file_size:
                    raise zipfile.BadZipFile("longer than its entry says")
                file.write(chunk)
        if written < entry.file_size:
            raise zipfile.BadZipFile("shorter than its entry says")
    except NotImplementedError:
        reason = "packed in a way that cannot be read here: unpack the archive yourself"
    except (*_ENTRY_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # bz2 raises one without a number for damaged data
            raise
        reason = f"damaged in the archive ({str(error)[:200] or type(error).__name__})"
    else:
        return ""
    path.unlink(missing_ok=True)
    return reason


def _name(entry: zipfile.ZipInfo) -> str:
    """Return the entry's name; one without the mark for UTF-8 is nevertheless that where its bytes say so."""
    if entry.flag_bits & _UTF8_NAME:
        return entry.filename
    with contextlib.suppress(UnicodeError):
        return entry.filename.encode("cp437").decode("utf-8")
    return entry.filename


def _parts(name: str) -> list[str]:
    # Some Windows programs write backslashes.
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


def _remove_stale(folder: Path) -> None:
    """Remove what interrupted runs left, once no run can be at it any more."""
    with contextlib.suppress(OSError):
        for path in folder.glob(".*.tmp"):
            if path.stat().st_mtime < time.time() - _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _problem(path: Path, why: str) -> DatasetError:
    return DatasetError(
        f"The archive {path} cannot be used.",
        why=f"{why[0].upper()}{why[1:]}.",
        fix="Unpack it yourself, and choose the folder.",
    )
