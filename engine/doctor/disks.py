"""The folders that are written to: permission, room, kind of file system, and measured speed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lorasmith.engine.doctor.check import Check
from lorasmith.engine.doctor.file_systems import IN_MEMORY, WITHOUT_LINKS, FileSystem, file_system_of
from lorasmith.engine.nvml import GIB
from lorasmith.engine.storage import ADVICE, CANNOT_SYNC, nearest_existing

MINIMUM_DISK_GIB: Final = 1.0
SLOW_MIB_PER_SECOND: Final = 20.0
"""Below this, saving a LoRA of 200 MiB takes over ten seconds."""
TRIAL_MIB: Final = 64
TRIAL_SECONDS: Final = 0.8
_CHUNK_MIB: Final = 4


@dataclass(frozen=True)
class Use:
    """What a folder is for: its name, the setting that chooses another, how much room is little, and what fails.

    `keeps` where its content cannot simply be computed again.
    """

    name: str
    setting: str
    low_gib: float
    little: str
    without: str
    keeps: bool


OUTPUT: Final = Use(
    name="output folder",
    setting="run.output_folder",
    low_gib=10.0,
    little="Enough for a small run only.",
    without="No training can start.",
    keeps=True,
)
CACHE: Final = Use(
    name="cache folder",
    setting="the variable LORASMITH_CACHE",
    low_gib=10.0,
    little="Enough for a small dataset only.",
    without="No training can start: what pictures are encoded to is kept there.",
    keeps=False,
)
MODELS: Final = Use(
    name="models folder",
    setting="the variable HF_HOME",
    low_gib=40.0,
    little="Large base models take 24 GiB and more.",
    without="No base model can be downloaded.",
    keeps=True,
)


@dataclass(frozen=True)
class Speed:
    """What a disk did, in MiB/s: `write` with everything synced, `read` past the system's cache where that works."""

    write: float
    read: float


def check_disk(use: Use, folder: Path, known: dict[int, Speed] | None = None) -> Check:
    """The folder, or the one in which it would be made, can be written to, has room and is not slow.

    `known` are the speeds of disks that were measured before, to which this one's is added. Nothing is left behind.
    """
    place = nearest_existing(folder.expanduser())
    where = f"Choose another folder with {use.setting}."
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Check(use.name, "fail", f"{place} cannot be written to.", where, use.without)
    free = shutil.disk_usage(place).free / GIB
    system = file_system_of(place)
    detail = f"{free:.1f} GiB free in {place}{f' ({system.kind})' if system.kind else ''}"
    if free < MINIMUM_DISK_GIB:
        return Check(use.name, "fail", detail, f"Free some space. {where}", use.without)
    try:
        speed = _measure_once(place, {} if known is None else known)
    except OSError as error:
        fix = ADVICE.get(error.errno or 0, where)
        return Check(use.name, "fail", f"{detail}; {error.strerror or error}", fix, use.without)
    detail += f", writes {speed.write:.0f} and reads {speed.read:.0f} MiB/s"
    if free < use.low_gib:
        return Check(use.name, "warn", detail, f"Free some space. {where}", use.little)
    if speed.write < SLOW_MIB_PER_SECOND:
        return Check(use.name, "warn", detail, where, "Saving interrupts a training for a while each time.")
    meaning = _drawback(system, use.keeps)
    return Check(use.name, "warn", detail, where, meaning) if meaning else Check(use.name, "pass", detail)


def _drawback(system: FileSystem, keeps: bool) -> str:
    if system.is_windows:
        return "A drive of Windows seen from WSL: reading pictures and saving are several times slower than in ~."
    if system.is_network:
        return "A network disk: trainings wait for it, and stop where it goes away."
    if keeps and system.kind in IN_MEMORY:
        return "This folder lies in main memory: what is saved is lost when the machine restarts."
    if keeps and system.kind == "overlay":
        return "This folder lies inside the container: what is saved is lost when the container is removed."
    if keeps and system.kind in WITHOUT_LINKS:
        return "A disk formatted for Windows: it keeps no links, so that downloads can take double room."
    return ""


def _measure_once(folder: Path, known: dict[int, Speed]) -> Speed:
    disk = folder.stat().st_dev
    if disk not in known:
        known[disk] = measure(folder)
    return known[disk]


def measure(folder: Path, mib: int = TRIAL_MIB, seconds: float = TRIAL_SECONDS) -> Speed:
    """Return how fast up to `mib` MiB are written to `folder` and synced, and read again; raises OSError.

    It stops after about `seconds`, and leaves no file behind, even where the process is killed, if the disk can.
    """
    chunk = os.urandom(_CHUNK_MIB << 20)
    descriptor = _nameless_file(folder)
    try:
        started, written = time.monotonic(), 0
        while written < mib and time.monotonic() - started < seconds:
            _write_all(descriptor, chunk)
            # Each time: a slow disk would take minutes for the sync of all.
            _sync(descriptor)
            written += _CHUNK_MIB
        wrote = time.monotonic() - started
        with contextlib.suppress(OSError, AttributeError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        started, read = time.monotonic(), 0
        while time.monotonic() - started < seconds and (got := len(os.read(descriptor, _CHUNK_MIB << 20))):
            read += got
        took = time.monotonic() - started
    finally:
        os.close(descriptor)
    return Speed(written / max(wrote, 1e-6), read / (1 << 20) / max(took, 1e-6))


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


def _nameless_file(folder: Path) -> int:
    """Open a file in `folder` that has no name, or has lost it at once where the disk needs one."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    path = folder / f".speed-test-{secrets.token_hex(4)}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    # Windows keeps the name until the file is closed; elsewhere the open file lives on without it.
    with contextlib.suppress(OSError):
        path.unlink()
    return descriptor
