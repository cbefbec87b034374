"""Scanning a dataset: every file is accepted or refused with a reason, and nothing there is touched."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.scan import missing_captions, require_captions, scan_dataset
from lorasmith.engine.errors import DatasetError
from tests.engine.datasets import by_name, picture, reasons, scan


def test_folders_are_read_with_all_below_and_repeats_come_from_their_names(tmp_path: Path) -> None:
    for name in (
        "a.png",
        "10_cat/b.png",
        "10_cat/deep/c.png",
        "10_cat/3_best/d.png",
        "20240101_trip/e.png",
        "_5/f.png",
    ):
        picture(tmp_path / name)
    items = by_name(scan(tmp_path, repeats=2))
    assert {name: item.repeats for name, item in items.items()} == {
        "a.png": 2, "10_cat/b.png": 20, "10_cat/deep/c.png": 20, "10_cat/3_best/d.png": 6, "20240101_trip/e.png": 2,
        "_5/f.png": 2,
    }  # fmt: skip


def test_a_folder_with_zero_repeats_is_refused_and_not_forgotten(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "0_off/b.png")
    assert "0 repeats" in reasons(scan(tmp_path))["0_off/b.png"]


def test_facts_of_an_accepted_picture(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", (20, 10), caption="a dog")
    item = scan(tmp_path).items[0]
    assert (item.width, item.height) == (20, 10)
    assert item.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (item.caption, item.caption_path) == ("a dog", tmp_path / "a.txt")
    assert not item.transparent


def test_sizes_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    item = scan(tmp_path).items[0]
    assert (item.width, item.height) == (10, 20)


@pytest.mark.parametrize("extension", [".txt", ".TXT", ".Txt", ".caption", ".CAPTION"])
def test_captions_are_found_in_any_case(tmp_path: Path, extension: str) -> None:
    picture(tmp_path / "a.v2.png")
    (tmp_path / f"a.v2{extension}").write_text("a dog")
    dataset = scan(tmp_path)
    assert dataset.items[0].caption == "a dog"
    assert dataset.found == 1


def test_captions_match_whichever_way_accents_are_stored(tmp_path: Path) -> None:
    picture(tmp_path / unicodedata.normalize("NFD", "über.png"))
    (tmp_path / unicodedata.normalize("NFC", "über.txt")).write_text("a dog")
    assert scan(tmp_path).items[0].caption == "a dog"


def test_a_caption_in_windows_encoding_is_read_with_a_note(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("a “red” dog".encode("cp1252"))
    item = scan(tmp_path).items[0]
    assert item.caption == "a “red” dog"
    assert "Windows-1252" in item.notes[0]


def test_an_empty_caption_is_a_caption_with_a_note(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="")
    dataset = scan(tmp_path)
    assert dataset.items[0].caption == ""
    assert dataset.items[0].notes == ("caption a.txt: empty",)
    assert missing_captions(dataset) == ()


def test_captions_that_are_not_used_are_refused_with_a_reason(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="used")
    (tmp_path / "a.caption").write_text("second choice")
    (tmp_path / "lonely.txt").write_text("no picture")
    (tmp_path / "bad.png").write_text("no picture either")
    (tmp_path / "bad.txt").write_text("its caption")
    picture(tmp_path / "b.png")
    (tmp_path / "b.txt").write_bytes(b"\0\1\2")
    dataset = scan(tmp_path)
    assert by_name(dataset)["a.png"].caption == "used"
    assert by_name(dataset)["b.png"].caption is None
    found = reasons(dataset)
    assert found["a.caption"] == "not used as a caption: a.txt is"
    assert found["lonely.txt"] == "caption without a picture of the same name"
    assert found["bad.txt"] == "caption of a picture that is not used"
    assert found["b.txt"] == "not used as a caption: not a text file"
    assert dataset.found == len(dataset.items) + len(dataset.refused) == 7


def test_foreign_damaged_and_special_files_are_refused_by_name(tmp_path: Path) -> None:
    picture(tmp_path / "good.png")
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:50])
    (tmp_path / "movie.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 99)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    dataset = scan(tmp_path)
    assert [item.relative for item in dataset.items] == ["good.png"]
    assert set(reasons(dataset)) == {"zero.jpg", "cut.png", "movie.mp4", "gone.png", "pipe"}
    assert reasons(dataset)["movie.mp4"] == "not a picture"
    assert all(reasons(dataset).values())


def test_hidden_and_system_files_are_no_part_of_the_dataset(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for name in (".DS_Store", "Thumbs.db", "Desktop.ini", ".git/x.png", "__MACOSX/a.png", "._a.png", ".a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    dataset = scan(tmp_path)
    assert dataset.found == 1
    assert dataset.refused == ()


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere/far.png", color="blue")
    picture(tmp_path / "data/a.png")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/up").symlink_to(tmp_path)
    (tmp_path / "data/self").symlink_to(tmp_path / "data/self")
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/link2").symlink_to(tmp_path / "elsewhere")
    dataset = scan(tmp_path / "data")
    assert [item.relative for item in dataset.items] == ["a.png", "link/far.png"]
    assert set(reasons(dataset)) == {"loop", "up", "self", "link2"}
    assert dataset.found == 6


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_that_may_not_be_read_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "secret/b.png")
    (tmp_path / "secret").chmod(0)
    try:
        assert "cannot be read" in reasons(scan(tmp_path))["secret"]
    finally:
        (tmp_path / "secret").chmod(0o700)


def test_folders_that_fail_while_reading_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "secret/b.png")
    scandir = os.scandir

    def deny(path: Path) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    dataset = scan(tmp_path)
    assert reasons(dataset) == {"secret": "the folder cannot be read: Permission denied"}
    assert dataset.found == 2


def test_regularization_pictures_are_scanned_the_same_way_and_never_twice(tmp_path: Path) -> None:
    picture(tmp_path / "data/a.png", caption="a zqx dog")
    picture(tmp_path / "data/regular/2_dog/r.png", color="blue", caption="a dog")
    (tmp_path / "data/regular/x.md").write_text("x")
    dataset = scan(tmp_path / "data", regularization_folder=str(tmp_path / "data/regular"))
    assert [(item.relative, item.regularization, item.repeats) for item in dataset.items] == [
        ("a.png", False, 1),
        ("regular/2_dog/r.png", True, 2),
    ]
    assert reasons(dataset) == {"regular/x.md": "not a picture"}
    assert dataset.found == 3


def test_a_regularization_folder_around_the_dataset_leaves_the_dataset_out(tmp_path: Path) -> None:
    picture(tmp_path / "data/a.png")
    picture(tmp_path / "r.png", color="blue")
    dataset = scan(tmp_path / "data", regularization_folder=str(tmp_path))
    assert [item.regularization for item in dataset.items] == [False, True]


def test_the_same_folder_for_both_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="same folder"):
        scan(tmp_path, regularization_folder=str(tmp_path / "."))


def test_non_ascii_names_work_and_stay_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "ünï côdé 日本"
    picture(folder / "キャット🐈.png", caption="a cät")
    assert by_name(scan(folder))["キャット🐈.png"].caption == "a cät"


def test_names_that_are_not_utf8_are_shown_with_codes_and_used(tmp_path: Path) -> None:
    odd = picture(tmp_path / os.fsdecode(b"caf\xe9.png"), caption="a cup")
    picture(tmp_path / os.fsdecode(b"\xff") / "a.png")
    picture(tmp_path / r"caf\xe9.png", color="blue")
    items = by_name(scan(tmp_path))
    assert sorted(items) == [r"\xff/a.png", r"caf\xe9.png", r"caf\xe9.png~2"]
    item = next(item for item in items.values() if item.path == odd)
    assert item.caption == "a cup"
    assert item.notes == ("its name is not UTF-8: the odd bytes are shown as codes",)
    assert all(json.loads(json.dumps(name).encode()) == name for name in items)


def test_progress_counts_every_file_that_is_tried(tmp_path: Path) -> None:
    for number in range(5):
        picture(tmp_path / f"{number}.png", caption="x")
    (tmp_path / "x.md").write_text("x")
    seen: list[tuple[int, int]] = []
    scan_dataset(DatasetSettings(folder=str(tmp_path)), lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_the_dataset_folder_is_not_changed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data / "1_x/a.png", caption="a dog")
    (data / "zero.png").touch()

    def state() -> list[tuple[str, int, int]]:
        return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in (data, *data.rglob("*")))

    before = state()
    for path in (data / "1_x", data):
        path.chmod(0o555)
    try:
        scan(data)
    finally:
        for path in (data, data / "1_x"):
            path.chmod(0o755)
    assert state() == before


@pytest.mark.parametrize(
    ("folder", "words"),
    [("", "No dataset folder"), ("missing", "does not exist"), ("file", "not a folder"), ("empty", "empty")],
)
def test_folders_that_cannot_be_a_dataset(tmp_path: Path, folder: str, words: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.hidden").touch()
    with pytest.raises(DatasetError, match=words) as caught:
        scan(tmp_path / folder if folder else Path(" "))
    assert caught.value.fix


def test_a_folder_without_a_readable_picture_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("x")
    (tmp_path / "b.md").write_text("x")
    with pytest.raises(DatasetError, match="no usable picture") as caught:
        scan(tmp_path)
    assert "b.md: not a picture" in caught.value.why


def test_an_empty_regularization_folder_is_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "data/a.png")
    (tmp_path / "regular").mkdir()
    with pytest.raises(DatasetError, match="regular is empty"):
        scan(tmp_path / "data", regularization_folder=str(tmp_path / "regular"))


def test_missing_captions_stop_the_run_until_the_user_chooses(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="a dog")
    picture(tmp_path / "b.png")
    options = DatasetSettings(folder=str(tmp_path))
    dataset = scan_dataset(options)
    with pytest.raises(DatasetError, match="1 of 2") as caught:
        require_captions(dataset, options)
    assert "b.png" in caught.value.why
    assert all(word in caught.value.fix for word in ("trigger", "exclude", ".txt"))
    kept = require_captions(dataset, options.model_copy(update={"missing_captions": "trigger"}))
    assert kept == dataset
    left = require_captions(dataset, options.model_copy(update={"missing_captions": "exclude"}))
    assert [item.relative for item in left.items] == ["a.png"]
    assert reasons(left) == {"b.png": "it has no caption"}
    assert left.found == len(left.items) + len(left.refused) == 2


def test_excluding_everything_is_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    options = DatasetSettings(folder=str(tmp_path), missing_captions="exclude")
    with pytest.raises(DatasetError, match="has a caption"):
        require_captions(scan_dataset(options), options)


def test_scanning_does_not_load_torch() -> None:
    code = "import sys; from lorasmith.engine.dataset import buckets, scan; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"
