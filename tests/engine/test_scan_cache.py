"""What scans remember: never of other bytes than those that are there, and never at the price of a scan."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorasmith.engine.dataset import scan_cache, workers
from lorasmith.engine.dataset.examine import facts_from_json, facts_to_json
from lorasmith.engine.dataset.items import Measures, PictureFacts
from lorasmith.engine.dataset.scan_cache import ScanCache
from lorasmith.engine.dataset.workers import examine_pictures
from lorasmith.engine.storage import cache_folder

MINUTE = 60 * 10**9


def picture(path: Path, color: str = "red", size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """All scans happen a minute after the files were written."""
    clock = time.time_ns
    monkeypatch.setattr(scan_cache.time, "time_ns", lambda: clock() + MINUTE)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were given to children."""
    names: list[str] = []
    results = workers._Crew.results

    def noted(self: workers._Crew) -> object:
        names.extend(path.name for _, path in self.files)
        return results(self)

    monkeypatch.setattr(workers._Crew, "results", noted)
    return names


@pytest.mark.usefixtures("later")
def test_an_unchanged_file_is_not_even_read_again(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [picture(tmp_path / "a.png"), tmp_path / "b.png"]
    paths[1].write_bytes(b"no picture")
    first = examine_pictures(paths)
    assert decoded == ["a.png", "b.png"]
    monkeypatch.setattr(scan_cache.hashlib, "file_digest", None)
    assert examine_pictures(paths) == first
    assert decoded == ["a.png", "b.png"]
    assert "no real .png" in str(first[1])


@pytest.mark.usefixtures("later")
def test_a_changed_file_is_decoded_again_even_with_the_old_size_and_time(tmp_path: Path, decoded: list[str]) -> None:
    path = tmp_path / "a.bmp"
    picture(path)
    before = path.stat()
    first = examine_pictures([path])
    picture(path, "blue")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert examine_pictures([path]) != first
    assert decoded == ["a.bmp", "a.bmp"]


def test_a_file_that_was_just_written_is_compared_by_its_content(tmp_path: Path, decoded: list[str]) -> None:
    path = picture(tmp_path / "a.bmp")
    first = examine_pictures([path])
    with sqlite3.connect(cache_folder() / "scan" / "facts.sqlite") as database:
        assert database.execute("SELECT count(*) FROM files").fetchone() == (0,)
    database.close()
    assert examine_pictures([path]) == first
    assert decoded == ["a.bmp"]
    # A change within one step of the file system's clock leaves no trace in the times.
    status = path.stat()
    picture(path, "blue")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert examine_pictures([path]) != first


@pytest.mark.usefixtures("later")
def test_moved_and_touched_files_are_not_decoded_again(tmp_path: Path, decoded: list[str]) -> None:
    paths = [picture(tmp_path / "one" / f"{number}.png", size=(number + 1, 3)) for number in range(4)]
    first = examine_pictures(paths)
    (tmp_path / "one").rename(tmp_path / "two")
    moved = [tmp_path / "two" / path.name for path in paths]
    os.utime(moved[0])
    shutil.copy(moved[1], tmp_path / "copy.png")
    assert examine_pictures([*moved, tmp_path / "copy.png"]) == [*first, first[1]]
    assert len(decoded) == 4


@pytest.mark.usefixtures("later")
def test_the_same_bytes_under_another_extension_have_their_own_remarks(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    examine_pictures([path])
    shutil.copy(path, tmp_path / "a.jpg")
    found = examine_pictures([tmp_path / "a.jpg", path])
    assert [fact.notes for fact in found if isinstance(fact, PictureFacts)] == [
        ("named .jpg, but is a PNG file",),
        (),
    ]


@pytest.mark.usefixtures("later")
def test_refusals_that_the_disk_or_a_limit_caused_are_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [picture(tmp_path / "large.bmp", size=(4000, 4000)), tmp_path / "absent.png"]
    with monkeypatch.context() as patch:
        patch.setattr(workers, "MEMORY_BYTES", workers.CHILD_BYTES + (20 << 20))
        assert examine_pictures(paths) == ["not enough memory to decode it", "No such file or directory"]
    picture(paths[1])
    found = examine_pictures(paths)
    assert all(isinstance(fact, PictureFacts) for fact in found), found


@pytest.mark.usefixtures("later")
def test_another_version_of_the_decoder_forgets_everything(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(tmp_path / "a.png")
    examine_pictures([path])
    for name in ("DECODE_VERSION", "MEASURES_VERSION"):
        monkeypatch.setattr(scan_cache, name, "next")
        examine_pictures([path])
        examine_pictures([path])
    monkeypatch.setattr(scan_cache, "find_spec", lambda name: None)
    examine_pictures([path])
    assert decoded == ["a.png"] * 4


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("harm", ["foreign", "torn", "empty", "values", "folder"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, decoded: list[str], harm: str) -> None:
    paths = [picture(tmp_path / f"{number}.png", size=(number + 1, 2)) for number in range(20)]
    first = examine_pictures(paths)
    file = cache_folder() / "scan" / "facts.sqlite"
    content = file.read_bytes()
    if harm == "foreign":
        file.write_bytes(b"something else entirely" * 1000)
    elif harm == "torn":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "values":
        database = sqlite3.connect(file)
        database.execute("UPDATE files SET result = '{\"width\": 3}'")
        database.execute("UPDATE contents SET result = 'x'")
        database.commit()
        database.close()
    else:
        file.unlink()
        file.mkdir()
    assert examine_pictures(paths) == first
    assert len(decoded) == 40
    assert examine_pictures(paths) == first
    if harm not in ("folder", "torn"):
        assert len(decoded) == 40


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("call", ["connect", "executemany"])
def test_a_full_or_read_only_disk_costs_time_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = picture(tmp_path / "a.png")
    connect = sqlite3.connect

    class Full(sqlite3.Connection):
        def executemany(self, *_: object) -> sqlite3.Cursor:
            raise sqlite3.OperationalError("database or disk is full")

    def refuse(*arguments: object, **options: object) -> sqlite3.Connection:
        if call == "connect":
            raise sqlite3.OperationalError("unable to open database file")
        return connect(*arguments, factory=Full, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(scan_cache.sqlite3, "connect", refuse)
    first = examine_pictures([path])
    assert isinstance(first[0], PictureFacts)
    assert examine_pictures([path]) == first


def test_a_cache_folder_that_cannot_be_made_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "file" / "cache"))
    assert isinstance(examine_pictures([picture(tmp_path / "a.png")])[0], PictureFacts)


@pytest.mark.usefixtures("later")
def test_a_file_that_another_program_has_locked_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_cache, "_LOCK_SECONDS", 0.01)
    path = picture(tmp_path / "a.png")
    first = examine_pictures([path])
    database = sqlite3.connect(cache_folder() / "scan" / "facts.sqlite")
    database.execute("BEGIN EXCLUSIVE")
    assert examine_pictures([path]) == first
    database.close()
    assert (cache_folder() / "scan" / "facts.sqlite").stat().st_size > 0


@pytest.mark.usefixtures("later")
def test_an_interrupted_scan_keeps_what_it_found(tmp_path: Path, decoded: list[str]) -> None:
    paths = [picture(tmp_path / f"{number}.png") for number in range(12)]

    def stop(done: int, _: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine_pictures(paths, stop)
    decoded.clear()
    examine_pictures(paths)
    assert len(decoded) <= 12 - 7


@pytest.mark.usefixtures("later")
def test_a_file_grown_too_large_starts_anew(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(tmp_path / "a.png")
    examine_pictures([path])
    monkeypatch.setattr(scan_cache, "MAX_BYTES", 10)
    examine_pictures([path])
    assert decoded == ["a.png", "a.png"]


def test_scans_at_the_same_time_do_not_harm_each_other(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / f"{number}.png", size=(number + 1, 4))
    code = f"""
from pathlib import Path
from lorasmith.engine.dataset.workers import examine_pictures
for _ in range(4):
    found = examine_pictures(sorted(Path({str(tmp_path)!r}).glob("*.png")))
    assert [fact.width for fact in found] == [1, 2, 3, 4, 5, 6], found
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [run.communicate(timeout=120)[1] for run in runs] == ["", "", ""]


@given(
    st.builds(
        PictureFacts,
        sha256=st.text(max_size=5),
        width=st.integers(1, 10**6),
        height=st.integers(1, 10**6),
        format=st.text(max_size=5),
        transparent=st.booleans(),
        notes=st.lists(st.text(max_size=9), max_size=3).map(tuple),
        measures=st.builds(
            Measures,
            perceptual_hash=st.integers(0, 2**64 - 1),
            sharpness=st.floats(0, 2),
            brightness=st.floats(0, 1),
            contrast=st.floats(0, 1),
            border=st.floats(0, 1),
            jpeg_quality=st.none() | st.integers(1, 100),
        ),
    )
)
def test_facts_come_back_as_they_were(facts: PictureFacts) -> None:
    assert facts_from_json(facts_to_json(facts)) == facts


def test_what_was_not_looked_up_is_not_written(tmp_path: Path) -> None:
    with ScanCache(tmp_path) as cache:
        assert cache.look_up([tmp_path / "absent.png"]) == [None]
        cache.remember(0, "No such file")
    with sqlite3.connect(tmp_path / "facts.sqlite") as database:
        assert database.execute("SELECT count(*) FROM files").fetchone() == (0,)
    database.close()
