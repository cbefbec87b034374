"""The queue: runs that are to be trained one after another, or one a GPU, kept in the user's state folder.

A run is made when it is added, so that its settings and edited captions are its own from then on. The queue holds only
where it lies and what its folder cannot tell; what became of a run is read from the folder each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorasmith.engine.errors import ConfigError, StorageError
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import lock_holder, process_mark
from lorasmith.engine.run_summary import RunSummary, summarize_run
from lorasmith.engine.storage import atomic_write, state_folder

VERSION = 1
LOCK_SECONDS = 10.0
LOCK_POLL_SECONDS = 0.01

Status = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Entry:
    """One run of the queue; `number` names it for good.

    `journal_bytes` is how large the run's journal was when it was added: only what was written later counts. `slot` is
    the device of its last start, `pid`, `mark` and `host` are its process. `held` means that it was stopped together
    with the queue and is to go on with it; `failed` says why it is not tried again. `starts` counts those since it
    last came further than `step`.
    """

    number: int
    run: str
    added: float
    journal_bytes: int = 0
    slot: str = ""
    pid: int = 0
    mark: str = ""
    host: str = ""
    held: bool = False
    failed: str = ""
    starts: int = 0
    step: int = 0

    @property
    def folder(self) -> RunFolder:
        """The run folder, which may be gone."""
        return RunFolder(Path(self.run))

    def process_lives(self) -> bool:
        """Tell whether the process of the last start lives; a number that another process got by now does not count."""
        return bool(self.pid) and self.host == socket.gethostname() and process_mark(self.pid) == self.mark


@dataclass(frozen=True)
class EntryState:
    """What became of an entry, and why in words; `summary` is None where the run folder is gone."""

    status: Status
    words: str
    summary: RunSummary | None = None


def entry_state(entry: Entry) -> EntryState:
    """Return what became of the run since it was added, told by its folder."""
    run = entry.folder
    if not run.run_file.is_file():
        return EntryState("failed", f"its run folder {run.path} is gone")
    summary = summarize_run(run)
    if summary.live:
        return EntryState("running", summary.describe(), summary)
    if entry.process_lives():
        return EntryState("running", "starting", summary)
    if summary.state == "finished" and _was_started(entry):
        return EntryState("finished", "finished", summary)
    if entry.failed:
        return EntryState("failed", entry.failed, summary)
    return _not_running(entry, summary)


def _not_running(entry: Entry, summary: RunSummary) -> EntryState:
    if summary.state == "failed" and _was_started(entry):
        return EntryState("failed", summary.message, summary)
    if summary.state == "stopped" and _was_started(entry) and not entry.held:
        return EntryState("stopped", f"{summary.describe()} by the user", summary)
    if summary.state == "not started":
        return EntryState("waiting", "waiting", summary)
    return EntryState("waiting", f"waiting to go on: {summary.describe()}", summary)


def _was_started(entry: Entry) -> bool:
    """Tell whether the run wrote anything since it was added: one that was added again begins anew."""
    return journal_size(entry.folder) > entry.journal_bytes


def journal_size(run: RunFolder) -> int:
    """Return the bytes of a run's journal, 0 where there is none."""
    try:
        return run.journal.stat().st_size
    except OSError:
        return 0


@dataclass(frozen=True)
class QueueWork:
    """The right to work on the queue, which one process has at a time (`run_lock.RunLock`)."""

    path: Path

    @property
    def lock(self) -> Path:
        """The file that the worker holds locked."""
        return self.path / "queue-worker.lock"

    def holder(self) -> dict[str, Any] | None:
        """Return who works on the queue, or None where nobody does."""
        return lock_holder(self)


class RunQueue:
    """The queue in `folder`; several processes may change it at the same time."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or state_folder()
        self.file = self.folder / "queue.json"
        self.work = QueueWork(self.folder)

    def entries(self) -> list[Entry]:
        """Return the entries in order; raises StorageError or ConfigError where the file cannot be read."""
        return self._read()[1]

    def add(self, run: RunFolder) -> Entry:
        """Put a run at the end; raises ConfigError where it waits there already."""
        with self._changing() as content:
            for entry in content.entries:
                if entry.folder == run and entry_state(entry).status in ("waiting", "running"):
                    raise ConfigError(
                        f"{run.name} is in the queue already, as number {entry.number}.",
                        fix="`lorasmith queue list` shows the queue.",
                    )
            number = content.take_number()
            entry = Entry(number, str(run.path), time.time(), journal_size(run))
            content.entries.append(entry)
        return entry

    def update(self, number: int, **changes: Any) -> None:
        """Change fields of an entry; does nothing where it was removed meanwhile."""
        with self._changing() as content:
            content.entries[:] = [
                dataclasses.replace(entry, **changes) if entry.number == number else entry for entry in content.entries
            ]

    def remove(self, number: int) -> Entry:
        """Take an entry out; its run folder stays. Raises ConfigError where it is worked on or is not there."""
        with self._changing() as content:
            entry = _find(content.entries, number)
            if entry_state(entry).status == "running":
                raise ConfigError(
                    f"Number {number} is being trained.",
                    why=f"It is {entry.folder.name}.",
                    fix="Stop it first: `lorasmith attach`, then the key for stop.",
                )
            content.entries.remove(entry)
        return entry

    def move(self, number: int, before: int) -> None:
        """Put entry `number` into the place of entry `before`; raises ConfigError where one is not there."""
        with self._changing() as content:
            entry, other = _find(content.entries, number), _find(content.entries, before)
            place = content.entries.index(other)
            content.entries.remove(entry)
            content.entries.insert(place, entry)

    def follow(self, old: Path, new: Path) -> None:
        """Note that the run folder `old` has another name from now on."""
        if not self.file.exists():
            return
        with self._changing() as content:
            content.entries[:] = [
                dataclasses.replace(entry, run=str(new)) if entry.run == str(old) else entry
                for entry in content.entries
            ]

    def clear(self, *, ended_only: bool = False) -> list[Entry]:
        """Take out and return all entries that nobody works on, or with `ended_only` those that are over."""
        keep = {"running", "waiting"} if ended_only else {"running"}
        with self._changing() as content:
            gone = [entry for entry in content.entries if entry_state(entry).status not in keep]
            content.entries[:] = [entry for entry in content.entries if entry not in gone]
        return gone

    @contextlib.contextmanager
    def _changing(self) -> Iterator[_Content]:
        """Hold the queue for a change, which is written at the end unless something is raised."""
        with self._locked():
            content = _Content(*self._read())
            before = list(content.entries)
            yield content
            if content.entries != before:
                self._write(content)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.folder / "queue.lock"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            self._wait_for_lock(fd, path)
            yield
        finally:
            os.close(fd)

    @staticmethod
    def _wait_for_lock(fd: int, path: Path) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageError(
                        "The queue cannot be changed.",
                        why=f"Another process holds {path}.",
                        fix="Try again; if that process hangs, end it.",
                    ) from None
                time.sleep(LOCK_POLL_SECONDS)
            except OSError as error:
                raise _unusable(path, error) from error
            else:
                return

    def _read(self) -> tuple[int, list[Entry]]:
        try:
            document = json.loads(self.file.read_bytes())
            if document["version"] > VERSION:
                raise ConfigError(
                    f"The queue {self.file} was written by a newer version of lorasmith.", fix="Update lorasmith."
                )
            return int(document["next"]), [Entry(**entry) for entry in document["entries"]]
        except FileNotFoundError:
            return 1, []
        except OSError as error:
            raise _unusable(self.file, error) from error
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"The queue {self.file} is damaged.",
                why=f"{type(error).__name__}: {error}",
                fix="Move that file away; the runs themselves are in their folders, and can be added again.",
            ) from error

    def _write(self, content: _Content) -> None:
        entries = [dataclasses.asdict(entry) for entry in content.entries]
        document = {"version": VERSION, "next": content.next_number, "entries": entries}
        atomic_write(self.file, json.dumps(document, indent=1).encode())
        self.file.chmod(0o600)


@dataclass
class _Content:
    next_number: int
    entries: list[Entry]

    def take_number(self) -> int:
        number, self.next_number = self.next_number, self.next_number + 1
        return number


def _find(entries: list[Entry], number: int) -> Entry:
    for entry in entries:
        if entry.number == number:
            return entry
    known = ", ".join(str(entry.number) for entry in entries)
    raise ConfigError(
        f"The queue has no number {number}.",
        why=f"It has {known}." if known else "It is empty.",
        fix="See `lorasmith queue list`.",
    )


def _unusable(path: Path, error: OSError) -> StorageError:
    why = error.strerror or str(error)
    return StorageError(
        f"Cannot use the queue's file {path}.", why=why, fix="Check the folder's permissions and space."
    )
