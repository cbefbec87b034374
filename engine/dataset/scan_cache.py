"""What earlier scans found out, kept by content, so that an unchanged folder is not decoded, nor even read, again.

As git's index does, a second table remembers the size, times and number of each file: while they stay, so does its
content. A file that was changed so shortly before it was looked at that a second change might carry the same time is
not trusted (git's documentation calls this the racy problem). A file that is new under its path, but has the size of a
known content, is read and compared by its hash: a moved or touched dataset costs no decoding either.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import stat
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import PIL

from lorasmith.engine.dataset.examine import facts_from_json, facts_to_json
from lorasmith.engine.dataset.images import DECODE_VERSION
from lorasmith.engine.dataset.items import PictureFacts
from lorasmith.engine.dataset.measures import MEASURES_VERSION
from lorasmith.engine.storage import cache_folder

RACY_NANOSECONDS = 3_000_000_000
"""File systems keep times with a step of up to 2 s; a file younger than this when it is looked at is not trusted."""
MAX_BYTES = 256 << 20
"""A larger file of old facts is thrown away: about half a million pictures."""
_TABLES = """
    CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, status TEXT NOT NULL, result TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS contents (key TEXT PRIMARY KEY, size INTEGER NOT NULL, result TEXT NOT NULL);
    CREATE INDEX IF NOT EXISTS contents_by_size ON contents (size);
"""
_LOCK_SECONDS = 1.0


class ScanCache:
    """The facts that are known of the files in question; use it as a context, which writes what was remembered.

    Trouble with its file never stops a scan: a damaged one is made anew, and where none can be written everything is
    worked out each time.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Keep the facts in `folder`, or below `cache_folder()`."""
        self.path = (folder or cache_folder() / "scan") / "facts.sqlite"
        self._database: sqlite3.Connection | None = None
        self._paths: Sequence[Path] = ()
        self._statuses: list[os.stat_result | None] = []
        self._looked_at = 0
        self._results: list[tuple[int, PictureFacts | str]] = []

    def __enter__(self) -> Self:
        """Open the file, or make a new one where it is damaged or too large."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.stat().st_size > MAX_BYTES:
                self._forget_all()
            try:
                self._database = self._open()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):  # locked, or no place to write: not damaged
                    raise
                self._forget_all()
                self._database = self._open()
        except (OSError, sqlite3.Error):
            self._database = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what was remembered, also after an error or Ctrl-C, and close the file."""
        if self._database is None:
            return
        try:
            with contextlib.suppress(OSError, sqlite3.Error):
                self._write()
        finally:
            self._database.close()
            self._database = None

    def look_up(self, paths: Sequence[Path]) -> list[PictureFacts | str | None]:
        """Return what is known of each file; None where it must be examined. Reads only files that moved."""
        self._paths = [Path(os.path.abspath(path)) for path in paths]
        self._looked_at = time.time_ns()
        self._statuses = [_status(path) for path in self._paths]
        try:
            return [self._known(index) for index in range(len(paths))]
        except sqlite3.DatabaseError:
            self._drop()
            return [None] * len(paths)

    def remember(self, index: int, result: PictureFacts | str) -> None:
        """Note what was found out of the file at `index` of the paths that were looked up."""
        self._results.append((index, result))

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=_LOCK_SECONDS)
        try:
            database.executescript(_TABLES)
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version != _version_number():
                with database:
                    database.execute("DELETE FROM files")
                    database.execute("DELETE FROM contents")
                    database.execute(f"PRAGMA user_version = {_version_number()}")
        except BaseException:
            database.close()
            raise
        return database

    def _forget_all(self) -> None:
        for name in (self.path.name, f"{self.path.name}-journal"):
            self.path.with_name(name).unlink(missing_ok=True)

    def _drop(self) -> None:
        """Stop using a file that turned out damaged, and remove it for the next scan to make anew."""
        if self._database is not None:
            self._database.close()
            self._database = None
        with contextlib.suppress(OSError):
            self._forget_all()

    def _known(self, index: int) -> PictureFacts | str | None:
        path, status = self._paths[index], self._statuses[index]
        if status is None:
            return None
        row = self._read("SELECT status, result FROM files WHERE path = ?", os.fsencode(path))
        if row is not None and row[0] == _status_text(status):
            return _result_from_text(row[1])
        if self._read("SELECT 1 FROM contents WHERE size = ? LIMIT 1", status.st_size) is None:
            return None
        result = self._same_content(path)
        if result is not None:
            self._results.append((index, result))
        return result

    def _same_content(self, path: Path) -> PictureFacts | str | None:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None
        row = self._read("SELECT result FROM contents WHERE key = ?", _content_key(digest, path))
        return None if row is None else _result_from_text(row[0])

    def _read(self, query: str, value: Any) -> tuple[Any, ...] | None:
        row = None if self._database is None else self._database.execute(query, (value,)).fetchone()
        return None if row is None else tuple(row)

    def _write(self) -> None:
        assert self._database is not None
        files, contents = [], []
        for index, result in self._results:
            path, status = self._paths[index], self._statuses[index]
            if status is None:
                continue
            text = _result_to_text(result)
            # The time of the inode is set by the kernel alone, whatever a program does to the others.
            if max(status.st_ctime_ns, status.st_mtime_ns) < self._looked_at - RACY_NANOSECONDS:
                files.append((os.fsencode(path), _status_text(status), text))
            if isinstance(result, PictureFacts):
                contents.append((_content_key(result.sha256, path), status.st_size, text))
        if files or contents:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", files)
                self._database.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?)", contents)


def _version_number() -> int:
    """Return a number that changes with everything but the file that results depend on."""
    plugins = [name for name in ("pillow_heif", "pillow_jxl") if find_spec(name)]
    text = f"{DECODE_VERSION} {MEASURES_VERSION} {PIL.__version__} {plugins}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _status(path: Path) -> os.stat_result | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _status_text(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_dev} {status.st_ino}"


def _content_key(sha256: str, path: Path) -> str:
    return f"{sha256} {path.suffix.lower()}"  # remarks and reasons name the extension


def _result_to_text(result: PictureFacts | str) -> str:
    return json.dumps({"refused": result} if isinstance(result, str) else facts_to_json(result))


def _result_from_text(text: str) -> PictureFacts | str | None:
    """Return the result, None where the text is none."""
    try:
        record = json.loads(text)
        return str(record["refused"]) if "refused" in record else facts_from_json(record)
    except (ValueError, KeyError, TypeError):
        return None
