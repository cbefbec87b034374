"""What the doctor says about packages, main memory, disks and the clock, each failure faked."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lorasmith.engine.doctor import disks, file_systems, installation, machine
from lorasmith.engine.doctor.choices import DISABLED_BY
from lorasmith.engine.doctor.disks import CACHE, MODELS, OUTPUT, Speed, check_disk, measure
from lorasmith.engine.doctor.file_systems import FileSystem, file_system_of
from lorasmith.engine.hardware import HardwareSnapshot, Memory, read_memory

STATE = HardwareSnapshot((), "", None, Memory(64.0, 60.0), (), "CPU", 8)
GIB = 1 << 30


# Installation


def test_an_old_python_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    check = installation.check_python()
    assert (check.blocking, "Python 3.10.4" in check.detail, check.fix.startswith("python3.11 ")) == (True, True, True)


def test_missing_and_untested_packages_are_named_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = ["pillow>=99", "no-such-thing>=1", "numpy>=2", "x; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    check = installation.check_packages()
    assert check.blocking
    assert re.match(r"pillow \S+ is installed, >=99 is needed; no-such-thing is missing$", check.detail)
    assert check.fix.endswith("'pillow>=99' 'no-such-thing>=1'")


def test_a_missing_optional_package_takes_only_its_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["bitsandbytes>=99", "numpy>=2"])
    check = installation.check_packages()
    assert (check.status, check.blocking) == ("fail", False)
    assert set(check.disables) == {*DISABLED_BY["bitsandbytes"], *DISABLED_BY["nf4"]}
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["bitsandbytes>=99", "numpy>=99"])
    assert installation.check_packages().blocking


# Memory


@pytest.mark.parametrize(("available", "status"), [(30.0, "pass"), (4.0, "warn")])
def test_little_memory_is_a_warning(available: float, status: str) -> None:
    check = machine.check_memory(replace(STATE, memory=Memory(64.0, available)))
    assert (check.status, check.detail) == (status, f"{available:.1f} of 64.0 GiB available")
    assert bool(check.meaning) == bool(check.fix) == (status == "warn")


@pytest.mark.parametrize(
    ("version", "files"),
    [
        ("2", {"box/memory.max": 6 * GIB, "box/memory.current": GIB, "box/memory.stat": "inactive_file 0"}),
        (
            "1",
            {
                "memory/box/memory.limit_in_bytes": 6 * GIB,
                "memory/box/memory.usage_in_bytes": GIB,
                "memory/box/memory.stat": "total_inactive_file 0",
            },
        ),
    ],
)
def test_a_containers_limit_is_named_with_the_version_of_its_control_group(
    version: str, files: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(text))
    if version == "2":
        (tmp_path / "cgroup.controllers").write_text("memory")
    membership = tmp_path / "membership"
    membership.write_text("0::/box\n" if version == "2" else "4:memory:/box\n")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=60 * GIB))
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    check = machine.check_memory(replace(STATE, memory=read_memory(tmp_path, membership)))
    assert check.detail == (
        f"5.0 of 6.0 GiB available (limited by a control group, version {version}: a container or service)"
    )
    assert (check.status, check.fix.startswith("docker run --memory=")) == ("warn", True)


def test_without_swap_a_small_machine_is_warned_and_a_large_one_or_a_container_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=0, used=0))
    small = replace(STATE, memory=Memory(12.0, 10.0))
    check = machine.check_swap(small)
    assert (check.status, check.detail, "swapon" in check.fix) == ("warn", "none", True)
    assert machine.check_swap(STATE).status == "pass"
    assert machine.check_swap(replace(small, memory=Memory(12.0, 10.0, limited=True))).status == "pass"
    monkeypatch.setattr(machine, "is_wsl", lambda: True)
    assert ".wslconfig" in machine.check_swap(small).fix
    assert ".wslconfig" in machine.check_memory(replace(STATE, memory=Memory(8.0, 3.0))).fix
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=8 * GIB, used=GIB))
    assert machine.check_swap(small).detail == "1.0 GiB of 8.0 GiB used"


@pytest.mark.parametrize(("free_mib", "status"), [(8192, "pass"), (64, "warn")])
def test_the_shared_memory_of_a_container_is_small_unless_it_is_asked_for(
    free_mib: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=free_mib << 20, total=free_mib << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check = machine.check_shared_memory(tmp_path)
    assert (check.status, "--shm-size=8g" in check.fix) == (status, status == "warn")
    assert machine.check_shared_memory(tmp_path / "none").status == "skip"


@pytest.mark.parametrize(
    ("limits", "words"), [((8 << 20, -1), "8.0 MiB, up to no limit"), ((-1, -1), "no limit"), ((1024, 1024), "1.0 KiB")]
)
def test_the_limit_of_locked_memory_is_told(
    limits: tuple[int, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    assert machine.check_locked_memory().detail.startswith(words)


def test_a_clock_before_the_installation_is_a_warning() -> None:
    assert machine.check_clock().status == "pass"
    check = machine.check_clock(now=0.0, built=1.7e9)
    assert (check.status, check.fix) == ("warn", "sudo timedatectl set-ntp true")
    assert check.detail == "1970-01-01 00:00:00 UTC, before lorasmith was installed (2023-11-14)"
    assert "certificate" in check.meaning


# Disks


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the disk be of this kind, speed and room."""

    def make(kind: str = "ext4", write: float = 500.0, free_gib: float = 500.0, wsl: bool = False) -> None:
        monkeypatch.setattr(disks, "file_system_of", lambda folder: FileSystem(kind, "/"))
        monkeypatch.setattr(disks, "measure", lambda folder: Speed(write, 2 * write))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gib * GIB))
        monkeypatch.setattr(file_systems, "is_wsl", lambda: wsl)

    return make


@pytest.mark.parametrize(("free_gib", "status"), [(500, "pass"), (5, "warn"), (0.5, "fail")])
def test_little_disk_is_told(tmp_path: Path, disk: Callable[..., None], free_gib: float, status: str) -> None:
    disk(free_gib=free_gib)
    check = check_disk(OUTPUT, tmp_path / "new")
    assert (check.status, str(tmp_path) in check.detail) == (status, True)
    assert ("run.output_folder" in check.fix) == (status != "pass")


def test_a_folder_that_cannot_be_written_to_blocks_with_the_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = check_disk(OUTPUT, tmp_path / "file" / "runs")
    assert (check.blocking, check.fix) == (True, "Choose another folder with run.output_folder.")


@pytest.mark.parametrize(
    ("error", "words"),
    [(errno.EROFS, "mount it for writing"), (errno.ENOSPC, "Choose another folder"), (errno.EIO, "dmesg")],
)
def test_a_disk_that_takes_no_file_blocks(
    tmp_path: Path, disk: Callable[..., None], monkeypatch: pytest.MonkeyPatch, error: int, words: str
) -> None:
    disk()

    def refuse(folder: Path) -> Speed:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(disks, "measure", refuse)
    check = check_disk(CACHE, tmp_path)
    assert (check.blocking, os.strerror(error) in check.detail, words in check.fix) == (True, True, True)


@pytest.mark.parametrize(
    ("kind", "wsl", "words"),
    [
        ("ext4", False, ""),
        ("nfs4", False, "A network disk"),
        ("fuse.sshfs", False, "A network disk"),
        ("9p", False, "A network disk"),
        ("9p", True, "A drive of Windows"),
        ("drvfs", True, "A drive of Windows"),
        ("tmpfs", False, "lies in main memory"),
        ("overlay", False, "inside the container"),
        ("exfat", False, "keeps no links"),
    ],
)
def test_what_kind_of_disk_it_is_is_told_with_what_that_means(
    kind: str, wsl: bool, words: str, tmp_path: Path, disk: Callable[..., None]
) -> None:
    disk(kind, wsl=wsl)
    check = check_disk(OUTPUT, tmp_path)
    assert (check.status, f"({kind})" in check.detail) == ("warn" if words else "pass", True)
    assert words in check.meaning


def test_what_can_be_computed_again_may_lie_in_memory_and_models_need_more_room(
    tmp_path: Path, disk: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk("tmpfs")
    assert check_disk(CACHE, tmp_path).status == "pass"
    disk(free_gib=30.0)
    assert [check_disk(use, tmp_path).status for use in (OUTPUT, CACHE, MODELS)] == ["pass", "pass", "warn"]
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert check_disk(MODELS, tmp_path).meaning == "No base model can be downloaded."


def test_a_disk_is_measured_once(tmp_path: Path, disk: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    disk()
    known = {tmp_path.stat().st_dev: Speed(111.0, 222.0)}
    monkeypatch.setattr(disks, "measure", lambda folder: 1 / 0)
    assert "writes 111 and reads 222 MiB/s" in check_disk(OUTPUT, tmp_path, known).detail


def test_a_slow_disk_is_told_with_what_was_measured(tmp_path: Path, disk: Callable[..., None]) -> None:
    disk(write=6.0)
    check = check_disk(OUTPUT, tmp_path)
    assert (check.status, "writes 6 and reads 12 MiB/s" in check.detail) == ("warn", True)
    assert "Saving interrupts a training" in check.meaning


def test_measuring_leaves_nothing_behind_and_gives_up_on_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = measure(tmp_path, mib=8)
    assert speed.write > 0
    assert speed.read > 0
    assert list(tmp_path.iterdir()) == []
    syncs: list[int] = []
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr(disks, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(os, "fsync", syncs.append)
    slow = measure(tmp_path, mib=64, seconds=1.5)
    assert len(syncs) == 1, "a second went by with each look at the clock"
    assert slow.write == 4 / 3
    # A disk without nameless files.
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *mode: _unnamed_refused(real, path, flags, *mode))
    assert measure(tmp_path, mib=4, seconds=100).write > 0
    assert list(tmp_path.iterdir()) == []


def _unnamed_refused(real: Callable[..., int], path: object, flags: int, *mode: int) -> int:
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, "not supported")
    return real(path, flags, *mode)


def test_the_file_system_is_that_of_the_last_and_longest_mount_around_a_folder(tmp_path: Path) -> None:
    inside = tmp_path / "a b" / "runs"
    inside.mkdir(parents=True)
    escaped = str(tmp_path / "a b").replace(" ", "\\040")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"30 22 0:40 / {escaped} rw - xfs /dev/sdb rw\n"
        f"31 22 0:41 / {escaped} rw,nosuid shared:7 master:2 - nfs4 server:/export rw\n"
        f"32 22 0:42 / {tmp_path}/a rw - tmpfs tmpfs rw\n"
        "damaged\n"
    )
    assert file_system_of(inside, mounts) == FileSystem("nfs4", str(tmp_path / "a b"))
    assert file_system_of(tmp_path, mounts) == FileSystem("ext4", "/")
    assert file_system_of(tmp_path, tmp_path / "none") == FileSystem("", "")
    assert file_system_of(Path("/proc")).kind == "proc"
