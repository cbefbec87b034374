"""Walking folders: which names belong to the system, what folder names say, and names of any bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.engine.dataset.folders import FoundFiles, folder_repeats, list_files, named_repeats, printable


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(found: FoundFiles) -> list[str]:
    return sorted(relative for _, relative in found.files)


def test_files_of_all_folders_are_found_with_the_prefix(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / "x/y/b.png")
    found = list_files(tmp_path, [], "cats/")
    assert names(found) == ["cats/a.png", "cats/x/y/b.png"]
    assert all(path.is_file() for path, _ in found.files)


def test_system_names_are_counted_and_not_entered(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in (".git/x/y", "Thumbs.DB", "desktop.ini", "__MACOSX/._a", "a.png", "x/.b.txt")))
    found = list_files(tmp_path, [], "")
    assert names(found) == ["a.png"]
    assert found.system == 5


def test_other_folders_inside_are_not_entered(tmp_path: Path) -> None:
    touch(tmp_path / "a", tmp_path / "reg/b", tmp_path / "x/c")
    assert names(list_files(tmp_path, [tmp_path / "reg"], "")) == ["a", "x/c"]


def test_without_recursion_folders_are_refused_by_name_except_those_read_elsewhere(tmp_path: Path) -> None:
    touch(tmp_path / "a", tmp_path / "x/b", tmp_path / "y/c")
    found = list_files(tmp_path, [tmp_path / "y"], "p/", recursive=False)
    assert names(found) == ["p/a"]
    assert [refusal.relative for refusal in found.refused] == ["p/x"]


def test_a_deep_tree_is_walked_without_recursion_limits(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(300):
        folder = folder / "d"
    touch(folder / "a.png")
    assert names(list_files(tmp_path, [], "")) == ["d/" * 300 + "a.png"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("10_cat", (10, "cat")),
        ("10_sks cat_2", (10, "sks cat_2")),
        ("0_off", (0, "off")),
        ("3_", (3, "")),
        ("1000_x", (1000, "x")),
        ("1001_x", None),
        ("20240101_trip", None),
        ("cat_10", None),
        ("10cat", None),
        ("-3_x", None),
        ("٣_x", None),
    ],
)
def test_what_folder_names_say(name: str, expected: tuple[int, str] | None) -> None:
    assert named_repeats(name) == expected


def test_the_nearest_named_folder_counts() -> None:
    assert folder_repeats("10_a/x/3_b/y") == (3, "b")
    assert folder_repeats("10_a/x") == (10, "a")
    assert folder_repeats("") == (1, "")


@given(st.binary(max_size=20))
def test_any_name_becomes_printable_and_stays_if_it_is(data: bytes) -> None:
    text = printable(os.fsdecode(data))
    assert text.encode().decode() == text
    try:
        assert text == data.decode()
    except UnicodeDecodeError:
        assert "\\x" in text
