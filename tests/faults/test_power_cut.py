"""Promise 3: after a power cut at most the save that had not returned is lost.

A file system in a file is shut down by the ioctl that the kernel's own tests use: everything that was not synced is
gone, as after a cut of power. Needs root and loop devices.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorasmith.engine.checkpoints import prune_checkpoints
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_folder import create_run
from lorasmith.engine.storage import atomic_write
from tests.faults.checkpoint_scenarios import hidden, newest, save, save_step
from tests.faults.fault_server import FaultServer, Spoil

Record = Callable[[int, str, str], None]
SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN, the same number as XFS_IOC_GOINGDOWN."""
WITHOUT_FLUSH = 2
"""EXT4_GOING_FLAGS_NOLOGFLUSH: not even the journal's running transaction reaches the disk."""


class Disk:
    """An ext4 file system in a file, whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "disk.img"
        self.mounted = folder / "mounted"
        self.mounted.mkdir()
        with self.image.open("wb") as file:
            file.truncate(48 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", str(self.image)], check=True)
        self.mount()

    def mount(self) -> None:
        # A commit interval beyond any test: what the periodic flush would save must not look like our doing.
        options = "loop,commit=600"
        subprocess.run(["mount", "-o", options, str(self.image), str(self.mounted)], check=True, capture_output=True)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.mounted)], check=True, capture_output=True)

    def cut_power(self) -> None:
        """Lose all that was not synced, and start again from what is on the disk."""
        descriptor = os.open(self.mounted, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", WITHOUT_FLUSH))
        finally:
            os.close(descriptor)
        self.unmount()
        self.mount()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a disk")
    if missing := [tool for tool in ("mkfs.ext4", "mount", "umount") if shutil.which(tool) is None]:
        pytest.skip(f"there is no {missing[0]}")
    try:
        disk = Disk(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no disk can be mounted here: {(error.stderr or b'').decode().strip()}")
    try:
        yield disk
    finally:
        disk.unmount()


def test_what_was_not_synced_is_lost_by_the_cut(disk: Disk) -> None:
    (disk.mounted / "unsynced").write_bytes(b"x" * 5000)
    disk.cut_power()
    assert not (disk.mounted / "unsynced").exists()


def test_an_atomic_write_that_returned_survives(disk: Disk) -> None:
    path = disk.mounted / "file"
    for number in range(5):
        atomic_write(path, f"{number}".encode())
        disk.cut_power()
        assert path.read_bytes() == f"{number}".encode()
    assert hidden(disk.mounted) == []


def test_a_new_run_and_its_first_checkpoint_survive_a_cut_right_after_the_save(disk: Disk) -> None:
    output = disk.mounted / "deep" / "runs"
    run = create_run(resolve_config([Layer("test", {"run": {"output_folder": str(output)}})]))
    save_step(run.checkpoints, 1)
    disk.cut_power()
    assert run.run_file.exists()
    assert newest(run.checkpoints) == 1


def test_every_save_that_returned_survives_a_cut_right_after_it(disk: Disk, campaign: bool, record: Record) -> None:
    folder = disk.mounted / "checkpoints"
    cuts = 40 if campaign else 6
    for step in range(1, cuts + 1):
        save_step(folder, step)
        if step % 2:
            prune_checkpoints(folder, 2)
        disk.cut_power()
        assert newest(folder) == step
    assert hidden(folder) == []
    record(3, "power cuts right after a save, less than a second old", f"{cuts} of {cuts} saves there afterwards")


def test_a_cut_in_the_middle_of_a_save_loses_that_save_at_most(
    disk: Disk, faults: FaultServer, campaign: bool, record: Record
) -> None:
    """The save is killed at a call and the power cut at once, so the disk holds what was synced up to that call."""
    folder = disk.mounted / "checkpoints"
    save_step(folder, 1)
    save_step(folder, 2)
    survived = with_new = 0
    step, at = 3, 1
    while True:
        outcome = faults.run(save, str(folder), step, 2, spoil=Spoil.kill(at))
        disk.cut_power()
        found = newest(folder)
        assert found in ({step} if outcome.value else {step - 1, step}), outcome.spoilt
        if not outcome.killed:
            break
        survived += 1
        with_new += found == step
        save_step(folder, step)
        prune_checkpoints(folder, 2)
        step, at = step + 1, at + (1 if campaign else 12)
    require_clean(folder, step)
    assert with_new > 0
    record(3, "power cuts in the middle of a save", f"{survived} of {survived} lost that save at most")


def require_clean(folder: Path, step: int) -> None:
    save_step(folder, step + 1)
    prune_checkpoints(folder, 2)
    assert hidden(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{n:08d}" for n in (step, step + 1)]
