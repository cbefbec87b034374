"""What the system itself keeps about processes that it ended: the memory killer's counters, its log, the last boot.

All of it may be missing or unreadable; then there is simply no evidence.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
KERNEL_LOG = Path("/dev/kmsg")
_COUNTER = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_KILLED_LINE = re.compile(r"\d+,\d+,(\d+),[^;]*;.*[Oo]ut of memory: Killed process (\d+) ")
_RECORD_BYTES = 8192


def boot_mark() -> str:
    """Return what tells this boot of the machine from others; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def memory_kills(root: Path = ROOT, membership: Path = MEMBERSHIP) -> tuple[str, int] | None:
    """Return a mark of this process's control group and how many processes the memory killer has ended in it.

    Control groups of version 2 and 1; None where there is no such counter.
    """
    for group, path in _counter_files(root, membership):
        try:
            found = _COUNTER.search(path.read_text())
        except OSError:
            continue
        if found:
            return hashlib.sha256(group.encode()).hexdigest()[:16], int(found.group(1))
    return None


def killed_by_kernel(pid: int, since: float, log: Path = KERNEL_LOG) -> bool:
    """Tell whether the kernel's log says that the memory killer ended process `pid` after `since` (epoch seconds)."""
    booted = time.time() - time.monotonic()
    return any(killed == pid and booted + seconds >= since for seconds, killed in _kernel_kills(log))


def _counter_files(root: Path, membership: Path) -> Iterator[tuple[str, Path]]:
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            yield group, root / group.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            yield group, root / "memory" / group.lstrip("/") / "memory.oom_control"
            # Inside a container its own group is mounted as the root, under the host's name.
            yield group, root / "memory" / "memory.oom_control"


def _kernel_kills(log: Path) -> Iterator[tuple[float, int]]:
    """Yield (seconds since boot, pid) of each process that the memory killer ended."""
    try:
        descriptor = os.open(log, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        while True:
            # One record a read: "priority,number,microseconds,flags;text"; EPIPE where it was overwritten meanwhile.
            try:
                record = os.read(descriptor, _RECORD_BYTES).decode(errors="replace")
            except BrokenPipeError:
                continue
            if not record:
                return
            for line in record.splitlines():
                if found := _KILLED_LINE.match(line):
                    yield int(found.group(1)) / 1e6, int(found.group(2))
    except OSError:
        return
    finally:
        os.close(descriptor)
