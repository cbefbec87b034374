"""`lorasmith caption edit`, `tags`, `write`, `restore`: previews first, nothing written without consent."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.engine.cli import main
from lorasmith.engine.dataset.overlay import Edit, append_edits, read_overlay
from tests.engine.test_caption_edits import contents
from tests.tiny import tiny_pictures


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `cats` with three pictures and captions, and the folder above it as the current one."""
    tiny_pictures(tmp_path / "cats", 3, captions=["a cat, red", "a cat,\u200b  blue", None])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cats"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that should end with a code, 0 by default, and return what it printed."""

    def run(*arguments: str, code: int = 0) -> str:
        assert main(["caption", *arguments]) == code
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


OVERLAY = Path("cats.captions.jsonl")


def test_an_edit_is_shown_and_only_written_with_consent(folder: Path, run: Callable[..., str]) -> None:
    before = contents(folder)
    shown = run("edit", "cats", "--rename", "red", "crimson")
    assert "1 of 3 pictures would change" in shown
    assert "- a cat, red" in shown
    assert "+ a cat, crimson" in shown
    assert "Add --yes" in shown
    assert not OVERLAY.exists()
    run("edit", "cats", "--rename", "red", "crimson", "--yes")
    assert read_overlay(OVERLAY) == {"00.png": Edit(("a cat, crimson",))}
    assert contents(folder) == before


def test_a_person_at_a_terminal_is_asked(
    folder: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question: asked.append(question) or len(asked) > 1)
    run("edit", "cats", "--tidy")
    assert not OVERLAY.exists()
    run("edit", "cats", "--tidy")
    assert read_overlay(OVERLAY) == {"01.png": Edit(("a cat, blue",))}
    assert asked == [f"Add this to {OVERLAY}?"] * 2


def test_each_edit_goes_on_from_those_before_it(folder: Path, run: Callable[..., str]) -> None:
    run("edit", "cats", "--add", "zqx", "--first", "--yes")
    run("edit", "cats", "--remove", "a cat", "--only", "00*", "--yes")
    run("edit", "cats", "--replace", "z(.)x", r"\1", "--regex", "--yes")
    assert read_overlay(OVERLAY)["00.png"].captions == ("q, red",)
    assert read_overlay(OVERLAY)["02.png"].captions == ("q",)
    run("edit", "cats", "--exclude", "00*", "--yes")
    assert read_overlay(OVERLAY)["00.png"] == Edit(("q, red",), exclude=True)
    assert "0 of 2 pictures" in run("edit", "cats", "--remove", "red", "--yes")


def test_each_line_can_be_a_caption_of_its_own(folder: Path, run: Callable[..., str]) -> None:
    (folder / "00.txt").write_text("a cat\na pet")
    run("edit", "cats", "--add", "red", "--only", "00*", "--each-line", "--yes")
    assert read_overlay(OVERLAY)["00.png"].captions == ("a cat, red\na pet, red",)


def test_long_captions_are_shown_where_they_change(folder: Path, run: Callable[..., str]) -> None:
    (folder / "00.txt").write_text("a cat, " + "very " * 40 + "old, \x1b[31mred")
    shown = run("edit", "cats", "--remove", "a cat", "--only", "00*")
    assert "- a cat, very" in shown
    shown = run("edit", "cats", "--replace", "red", "crimson", "--only", "00*")
    assert "red" in shown.splitlines()[2]
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--add", "x", "--tidy"],
        ["--first", "--tidy"],
        ["--regex", "--add", "x"],
        ["--exclude", "*", "--remove", "x"],
        ["--rename", "one"],
    ],
)
def test_unclear_wishes_are_wrong_usage(folder: Path, run: Callable[..., str], options: list[str]) -> None:
    assert "Error:" in run("edit", "cats", *options, code=2)


def test_bad_values_are_refused(folder: Path, run: Callable[..., str]) -> None:
    assert "no valid regular expression" in run("edit", "cats", "--replace", "(", "x", "--regex", "--yes", code=3)
    assert "No picture is named like dog*" in run("edit", "cats", "--tidy", "--only", "dog*", code=3)
    inside = run("edit", "cats", "--tidy", "--overlay", "cats/edits.jsonl", "--yes", code=3)
    assert "inside the dataset" in inside
    assert not (folder / "edits.jsonl").exists()


def test_tags_are_counted_with_the_edits(folder: Path, run: Callable[..., str]) -> None:
    append_edits(OVERLAY, {"02.png": Edit(("A Cat, red",))})
    lines = run("tags", "cats").splitlines()
    assert lines[0].startswith("3 tags in the captions of 3 pictures")
    assert [line.split(maxsplit=1) for line in lines[1:3]] == [["3", "a cat"], ["2", "red"]]
    assert json.loads(run("tags", "cats", "--json"))[0] == {"tag": "a cat", "pictures": 3}


def test_captions_are_written_and_restored(folder: Path, run: Callable[..., str]) -> None:
    before = contents(folder)
    append_edits(OVERLAY, {"00.png": Edit(("a dog",), exclude=True), "02.png": Edit(("new",)), "x.png": Edit(("y",))})
    assert "Add --yes" in run("write", "cats", "--backup", "copies")
    assert contents(folder) == before
    done = run("write", "cats", "--backup", "copies", "--yes")
    assert "1 caption files replaced, 1 made" in done
    assert "Not in cats" in done
    assert "lorasmith caption restore copies" in done
    assert ((folder / "00.txt").read_text(), (folder / "02.txt").read_text()) == ("a dog", "new")
    left = read_overlay(OVERLAY)
    assert (left["00.png"], left["02.png"]) == (Edit(exclude=True), Edit())
    assert left["x.png"].captions == ("y",)
    assert "1 caption files put back, 1 removed" in run("restore", "copies")
    assert contents(folder) == before


def test_a_file_that_is_not_read_back_keeps_its_edit(folder: Path, run: Callable[..., str]) -> None:
    # A Kohya file can ask for captions of another extension than the one that is made.
    kohya = Path("cats.toml")
    kohya.write_text(
        '[general]\ncaption_extension = ".cap"\n[[datasets]]\n[[datasets.subsets]]\n'
        f'image_dir = "{folder.as_posix()}"\nnum_repeats = 1\n'
    )
    (folder / "00.cap").write_text("a cat")
    append_edits(Path("edits.jsonl"), {"cats/00.png": Edit(("a dog",)), "cats/02.png": Edit(("new",))})
    done = run("write", "cats.toml", "--overlay", "edits.jsonl", "--backup", "copies", "--yes")
    assert (folder / "00.cap").read_text() == "a dog"
    assert "still from the overlay" in done
    assert read_overlay(Path("edits.jsonl"))["cats/02.png"].captions == ("new",)


def test_an_archive_can_be_edited_but_never_written_to(folder: Path, run: Callable[..., str]) -> None:
    with zipfile.ZipFile("cats.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    before = Path("cats.zip").read_bytes()
    run("edit", "cats.zip", "--add", "zqx", "--yes")
    assert read_overlay(Path("cats.zip.captions.jsonl"))["00.png"].captions == ("a cat, red, zqx",)
    assert "into an archive" in run("write", "cats.zip", "--backup", "copies", "--yes", code=5)
    assert Path("cats.zip").read_bytes() == before
    assert not Path("copies").exists()


def test_nothing_to_write_or_restore_says_so(folder: Path, run: Callable[..., str]) -> None:
    assert "no edited captions" in run("write", "cats", "--backup", "copies", "--yes", code=5)
    assert "cannot be put back" in run("restore", "copies", code=7)
    append_edits(OVERLAY, {"00.png": Edit(("a dog",))})
    assert "inside the dataset" in run("write", "cats", "--backup", "cats/copies", "--yes", code=5)
