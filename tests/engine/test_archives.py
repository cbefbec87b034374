"""ZIP archives as datasets: what is unpacked, what is refused, and what a crash leaves behind."""

from __future__ import annotations

import struct
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lorasmith.engine.dataset import archives
from lorasmith.engine.dataset.archives import UnpackedArchive, is_archive, open_archive
from lorasmith.engine.errors import DatasetError, StorageError
from lorasmith.engine.storage import cache_folder


def picture(color: str = "red") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def build(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return path


def files(unpacked: UnpackedArchive) -> dict[str, bytes]:
    return {
        path.relative_to(unpacked.folder).as_posix(): path.read_bytes()
        for path in unpacked.folder.rglob("*")
        if path.is_file()
    }


def reasons(unpacked: UnpackedArchive) -> dict[str, str]:
    return {refusal.relative: refusal.reason for refusal in unpacked.refused}


def left_over() -> list[str]:
    return sorted(path.name for path in (cache_folder() / "archives").glob(".*"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_ordinary_files_come_out_as_they_are(tmp_path: Path, compression: int) -> None:
    content = {"a.png": picture(), "10_dog/b.png": picture("blue"), "10_dog/b.txt": b"a dog", "ü 日本.txt": b"x"}
    unpacked = open_archive(build(tmp_path / "set.zip", content, compression))
    assert files(unpacked) == content
    assert unpacked.refused == ()
    assert unpacked.folder.is_relative_to(cache_folder())
    assert left_over() == []


def test_an_archive_is_unpacked_once_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_archive(build(tmp_path / "set.zip", {"a.png": picture(), "../b.png": picture()}))
    (tmp_path / "set.zip").rename(tmp_path / "other.zip")
    monkeypatch.setattr(archives, "_unpack", None)
    assert open_archive(tmp_path / "other.zip") == first


@pytest.mark.parametrize("harm", ["missing", "shorter", "contents"])
def test_what_is_no_longer_whole_is_unpacked_again(tmp_path: Path, harm: str) -> None:
    path = build(tmp_path / "set.zip", {"a.png": picture(), "b.txt": b"a dog"})
    folder = open_archive(path).folder
    if harm == "missing":
        (folder / "b.txt").unlink()
    elif harm == "shorter":
        (folder / "b.txt").write_bytes(b"a")
    else:
        (folder.parent / "contents.json").write_text('{"files": ')
    assert files(open_archive(path)) == {"a.png": picture(), "b.txt": b"a dog"}
    assert left_over() == []


def test_names_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    evil = ["../up.png", "a/../../up.png", "/root.png", "\\root.png", "C:\\up.png", "c:up.png", "..\\up.png", "a/.."]
    content = dict.fromkeys(evil, b"x")
    before = set(tmp_path.rglob("*"))
    unpacked = open_archive(build(tmp_path / "set.zip", content | {"good.png": picture()}))
    assert list(files(unpacked)) == ["good.png"]
    assert reasons(unpacked) == dict.fromkeys(evil, "its name leads out of the archive")
    outside = [path for path in set(tmp_path.rglob("*")) - before if not path.is_relative_to(cache_folder())]
    assert outside == [tmp_path / "set.zip"]


def test_backslashes_are_folders(tmp_path: Path) -> None:
    assert list(files(open_archive(build(tmp_path / "set.zip", {"10_dog\\a.txt": b"x"})))) == ["10_dog/a.txt"]


def test_strange_names_are_refused(tmp_path: Path) -> None:
    content = {"a\nb.png": b"x", "\x1b[2J.png": b"x", "l" * 300: b"x", "/".join(["d" * 200] * 6): b"x"}
    found = reasons(open_archive(build(tmp_path / "set.zip", content)))
    assert [found[name] for name in content] == ["its name holds control characters"] * 2 + ["its name is too long"] * 2


def test_names_in_unmarked_utf8_are_read_as_such(tmp_path: Path) -> None:
    path = build(tmp_path / "set.zip", {"ü.txt": b"x", "plain.txt": b"y"})
    data = path.read_bytes()
    for header, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.index(header) + offset
        data = data[:at] + struct.pack("<H", 0) + data[at + 2 :]
    path.write_bytes(data)
    assert set(files(open_archive(path))) == {"ü.txt", "plain.txt"}


def test_links_devices_and_encrypted_entries_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, mode in (("link.png", 0o120777), ("device", 0o020666), ("pipe", 0o010666), ("good.txt", 0o100644)):
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, b"/etc/passwd")
        archive.writestr("locked.png", b"secret")
    data = path.read_bytes()
    for header, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.rindex(header) + offset
        data = data[:at] + struct.pack("<H", 1) + data[at + 2 :]
    path.write_bytes(data)
    unpacked = open_archive(path)
    assert files(unpacked) == {"good.txt": b"/etc/passwd"}
    found = reasons(unpacked)
    assert found["link.png"] == "a link"
    assert found["device"] == found["pipe"] == "not an ordinary file"
    assert "encrypted" in found["locked.png"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_and_files_that_are_folders_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, data in (("a.txt", b"1"), ("a.txt", b"2"), ("./a.txt", b"3"), ("a.txt/b.txt", b"4"), ("c", b"5")):
            archive.writestr(name, data)
    unpacked = open_archive(tmp_path / "set.zip")
    assert files(unpacked) == {"a.txt": b"1", "c": b"5"}
    assert len(unpacked.refused) == 3


def test_bombs_are_refused_by_their_ratio_and_their_real_size(tmp_path: Path) -> None:
    zeros = bytes(archives.RATIO_FREE_BYTES + 1)
    path = build(tmp_path / "set.zip", {"bomb.bmp": zeros, "fair.txt": b"a" * 10_000})
    unpacked = open_archive(path)
    assert list(files(unpacked)) == ["fair.txt"]
    assert "200 times" in reasons(unpacked)["bomb.bmp"]


@pytest.mark.parametrize("says", [10, 70_000])
def test_what_comes_out_counts_and_not_what_the_header_says(tmp_path: Path, says: int) -> None:
    path = build(tmp_path / "set.zip", {"liar.txt": b"a" * 50_000, "fair.txt": b"x"})
    data = path.read_bytes()
    for header, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = data.index(header) + offset
        assert struct.unpack_from("<L", data, at) == (50_000,)
        data = data[:at] + struct.pack("<L", says) + data[at + 4 :]
    path.write_bytes(data)
    unpacked = open_archive(path)
    assert files(unpacked) == {"fair.txt": b"x"}
    assert "damaged in the archive" in reasons(unpacked)["liar.txt"]


def test_a_damaged_entry_costs_only_itself(tmp_path: Path) -> None:
    path = build(tmp_path / "set.zip", {"a.png": picture() * 9, "b.txt": b"a dog"}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[100] ^= 0xFF
    path.write_bytes(data)
    unpacked = open_archive(path)
    assert files(unpacked) == {"b.txt": b"a dog"}
    assert "damaged" in reasons(unpacked)["a.png"]


def test_overlapping_entries_are_refused(tmp_path: Path) -> None:
    path = build(tmp_path / "set.zip", {f"{index}.txt": b"x" * 3000 for index in range(3)}, zipfile.ZIP_STORED)
    data = path.read_bytes()
    for index in range(3):
        at = [at for at in range(len(data)) if data.startswith(b"PK\1\2", at)][index]
        data = data[: at + 20] + struct.pack("<LL", 9000, 9000) + data[at + 28 :]
    path.write_bytes(data)
    with pytest.raises(DatasetError, match="overlap"):
        open_archive(path)


def test_too_many_files_and_too_long_lists_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "set.zip", {f"{index}.txt": b"" for index in range(50)})
    with monkeypatch.context() as patch:
        patch.setattr(archives, "MAX_ENTRIES", 49)
        with pytest.raises(DatasetError, match="holds 50 files"):
            open_archive(path)
    with monkeypatch.context() as patch:
        patch.setattr(archives, "MAX_DIRECTORY_BYTES", 1000)
        with pytest.raises(DatasetError, match="list of files"):
            open_archive(path)
    with monkeypatch.context() as patch:
        patch.setattr(archives, "MAX_TOTAL_BYTES", -1)
        with pytest.raises(DatasetError, match="unpacks to"):
            open_archive(path)
    assert len(files(open_archive(path))) == 50


def test_a_full_disk_is_told_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "set.zip", {"a.txt": b"a dog", "b.txt": b"a cat"})
    with monkeypatch.context() as patch:
        patch.setattr(archives, "free_bytes", lambda _: 1)
        with pytest.raises(StorageError, match="10 bytes needed"):
            open_archive(path)

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(archives, "_write_entry", full)
        with pytest.raises(StorageError, match="disk is full"):
            open_archive(path)
    assert not list((cache_folder() / "archives").glob("*"))
    assert left_over() == []


def test_an_interrupted_unpacking_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "set.zip", {"a.txt": b"a dog", "b.txt": b"a cat"})
    write = archives._write_entry

    def interrupted(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> str:
        if entry.filename == "b.txt":
            raise KeyboardInterrupt
        return write(archive, entry, target)

    with monkeypatch.context() as patch:
        patch.setattr(archives, "_write_entry", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_archive(path)
    assert left_over() == []
    assert files(open_archive(path)) == {"a.txt": b"a dog", "b.txt": b"a cat"}


def test_what_a_killed_run_left_is_removed_when_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = cache_folder() / "archives" / ".abc.1234.tmp"
    (stale / "files").mkdir(parents=True)
    path = build(tmp_path / "set.zip", {"a.txt": b"a dog"})
    open_archive(path)
    assert stale.exists()
    monkeypatch.setattr(archives, "_STALE_SECONDS", -10)
    open_archive(path)
    assert not stale.exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4 and nothing more", b"PK\5\6" + b"\xff" * 18, b"not a zip"])
def test_what_is_no_archive_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.zip"
    path.write_bytes(content)
    assert is_archive(path)
    with pytest.raises(DatasetError, match=r"broken\.zip cannot be used") as caught:
        open_archive(path)
    assert caught.value.fix


def test_archives_are_known_by_name_or_first_bytes(tmp_path: Path) -> None:
    path = build(tmp_path / "set.ZIP", {"a.txt": b"x"})
    assert is_archive(path)
    assert is_archive(path.replace(tmp_path / "no_extension"))
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "folder.zip").mkdir()
    assert not any(is_archive(tmp_path / name) for name in ("a.png", "folder.zip", "absent.png"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("zip") / "set.zip"
    return build(path, {"a.png": picture(), "d/b.txt": b"a dog " * 50, "c.txt": b"x"}).read_bytes()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_archives_unpack_or_are_refused_but_never_escape(
    data: st.DataObject, whole: bytes, tmp_path: Path
) -> None:
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "fuzz.zip"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        unpacked = open_archive(path)
    except (DatasetError, StorageError) as error:
        assert error.why  # noqa: PT017 - either outcome is fine, without a reason it is not
        return
    assert all(path.is_relative_to(unpacked.folder.resolve()) for path in map(Path.resolve, unpacked.folder.rglob("*")))
    assert all(refusal.reason for refusal in unpacked.refused)
