"""Who works on a run: an exclusive lock that the system lets go of when its process dies, however it dies.

The lock file also names its holder for people. Whether somebody works on a run is decided by the lock alone, never by
that record: a record of a dead process, or of a process whose number belongs to another one by now, is passed over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import weakref
from pathlib import Path
from typing import Any, Protocol

from lorasmith.engine.errors import RunLockedError, StorageError
from lorasmith.engine.kill_evidence import boot_mark, memory_kills

LOCK_SECONDS = 2.0
"""How long a start waits for processes that hold the lock only to look, and a reader for a record being written."""
POLL_SECONDS = 0.005
RECORD_BYTES = 512
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class Lockable(Protocol):
    """What can be worked on by one process at a time: a `run_folder.RunFolder`, or a queue."""

    @property
    def path(self) -> Path:
        """The folder."""

    @property
    def lock(self) -> Path:
        """The file in it that is locked."""


class RunLock:
    """The exclusive right to work on a run, held until `release` or the end of the process.

    Raises RunLockedError naming the holder, or StorageError where the file system cannot lock. Children of this
    process do not hold it, not even those that are forked without a new program.
    """

    def __init__(self, run: Lockable) -> None:
        try:
            self._fd = os.open(run.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            why = error.strerror or str(error)
            raise StorageError(f"Cannot write {run.lock}.", why=why, fix="Check the folder's permissions.") from error
        try:
            self._take(run)
        except BaseException:
            os.close(self._fd)
            raise
        _held.add(self)
        self._write({"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()} | _own_marks())

    def release(self) -> None:
        """Let another process work on the run."""
        if self._fd >= 0:
            # A record that stays behind could be taken for the next holder's.
            self._write({})
            self._forget()

    def _take(self, run: Lockable) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(self._fd, fcntl.LOCK_EX, run):
            # Several may hold it together for a moment, only to look; only one that works on the run refuses this.
            if _try_lock(self._fd, fcntl.LOCK_SH, run):
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            elif holder := _read_record(self._fd):
                raise _locked_error(run, holder)
            if time.monotonic() > deadline:
                raise _locked_error(run, {})
            time.sleep(POLL_SECONDS)

    def _write(self, record: dict[str, Any]) -> None:
        # Always of one size, so that a full disk takes it too; and without it the lock is as good.
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, json.dumps(record).encode().ljust(RECORD_BYTES), 0)

    def _forget(self) -> None:
        # Closing is all: an explicit unlock in a forked child would take the lock from its parent.
        os.close(self._fd)
        self._fd = -1
        _held.discard(self)


def lock_holder(run: Lockable) -> dict[str, Any] | None:
    """Return who works on the run now ({} where unknown; keys pid, host, started), or None where nobody does."""
    try:
        fd = os.open(run.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    deadline = time.monotonic() + LOCK_SECONDS
    try:
        while not _try_lock(fd, fcntl.LOCK_SH, run):
            # A holder's record is some microseconds younger than its lock.
            if (holder := _read_record(fd)) or time.monotonic() > deadline:
                return holder
            time.sleep(POLL_SECONDS)
        return None
    except StorageError:
        return None
    finally:
        os.close(fd)


def process_mark(pid: int) -> str | None:
    """Return what tells process `pid` from others that had or will get its number; None where it does not live."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _mark_without_proc(pid)
    except OSError:
        return None
    # The 22nd field: when it started, in ticks since the machine did, which no change of the clock touches.
    return None if state in "ZX" else fields[18]


def _mark_without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _own_marks() -> dict[str, Any]:
    # The last two are for whoever finds the record of a process that vanished: `sudden_end`.
    marks = {"mark": process_mark(os.getpid()), "namespace": _pid_namespace()}
    return marks | {"boot": boot_mark(), "kills": memory_kills()}


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _try_lock(fd: int, kind: int, run: Lockable) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _cannot_lock(run, error) from error
    return True


def _read_record(fd: int) -> dict[str, Any]:
    """Return who says to hold the lock; empty where nobody does yet, or where that is an older holder."""
    try:
        record = json.loads(os.pread(fd, RECORD_BYTES, 0))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and _may_hold(record) else {}


def _may_hold(record: dict[str, Any]) -> bool:
    pid = record.get("pid")
    if not isinstance(pid, int):
        return False
    if record.get("host") != socket.gethostname() or record.get("namespace") != _pid_namespace():
        # Another machine or container: its processes cannot be seen from here.
        return True
    return process_mark(pid) == record.get("mark")


def _locked_error(run: Lockable, holder: dict[str, Any]) -> RunLockedError:
    why = "Which process it is cannot be read from the lock."
    if holder:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(holder.get("started", 0))))
        why = f"Process {holder.get('pid')} on {holder.get('host')} has worked on it since {started}."
    return RunLockedError(
        f"Another process trains in {run.path}.", why=why, fix="Wait for it, stop it, or start a new run."
    )


def _cannot_lock(run: Lockable, error: OSError) -> StorageError:
    unsupported = error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
    return StorageError(
        f"Cannot lock {run.lock}.",
        why="This file system does not support locks." if unsupported else error.strerror or str(error),
        fix="Choose a run.output_folder on a local disk.",
    )


def _forget_in_child() -> None:
    for lock in list(_held):
        lock._forget()


os.register_at_fork(after_in_child=_forget_in_child)
