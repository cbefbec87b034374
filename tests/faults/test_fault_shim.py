"""The tool of the fault tests is itself tested: it sees what strace sees, and spoils what it says."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.faults.checkpoint_scenarios import save
from tests.faults.fault_server import SOURCE, Fault, FaultServer, Spoil

HARMLESS = {"lseek", "ioctl", "fcntl", "fadvise64", "munmap", "readlink"}
"""Calls that strace shows and the shim need not: they change nothing on the disk and read no content."""

TRACED = """
import os, sys
from tests.faults.checkpoint_scenarios import save
from tests.faults.fault_server import Fault
class Unarmed:
    def armed(self, folder):
        os.access("/begin", os.F_OK)
        return self
    def __enter__(self): pass
    def __exit__(self, *_): os.access("/end", os.F_OK)
for step in (1, 2):
    save(Unarmed(), sys.argv[1], step, 1)
"""


def strace_calls(folder: Path, log: Path) -> list[str]:
    """Return the names of the calls below `folder` that strace sees in the second of two saves."""
    command = ["strace", "-f", "-y", "-s", "4096", "--seccomp-bpf", "-o", str(log)]
    command += ["-e", "trace=%file,%desc", sys.executable, "-c", TRACED, str(folder)]
    subprocess.run(command, check=True, timeout=120, cwd=SOURCE.parents[2])
    text = log.read_text(errors="replace").split('"/begin"')[2].split('"/end"')[0]
    return [line.split()[1].partition("(")[0] for line in text.splitlines()[1:] if str(folder) in line]


@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace")
def test_the_shim_sees_every_call_of_a_save_that_strace_sees(faults: FaultServer, tmp_path: Path) -> None:
    seen = [name for name in strace_calls(tmp_path / "strace", tmp_path / "log") if name not in HARMLESS]
    spoil = Spoil(reads=True)
    for step in (1, 2):
        outcome = faults.run(save, str(tmp_path / "shim"), step, 1, spoil=spoil)
    assert [name for name, _ in outcome.calls] == seen
    assert {"renameat", "fsync", "mkdir", "write", "unlinkat"} <= set(seen)


def write_twice(fault: Fault, folder: str) -> list[str]:
    told = []
    with fault.armed(folder):
        for name in ("one", "two"):
            try:
                Path(folder, name).write_bytes(b"12345678")
            except OSError as error:
                told.append(errno.errorcode[error.errno or 0])
    return told


def test_an_error_hits_the_call_that_was_named_and_no_other(faults: FaultServer, tmp_path: Path) -> None:
    whole = faults.run(write_twice, str(tmp_path))
    assert [name for name, _ in whole.calls] == ["openat", "write", "close"] * 2
    once = faults.run(write_twice, str(tmp_path), spoil=Spoil.error(2, errno.ENOSPC))
    assert (once.value, once.spoilt) == (["ENOSPC"], ("write", str(tmp_path / "one")))
    ever = faults.run(write_twice, str(tmp_path), spoil=Spoil.error(2, errno.EROFS, forever=True))
    assert ever.value == ["EROFS", "EROFS"]


def test_a_plausible_error_passes_over_calls_that_cannot_meet_it(faults: FaultServer, tmp_path: Path) -> None:
    outcome = faults.run(write_twice, str(tmp_path), spoil=Spoil.error(2, errno.EMFILE, plausible=True))
    assert (outcome.value, outcome.spoilt) == (["EMFILE"], ("openat", str(tmp_path / "two")))


@pytest.mark.parametrize(("after", "left"), [(False, b""), (True, b"12345678")])
def test_a_kill_comes_before_or_after_the_call(faults: FaultServer, tmp_path: Path, after: bool, left: bytes) -> None:
    outcome = faults.run(write_twice, str(tmp_path), spoil=Spoil.kill(2, after=after))
    assert outcome.killed
    assert (tmp_path / "one").read_bytes() == left
    assert not (tmp_path / "two").exists()


def write_raw(fault: Fault, folder: str) -> int:
    descriptor = os.open(Path(folder, "raw"), os.O_WRONLY | os.O_CREAT)
    with fault.armed(folder):
        return os.write(descriptor, b"12345678")


def test_a_short_write_writes_half(faults: FaultServer, tmp_path: Path) -> None:
    assert faults.run(write_raw, str(tmp_path), spoil=Spoil.short(1)).value == 4
    assert (tmp_path / "raw").read_bytes() == b"1234"


def write_in_thread(fault: Fault, folder: str) -> None:
    """Also starts a program, which the filter must leave alone."""
    with fault.armed(folder):
        subprocess.run([sys.executable, "-Ic", "open('/dev/null').read()"], check=True)
        thread = threading.Thread(target=Path(folder, "thread").write_bytes, args=(b"",))
        thread.start()
        thread.join()


def test_threads_are_seen_and_other_programs_left_alone(faults: FaultServer, tmp_path: Path) -> None:
    outcome = faults.run(write_in_thread, str(tmp_path))
    assert outcome.error == ""
    assert [name for name, _ in outcome.calls] == ["openat", "close"]
