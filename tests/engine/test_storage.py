from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from lorasmith.engine import storage
from lorasmith.engine.errors import StorageError
from lorasmith.engine.storage import (
    atomic_write,
    checkpoint_bytes,
    readable_size,
    require_writable,
    storage_error,
)


def test_atomic_write_replaces_the_old_content_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "état 日本.json"
    atomic_write(path, b"old")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_atomic_write_gives_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_full_disk_keeps_the_old_file_and_names_path_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(StorageError, match=r"disk is full.*file \(3 bytes needed, \d+ bytes free\)"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_require_writable_makes_the_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b", 1000)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_require_writable_refuses_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="Cannot write to the output folder"):
        require_writable(tmp_path / "file" / "runs", 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_require_writable_refuses_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Cannot write to the output folder"):
            require_writable(tmp_path, 0)
    finally:
        tmp_path.chmod(0o700)


def test_require_writable_says_both_sizes_where_the_disk_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"about 1048576\.0 GiB are needed, [\d.]+ \w+ are free"):
        require_writable(tmp_path, 2**50)


def test_a_running_average_adds_one_more_copy_of_the_weights_to_a_checkpoint() -> None:
    with_average = checkpoint_bytes(1_000_000, "adamw", averaged=True)
    assert with_average - checkpoint_bytes(1_000_000, "adamw") == 4_000_000


def test_a_disk_that_offers_no_sync_is_written_to_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(storage.os, "fsync", unsupported)
    atomic_write(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_disk_without_a_nameless_file_is_tried_with_a_named_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(storage.os, "O_TMPFILE")
    require_writable(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EROFS, "only be read"), (errno.EMFILE, "ulimit"), (errno.EIO, "dmesg"), (errno.EACCES, "permissions")],
)
def test_each_error_of_the_disk_has_its_own_advice_and_no_space_is_no_excuse(
    tmp_path: Path, number: int, advice: str
) -> None:
    error = storage_error(tmp_path / "x", 2**60, OSError(number, os.strerror(number)))
    assert "disk is full" not in error.what
    assert f"{2**60} bytes needed" in error.what
    assert advice in error.fix


def test_other_write_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    error = storage_error(tmp_path / "x", 10, PermissionError(errno.EACCES, "Permission denied"))
    assert "disk is full" not in error.what
    assert error.why == "Permission denied"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (2048, "2.0 KiB"), (3 * 2**30, "3.0 GiB"), (2**41, "2048.0 GiB")]
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert readable_size(size) == text
