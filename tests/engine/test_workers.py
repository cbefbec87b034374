"""Decoding in children: every file gets its answer, whatever happens to the child that was at it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

from lorasmith.engine.dataset import workers
from lorasmith.engine.dataset.examine import examine_picture
from lorasmith.engine.dataset.items import PictureFacts
from lorasmith.engine.dataset.workers import examine_pictures
from lorasmith.engine.errors import DatasetError

# Loaded by every Python that starts with it on its path: gives files with certain names a decoder that misbehaves.
FAULTS = """
import ctypes, os, signal, time
from PIL import Image

real_open = Image.open

def faulty_open(file, *arguments, **options):
    name = os.path.basename(file.name)
    if "abort" in name:
        os.abort()
    if "crash" in name:
        ctypes.string_at(0)
    if "leave" in name:
        os._exit(0)
    if "sleep" in name:
        time.sleep(600)
    if "spin" in name:
        while True:
            pass
    if "deaf" in name:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if "noise" in name:
        os.write(1, b"{} noise on stdout\\n")
        os.write(2, b"noise on stderr\\n")
    if "hog" in name:
        hog = [bytearray(1 << 24) for _ in range(200)]
    return real_open(file, *arguments, **options)

Image.open = faulty_open
"""


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "faults"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(workers, "FILE_SECONDS", 0.4)
    monkeypatch.setattr(workers, "_POLL_SECONDS", 0.05)


def picture(path: Path, color: str = "red", size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, color).save(path)
    return path


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_answers_come_in_the_order_of_the_paths(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{number}.png", size=(number + 1, 5)) for number in range(40)]
    (tmp_path / "7.png").write_bytes(b"no picture")
    paths += [tmp_path / "absent.png", tmp_path / "3.png"]
    seen: list[tuple[int, int]] = []
    found = examine_pictures(paths, lambda done, total: seen.append((done, total)))
    assert [fact.width if isinstance(fact, PictureFacts) else fact for fact in found] == [
        *range(1, 8), "damaged, or no real .png file", *range(9, 41), "No such file or directory", 4,
    ]  # fmt: skip
    assert found[3] == examine_picture(paths[3])
    assert seen == [(done, 42) for done in range(1, 43)]
    assert children() == []


def test_no_files_are_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.subprocess, "Popen", None)
    assert examine_pictures([]) == []


def test_strange_names_and_relative_paths_reach_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [os.fsdecode(b"latin-\xe9.png"), "new\nline.png", "esc\x1b[2J.png", "キャット🐈.png", '"{}.png', " .png"]
    for name in names:
        picture(tmp_path / "data" / name)
    monkeypatch.chdir(tmp_path)
    assert all(isinstance(fact, PictureFacts) for fact in examine_pictures([Path("data") / name for name in names]))


@pytest.mark.usefixtures("faults")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("abort", "crashes the decoder"),
        ("crash", "crashes the decoder"),
        ("leave", "crashes the decoder"),
        ("sleep", "took too long"),
        ("spin", "took too long"),
        ("deaf", "took too long"),
        ("hog", "not enough memory"),
    ],
)
def test_a_file_that_brings_its_child_down_is_refused_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    paths = [picture(tmp_path / f"{number}.png") for number in range(6)]
    paths[2] = picture(tmp_path / f"{name}.png")
    monkeypatch.setattr(workers, "MEMORY_BYTES", workers.CHILD_BYTES + (48 << 20))  # soon filled
    found = examine_pictures(paths)
    assert reason in str(found[2])
    assert all(isinstance(fact, PictureFacts) for index, fact in enumerate(found) if index != 2)
    assert children() == []


@pytest.mark.usefixtures("faults")
def test_files_that_all_misbehave_are_all_refused(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{number}-{('abort', 'leave')[number % 2]}.png") for number in range(5)]
    assert all("crashes" in str(fact) for fact in examine_pictures(paths))


@pytest.mark.usefixtures("faults")
def test_what_a_decoder_prints_reaches_neither_the_screen_nor_the_answers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = [picture(tmp_path / f"noise-{number}.png", size=(number + 1, 2)) for number in range(4)]
    found = examine_pictures(paths)
    assert [fact.width for fact in found if isinstance(fact, PictureFacts)] == [1, 2, 3, 4]
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("faults")
def test_a_child_that_waits_for_the_processor_is_given_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers._Child, "_usage", lambda self: (0.0, True))
    monkeypatch.setattr(workers, "BUSY_SECONDS", 1.5)
    waits: list[float] = []
    stuck = workers._Child._is_stuck
    monkeypatch.setattr(workers._Child, "_is_stuck", lambda self: waits.append(0) or stuck(self))
    found = examine_pictures([picture(tmp_path / "spin.png"), picture(tmp_path / "a.png")])
    assert "too long" in str(found[0])
    assert isinstance(found[1], PictureFacts)
    assert len(waits) > 0.8 / 0.05  # looked at for longer than FILE_SECONDS


def test_pictures_that_need_much_memory_wait_for_fewer_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[tuple[int, int, int]] = []
    crew = workers._Crew.results

    def noted(self: workers._Crew) -> object:
        rounds.append((self.num, self.memory >> 20, len(self.files)))
        return crew(self)

    monkeypatch.setattr(workers._Crew, "results", noted)
    monkeypatch.setattr(workers, "num_children", lambda: 4)
    monkeypatch.setattr(workers, "MEMORY_BYTES", 4 * (workers.CHILD_BYTES + (16 << 20)))
    paths = [picture(tmp_path / f"{number}.png") for number in range(30)]
    paths[5] = picture(tmp_path / "large.png", size=(3000, 2000))  # 30 MB by estimate
    paths[6] = picture(tmp_path / "huge.bmp", size=(6000, 4000))  # 120 MB
    found = examine_pictures(paths)
    assert all(isinstance(fact, PictureFacts) for fact in found)
    assert rounds == [(4, 16, 30), (2, 96, 2), (1, 256, 1)]


def test_a_picture_that_no_child_has_memory_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MEMORY_BYTES", workers.CHILD_BYTES + (40 << 20))
    found = examine_pictures([picture(tmp_path / "huge.bmp", size=(6000, 4000)), picture(tmp_path / "a.png")])
    assert found[0] == "not enough memory to decode it"
    assert isinstance(found[1], PictureFacts)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_scan_leaves_no_child(tmp_path: Path, error: type[BaseException]) -> None:
    def stop(done: int, _: int) -> None:
        if done == 5:
            assert children()
            raise error

    paths = [picture(tmp_path / f"{number}.png") for number in range(30)]
    with pytest.raises(error):
        examine_pictures(paths, stop)
    assert children() == []


def test_children_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    for number in range(40):
        picture(tmp_path / f"{number}.png")
    code = f"""
import os, signal, sys, psutil
from pathlib import Path
from lorasmith.engine.dataset.workers import examine_pictures

def kill(done, total):
    if done == 9:
        print(*[child.pid for child in psutil.Process().children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

examine_pictures(sorted(Path({str(tmp_path)!r}).glob("*.png")), kill)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids
    assert done.stderr == ""
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert psutil.wait_procs(left, timeout=20)[1] == []


def test_a_child_that_cannot_start_is_an_error_and_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    with pytest.raises(DatasetError, match="cannot be decoded") as caught:
        examine_pictures([picture(tmp_path / "a.png")])
    assert caught.value.fix


@pytest.mark.parametrize("line", [b"[]", b"nonsense", b'{"facts": {"width": 3}}', b"{}", b"\xff"])
def test_answers_that_make_no_sense_refuse_the_file(line: bytes) -> None:
    assert "makes no sense" in workers._parse(line)["refused"]


def test_there_is_a_child_for_each_processor_but_not_for_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(3))
    assert workers.num_children() == 3
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(300))
    assert workers.num_children() == workers.MAX_CHILDREN
