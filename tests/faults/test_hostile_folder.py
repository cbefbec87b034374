"""A folder of some hundred hostile files is scanned to its end: nothing crashes, hangs, prints, grows or is changed."""

from __future__ import annotations

import hashlib
import json
import os
import select
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorasmith.engine.dataset.workers import FILE_SECONDS, num_children
from tests.hostile import build_hostile_folder

SCAN = """
import json, resource, sys
from pathlib import Path

import psutil

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.scan import scan_dataset

def cpu_seconds():
    total = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = total.ru_utime + total.ru_stime
    for child in psutil.Process().children():
        times = child.cpu_times()
        seconds += times.user + times.system
    return seconds

seen, seconds = [], [0.0]

def progress(done, total):
    seen.append((done, total))
    seconds.append(cpu_seconds())

dataset = scan_dataset(DatasetSettings(folder=sys.argv[1]), progress)
Path(sys.argv[2]).write_text(json.dumps({
    "accepted": [item.relative for item in dataset.items],
    "refused": {refusal.relative: refusal.reason for refusal in dataset.refused},
    "found": dataset.found,
    "system": dataset.system,
    "in_order": seen == [(done, seen[0][1]) for done in range(1, seen[0][1] + 1)],
    "slowest": max(after - before for before, after in zip(seconds, seconds[1:])),
    # Not ru_maxrss: that starts with the size of the process that started this one.
    "parent_kib": int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]),
}))
"""


def state(folder: Path) -> dict[str, tuple[object, ...]]:
    """What the scan must leave as it is: kinds, modes, times, link targets, and the bytes of all ordinary files."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        content = ""
        if stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK) and status.st_blocks < 1 << 20:
            with path.open("rb") as file:
                content = hashlib.sha256(file.read(1 << 22)).hexdigest()
        elif path.is_symlink():
            content = os.readlink(path)
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns, content)
    return found


def scan_in_a_terminal(folder: Path, answer: Path) -> tuple[int, bytes, int]:
    """Scan in a process of its own on a terminal; return its exit code, what the terminal showed, the peak bytes."""
    shown, peak = b"", 0
    master, slave = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCAN, str(folder), str(answer)], stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    try:
        while process.poll() is None:
            if select.select([master], [], [], 0.02)[0]:
                try:
                    shown += os.read(master, 1 << 16)
                except OSError:  # the terminal's last user is gone
                    process.wait(timeout=60)
            peak = max(peak, tree_bytes(process.pid))
    finally:
        process.kill()
        process.wait()
        os.close(master)
    return process.returncode, shown, peak


def tree_bytes(pid: int) -> int:
    total = 0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:
        return total
    return total


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The folder, its state before and after, and everything that its scan told."""
    root = tmp_path_factory.mktemp("hostile")
    folder = root / "data"
    num_files = build_hostile_folder(folder)
    before = state(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORASMITH_CACHE", str(root / "cache"))
        code, shown, peak = scan_in_a_terminal(folder, root / "answer.json")
    after = state(folder)
    assert (code, shown) == (0, b""), shown.decode(errors="replace")
    found: dict[str, Any] = json.loads((root / "answer.json").read_text())
    return found | {"files": num_files, "before": before, "after": after, "peak": peak}


def test_hundreds_of_hostile_files_are_all_accounted_for(scanned: dict[str, Any]) -> None:
    assert scanned["files"] >= 300
    assert len(scanned["accepted"]) + len(scanned["refused"]) == scanned["found"]
    assert len(scanned["accepted"]) >= 50
    assert all(scanned["refused"].values())
    assert scanned["in_order"]


def test_whole_pictures_are_used_and_broken_ones_refused(scanned: dict[str, Any]) -> None:
    accepted, refused = set(scanned["accepted"]), set(scanned["refused"])
    whole = {path.rpartition("/")[2] for path in (*accepted, *refused) if path.startswith("whole/")}
    assert {f"whole/{name}" for name in whole} <= accepted
    assert {path for path in refused if path.startswith(("noise/", "cut/plain-0.1"))}
    assert not {path for path in accepted if path.startswith(("noise/", "wrong_names/empty", "wrong_names/words"))}
    assert scanned["refused"]["odd_pngs/most-pixels.png"].startswith("larger than")
    assert scanned["refused"]["special/sparse.png"].startswith("larger than")
    assert scanned["refused"]["special/pipe.png"] == "not an ordinary file"


def test_no_file_takes_longer_than_its_time(scanned: dict[str, Any]) -> None:
    # Processor time of all children between two answers: wall time would measure what else the machine does.
    assert scanned["slowest"] < (FILE_SECONDS + 0.5) * num_children()


def test_the_scan_stays_below_one_gib_with_all_its_children(scanned: dict[str, Any]) -> None:
    assert scanned["peak"] > 100 << 20, "the bombs were not even tried"
    assert scanned["peak"] < 1 << 30
    assert scanned["parent_kib"] < 200 << 10


def test_the_dataset_folder_is_left_as_it_was(scanned: dict[str, Any]) -> None:
    assert scanned["after"] == scanned["before"]
