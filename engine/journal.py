"""The journal of a run: one JSON line per event, written before anyone sees the event.

The first line is a header with the schema version. Each event is one `os.write` on an append-only file, so that a
killed process leaves at most one torn last line; a thread of its own calls `fdatasync` once a second, and at once after
a checkpoint and at the end. A full disk never stops training: the events wait in memory until there is room.
Lines are strict JSON: a loss that is not finite is the string "NaN", "Infinity" or "-Infinity".
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from lorasmith.engine import events
from lorasmith.engine.errors import StorageError
from lorasmith.engine.events import SCHEMA_VERSION, CheckpointSaved, Event, HardwareSampled, Logged, RunEnded
from lorasmith.engine.storage import fsync_folder, is_disk_full

HEADER = "JournalHeader"
SYNC_SECONDS = 1.0
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS lacks the former
RUN_PARTS = frozenset({"checkpoints", "previews", "export"})
"""The folders in a run folder whose files events name."""
NUMBER_FIELDS = {"float", "float | None", "list[float]"}


class Journal:
    """The writing end; safe to use from several threads, opened by one process at a time (the run's lock sees to it).

    Opening repairs what a killed process may have left: a torn last line is cut off. Raises StorageError where the
    file cannot be opened or belongs to a newer version of lorasmith.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._write_problem = ""
        self._sync_problem = ""
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._dirty = False
        self._closed = False
        self._wake = threading.Event()
        self._torn = False
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            self._begin()
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            if isinstance(error, OSError):
                raise _unwritable(path, error) from None
            raise
        self._thread = threading.Thread(target=self._keep_synced, name="journal-sync", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """What keeps events from the disk, in words such as "disk full: PATH"; empty while all is well."""
        return self._write_problem or self._sync_problem

    def append(self, event: Event) -> bool:
        """Write `event`; False where it has to wait in memory because the disk takes nothing more (see `problem`).

        Gauges that cannot be written are dropped instead: there is one a second, and the next one replaces it.
        """
        line = encode(event)
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.path} is closed")
            self._waiting.append(line)
            written = self._flush()
            if not written and isinstance(event, HardwareSampled):
                self._waiting.pop()
        if isinstance(event, CheckpointSaved | RunEnded):
            self._wake.set()
        return written

    def close(self) -> bool:
        """Write and sync what is left and close the file; False where events had to be given up."""
        with self._lock:
            if self._closed:
                return not self._waiting
            self._closed = True
        self._wake.set()
        self._thread.join()
        with self._lock:
            complete = self._flush()
            self._sync(self._fd)
            with contextlib.suppress(OSError):
                os.close(self._fd)
        return complete

    def _begin(self) -> None:
        _cut_torn_line(self._fd)
        size = os.fstat(self._fd).st_size
        if size:
            _check_schema(_header(os.pread(self._fd, 4096, 0)), self.path)
            return
        header = {"event": HEADER, "schema": SCHEMA_VERSION, "time": time.time()}
        self._waiting.append(_dump(header))
        self._flush()
        fsync_folder(self.path.parent)

    def _flush(self) -> bool:
        while self._waiting:
            problem = self._write_line(self._waiting[0])
            if problem:
                self._write_problem = f"{problem}: {self.path}"
                return False
            self._waiting.popleft()
            self._dirty = True
        self._write_problem = ""
        return True

    def _write_line(self, line: bytes) -> str:
        """Write `line` whole or not at all; return why it could not be written, or an empty string."""
        try:
            if self._torn:
                # Or this line would be glued to the part that an earlier write left.
                _cut_torn_line(self._fd)
                self._torn = False
            written = os.write(self._fd, line)
            if written == len(line):
                return ""
            self._torn = True
            _cut_torn_line(self._fd)
            self._torn = False
        except OSError as error:
            return "disk full" if self._torn or is_disk_full(error) else str(error.strerror)
        return "disk full"

    def _keep_synced(self) -> None:
        while not self._closed:
            self._wake.wait(SYNC_SECONDS)
            self._wake.clear()
            with self._lock:
                if self._waiting and not self._closed:
                    self._flush()
                dirty, self._dirty = self._dirty, False
            if dirty:
                # Outside the lock: on a slow disk this takes long, and the training thread must not wait for it.
                self._sync(self._fd)

    def _sync(self, fd: int) -> None:
        try:
            _sync_data(fd)
            self._sync_problem = ""
        except OSError as error:
            self._sync_problem = f"{error.strerror}: {self.path}"


class Follower:
    """The reading end in another process, or of a run that is over; works before the file exists.

    `position` is the byte up to which lines were read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0

    def poll(self, max_bytes: int | None = None) -> list[Event]:
        """Return the events written since the last call; see `lines`."""
        return [event for line in self.lines(max_bytes) if (event := decode(line, self.path)) is not None]

    def lines(self, max_bytes: int | None = None) -> list[bytes]:
        """Return the complete lines written since the last call, to be decoded by `decode`.

        `max_bytes` bounds the work of one call on a long journal; call again until it returns nothing. Raises
        StorageError where the file cannot be read or belongs to a newer version.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                data = file.read(-1 if max_bytes is None else max_bytes)
                if b"\n" not in data:
                    data += file.readline()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unreadable(self.path, error) from None
        complete = data[: data.rfind(b"\n") + 1]
        lines = complete.splitlines(keepends=True)
        if self.position == 0 and lines:
            _check_schema(_header(lines[0]), self.path)
        self.position += len(complete)
        return lines


def replay(path: Path, only: Container[str] | None = None) -> Iterator[Event]:
    """Yield the events of the journal at `path` in order; of the types named in `only`, where given.

    A torn last line is left out, as are types of newer versions; a missing file has no events. A line that is damaged
    is replaced by a warning that names it. Raises StorageError where the file cannot be read or is of a newer version.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unreadable(path, error) from None
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            if number == 1:
                _check_schema(_header(line), path)
            if only is not None and _kind(line) not in only:
                continue
            event = decode(line, path, number)
            if event is not None:
                yield event


def encode(event: Event) -> bytes:
    """Return `event` as one line of strict JSON with its newline."""
    return _dump(events.to_record(event))


def decode(line: bytes, path: Path, number: int | None = None) -> Event | None:
    """Return the event of one journal line, None for the header and for types of newer versions.

    A damaged line becomes a warning, so that no reader passes over it in silence.
    """
    try:
        record = json.loads(line)
        kind = record["event"]
        if b'NaN"' in line or b'Infinity"' in line:
            for name in _number_fields(kind).intersection(record):
                record[name] = _to_number(record[name])
        if isinstance(record.get("path"), str):
            record["path"] = _where_now(record["path"], path.parent)
        return events.from_record(record)
    except (ValueError, TypeError, KeyError) as error:
        where = f"line {number}" if number else "a line"
        message = f"{path.name}: {where} is damaged and was left out ({type(error).__name__})."
        return Logged(severity="warning", message=message, time=0.0)


def _where_now(written: str, folder: Path) -> str:
    """Return the path of a run's file as it is since the run folder was renamed or moved to `folder`."""
    *_, part, name = ("", "", *written.split("/"))
    if part not in RUN_PARTS or written.startswith(f"{folder}/"):
        return written
    return f"{folder}/{part}/{name}"


def _dump(record: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(record, allow_nan=False, default=_plain)
    except ValueError:
        text = json.dumps(_finite(record), allow_nan=False, default=_plain)
    return text.encode("ascii") + b"\n"


def _plain(value: Any) -> Any:
    # An event with a NumPy number or a path in it is a mistake elsewhere; it must not end a training.
    return value.item() if hasattr(value, "item") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return _finite(value.item()) if hasattr(value, "item") else value


def _to_number(value: Any) -> Any:
    if isinstance(value, str):
        return float(value)
    if isinstance(value, list):
        return [_to_number(item) for item in value]
    return value


@functools.cache
def _number_fields(kind: str) -> frozenset[str]:
    event_type = getattr(events, kind, None)
    if not (isinstance(event_type, type) and issubclass(event_type, Event)):
        return frozenset()
    return frozenset(f.name for f in dataclasses.fields(event_type) if f.type in NUMBER_FIELDS)


def _kind(line: bytes) -> str:
    # `to_record` puts the type first, so most lines need no parsing; anything else is parsed and then judged.
    if line.startswith(b'{"event": "'):
        return line[11 : line.find(b'"', 11)].decode("ascii", "replace")
    try:
        return str(json.loads(line)["event"])
    except (ValueError, TypeError, KeyError):
        return ""


def _header(start: bytes) -> dict[str, Any]:
    try:
        record = json.loads(start.partition(b"\n")[0])
    except ValueError:
        return {}
    return record if isinstance(record, dict) and record.get("event") == HEADER else {}


def _check_schema(header: dict[str, Any], path: Path) -> None:
    schema = header.get("schema", SCHEMA_VERSION)
    if isinstance(schema, int) and schema > SCHEMA_VERSION:
        raise StorageError(
            f"{path} was written by a newer version of lorasmith.",
            why=f"Its schema is {schema}, this version knows {SCHEMA_VERSION}.",
            fix="Update lorasmith to open this run.",
        )


def _cut_torn_line(fd: int) -> None:
    end = size = os.fstat(fd).st_size
    while end:
        start = max(0, end - 65536)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end != size:
        os.ftruncate(fd, end)


def _unwritable(path: Path, error: OSError) -> StorageError:
    fix = "Free some space on that disk." if is_disk_full(error) else "Check the folder's rights."
    return StorageError(f"Cannot write the journal {path}.", why=str(error.strerror), fix=fix)


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"Cannot read the journal {path}.", why=str(error.strerror), fix="Check the file's rights.")
