"""Captioning into the overlay: one edit a picture, resumable, and a person's text is never written over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lorasmith.engine.captioners import find_captioner
from lorasmith.engine.cli import main
from lorasmith.engine.dataset import captioning
from lorasmith.engine.dataset.captioning import (
    LEFT_OUT,
    OWN_CAPTION,
    OWN_EDIT,
    CaptioningStep,
    caption_pictures,
    plan_captioning,
    tidy_caption,
    without_own_captions,
)
from lorasmith.engine.dataset.items import ImageItem
from lorasmith.engine.dataset.overlay import Edit, append_edits, read_overlay
from lorasmith.engine.errors import DatasetError, StorageError
from tests.tiny_captioners import build_wd14


class Teller:
    """A captioner that says which color the first pixel has; `on_picture` may raise."""

    where = "CPU"

    def __init__(self, on_picture: Callable[[int], None] | None = None, name: str = "teller") -> None:
        self.spec = replace(find_captioner("wd14").SPEC, name=name)
        self.asked = 0
        self._on_picture = on_picture

    def caption(self, image: Image.Image) -> str:
        self.asked += 1
        if self._on_picture is not None:
            self._on_picture(self.asked)
        return f"color {image.getpixel((0, 0))}"

    def close(self) -> None:
        pass


def make_items(folder: Path, count: int = 20, **fields: Any) -> list[ImageItem]:
    """Pictures `00.png` … of different colors as a scan gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for index in range(count):
        path = folder / f"{index:02d}.png"
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
        items.append(ImageItem(path, path.name, f"sha-{index}", 8, 8, **fields))
    return items


def texts(overlay: Path) -> dict[str, tuple[str, ...] | None]:
    return {name: edit.captions for name, edit in read_overlay(overlay).items()}


# ----------------------------------------------------------------------------------------------- what is kept, always


def test_every_picture_gets_one_signed_edit(tmp_path: Path) -> None:
    items = make_items(tmp_path / "pictures", 3)
    result = caption_pictures(items, Teller(), tmp_path / "overlay.jsonl")
    assert result.done == {f"0{n}.png": f"color ({n}, 0, 0)" for n in range(3)}
    assert (result.failed, result.skipped, result.stopped) == ({}, {}, False)
    lines = (tmp_path / "overlay.jsonl").read_text().splitlines()
    assert [json.loads(line)["by"] for line in lines] == ["teller"] * 3
    assert texts(tmp_path / "overlay.jsonl") == {name: (text,) for name, text in result.done.items()}


def test_one_failure_is_listed_and_loses_no_other_caption(tmp_path: Path) -> None:
    def on_picture(number: int) -> None:
        if number == 7:
            raise RuntimeError("CUDNN_STATUS_BAD_PARAM\nat line 3")

    items = make_items(tmp_path / "pictures")
    items[11].path.write_bytes(b"\x89PNG damaged since the scan")
    result = caption_pictures(items, Teller(on_picture), tmp_path / "overlay.jsonl")
    assert result.failed["06.png"] == "RuntimeError: CUDNN_STATUS_BAD_PARAM"
    assert result.failed["11.png"]
    assert len(result.failed) == 2
    assert set(texts(tmp_path / "overlay.jsonl")) == {item.relative for item in items} - set(result.failed)


def test_an_empty_answer_is_a_failure_and_not_an_empty_caption(tmp_path: Path) -> None:
    teller = Teller()
    teller.caption = lambda image: " \x00\n "  # type: ignore[method-assign]
    result = caption_pictures(make_items(tmp_path, 1), teller, tmp_path / "overlay.jsonl")
    assert result.failed == {"00.png": "the captioner found nothing to say"}
    assert not (tmp_path / "overlay.jsonl").exists()


def test_each_caption_is_on_the_disk_before_the_next_picture_is_asked(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.jsonl"
    kept: list[int] = []
    caption_pictures(make_items(tmp_path / "p", 4), Teller(lambda number: kept.append(len(texts(overlay)))), overlay)
    assert kept == [0, 1, 2, 3]


def test_after_a_stop_only_the_rest_is_captioned(tmp_path: Path) -> None:
    items, overlay = make_items(tmp_path / "pictures"), tmp_path / "overlay.jsonl"
    first = Teller()
    stopped = caption_pictures(items, first, overlay, should_stop=lambda: first.asked == 5)
    assert stopped.stopped
    assert len(stopped.done) == first.asked == 5
    second = Teller()
    rest = caption_pictures(items, second, overlay)
    assert second.asked == len(rest.done) == 15
    assert set(rest.skipped.values()) == {"teller captioned it already"}
    assert len(texts(overlay)) == 20
    third = Teller()
    assert caption_pictures(items, third, overlay).done == {}
    assert third.asked == 0


def test_a_killed_process_loses_only_the_picture_it_was_at(tmp_path: Path) -> None:
    items, overlay = make_items(tmp_path / "pictures"), tmp_path / "overlay.jsonl"
    code = """
import os, signal, sys
from pathlib import Path
from tests.engine.test_captioning import Teller, make_items
from lorasmith.engine.dataset.captioning import caption_pictures
def die(number):
    if number == 8:
        os.kill(os.getpid(), signal.SIGKILL)
caption_pictures(make_items(Path(sys.argv[1])), Teller(die), Path(sys.argv[2]))
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(tmp_path / "pictures"), str(overlay)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(texts(overlay)) == 7
    with overlay.open("ab") as file:  # the power went while the eighth was written
        file.write(b'{"file": "07.png", "by": "tel')
    teller = Teller()
    assert len(caption_pictures(items, teller, overlay).done) == teller.asked == 13
    assert len(texts(overlay)) == 20


def test_a_disk_that_refuses_ends_it_with_words_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, overlay = make_items(tmp_path / "pictures"), tmp_path / "overlay.jsonl"

    def refuse_the_fourth(path: Path, edits: dict[str, Edit]) -> None:
        if "03.png" in edits:
            raise StorageError(f"The disk is full: cannot write {path}.")
        append_edits(path, edits)

    monkeypatch.setattr(captioning, "append_edits", refuse_the_fourth)
    with pytest.raises(StorageError, match=r"disk is full.*overlay\.jsonl"):
        caption_pictures(items, Teller(), overlay)
    assert len(texts(overlay)) == 3


def test_a_damaged_overlay_is_told_before_any_picture_is_asked(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.jsonl"
    overlay.write_text("no edit\n{}\n")
    teller = Teller()
    with pytest.raises(DatasetError, match=r"overlay\.jsonl cannot be read"):
        caption_pictures(make_items(tmp_path / "p", 2), teller, overlay)
    assert teller.asked == 0


def test_the_same_bytes_are_captioned_once(tmp_path: Path) -> None:
    items = make_items(tmp_path / "pictures", 4)
    items = [*items, replace(items[1], relative="copy/a.png"), replace(items[1], relative="copy/b.png")]
    overlay, teller = tmp_path / "overlay.jsonl", Teller()
    result = caption_pictures(items[:-1], teller, overlay)
    assert teller.asked == 4
    assert result.done["copy/a.png"] == result.done["01.png"]
    # Also when the first of them was captioned in an earlier run.
    assert caption_pictures(items, teller, overlay).done == {"copy/b.png": result.done["01.png"]}
    assert teller.asked == 4


def test_progress_counts_every_picture_and_knows_the_time_left(tmp_path: Path) -> None:
    def on_picture(number: int) -> None:
        if number == 2:
            raise ValueError

    steps: list[CaptioningStep] = []
    overlay = tmp_path / "overlay.jsonl"
    caption_pictures(make_items(tmp_path / "p", 3), Teller(on_picture), overlay, on_progress=steps.append)
    assert [(step.done, step.total, step.relative) for step in steps] == [(n, 3, f"0{n - 1}.png") for n in (1, 2, 3)]
    assert [bool(step.failed) for step in steps] == [False, True, False]
    assert steps[1].failed == "ValueError"
    left = [step.seconds_left for step in steps]
    assert all(seconds is not None and seconds >= 0 for seconds in left)
    assert left[-1] == 0


# ------------------------------------------------------------------------------------------- what a person wrote stays


@pytest.mark.parametrize(
    ("edit", "reason", "reason_again"),
    [
        (None, "", ""),
        (Edit(("mine",)), OWN_EDIT, OWN_EDIT),
        (Edit(("",)), OWN_EDIT, OWN_EDIT),
        (Edit(exclude=True), LEFT_OUT, LEFT_OUT),
        (Edit(None, exclude=True, by="check"), LEFT_OUT, LEFT_OUT),
        (Edit(("a",), by="teller"), "teller captioned it already", ""),
        (Edit(("a",), by="blip"), "blip captioned it already", ""),
        (Edit(), "", ""),
    ],
)
def test_what_an_edit_in_the_overlay_means(edit: Edit | None, reason: str, reason_again: str, tmp_path: Path) -> None:
    (item,) = make_items(tmp_path, 1)
    edits = {"00.png": edit} if edit else {}
    for again, expected in ((False, reason), (True, reason_again)):
        plan = plan_captioning([item], edits, "teller", replace_machine=again)
        assert plan.skipped.get("00.png", "") == expected
        assert bool(plan.wanted) == (not expected)


@pytest.mark.parametrize(
    ("source", "captions", "reason"),
    [
        ("none", (), ""),
        ("sidecar", ("a cat",), OWN_CAPTION),
        ("sidecar", ("", "a cat"), OWN_CAPTION),
        ("sidecar", (" \n",), ""),
        ("metadata", ("a cat",), OWN_CAPTION),
        ("overlay", ("a cat",), OWN_CAPTION),
        ("filename", ("img 0001",), ""),
        ("folder", ("cat",), ""),
    ],
)
def test_what_a_caption_of_the_dataset_means(
    source: Any, captions: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    items = make_items(tmp_path, 1, captions=captions, caption_source=source)
    for again in (False, True):
        assert plan_captioning(items, {}, "teller", replace_machine=again).skipped.get("00.png", "") == reason


def test_captions_of_the_dataset_count_less_only_if_that_is_asked_for(tmp_path: Path) -> None:
    items = make_items(tmp_path, 2, captions=("a cat",), caption_source="sidecar")
    edits = {"01.png": Edit(("edited by me",))}
    plan = plan_captioning(without_own_captions(items), edits, "teller", replace_machine=True)
    assert [item.relative for item in plan.wanted] == ["00.png"]
    assert plan.skipped == {"01.png": OWN_EDIT}


def test_captions_can_be_made_anew_but_never_over_an_edit(tmp_path: Path) -> None:
    items, overlay = make_items(tmp_path / "p", 3), tmp_path / "overlay.jsonl"
    caption_pictures(items, Teller(name="other"), overlay)
    append_edits(overlay, {"01.png": Edit(("mine",))})
    result = caption_pictures(items, Teller(), overlay, replace_machine=True)
    assert set(result.done) == {"00.png", "02.png"}
    assert {name: edit.by for name, edit in read_overlay(overlay).items()} == {
        "00.png": "teller",
        "01.png": "person",
        "02.png": "teller",
    }


def test_what_a_person_edits_while_the_model_is_at_work_stays(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.jsonl"

    def on_picture(number: int) -> None:
        if number == 3:
            append_edits(
                overlay, {"02.png": Edit(("mine",)), "04.png": Edit(("mine too",)), "05.png": Edit(exclude=True)}
            )

    steps: list[CaptioningStep] = []
    items = make_items(tmp_path / "p", 7)
    result = caption_pictures(items, Teller(on_picture), overlay, replace_machine=True, on_progress=steps.append)
    assert [(step.caption, step.skipped) for step in steps[2:6:2]] == [("", OWN_EDIT)] * 2
    assert result.skipped == {"02.png": OWN_EDIT, "04.png": OWN_EDIT, "05.png": LEFT_OUT}
    assert set(result.done) == {"00.png", "01.png", "03.png", "06.png"}
    assert texts(overlay)["02.png"] == ("mine",)
    assert texts(overlay)["04.png"] == ("mine too",)
    assert read_overlay(overlay)["05.png"].exclude


@given(st.text())
@example("0 \x1b\r0")
def test_a_caption_is_one_line_that_a_terminal_can_show(text: str) -> None:
    tidy = tidy_caption(text)
    assert tidy == tidy_caption(tidy) == tidy.strip()
    assert "\n" not in tidy
    assert "\x1b" not in tidy
    tidy.encode("utf-8")


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wd14(tmp_path_factory.mktemp("models") / "wd14", side=32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five pictures, the first with a caption of its own, in a current folder of their own."""
    make_items(tmp_path / "cats", 5)
    (tmp_path / "cats" / "00.txt").write_text("a cat of mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cats"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def auto(*more: str, tagger: Path) -> int:
    return main(["caption", "auto", "cats", "--with", "wd14", "--model", str(tagger), "--device", "cpu", *more])


def test_the_command_captions_what_has_no_caption_and_leaves_the_folder_alone(
    folder: Path, tagger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(folder)
    assert auto(tagger=tagger) == 0
    out = capsys.readouterr().out
    assert snapshot(folder) == before
    assert set(texts(Path("cats.captions.jsonl"))) == {f"0{n}.png" for n in range(1, 5)}
    assert "[4/4] 04.png: " in out
    assert "4  captioned" in out
    assert "1  skipped: it has a caption of its own" in out
    assert "--set dataset.overlay=cats.captions.jsonl" in out
    assert auto(tagger=tagger) == 0
    assert "No picture needs a caption." in capsys.readouterr().out


def test_json_is_one_document_and_progress_goes_to_stderr(
    folder: Path, tagger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert auto("--json", "--limit", "2", "--overlay", "else/where.jsonl", tagger=tagger) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert list(document["done"]) == ["01.png", "02.png"]
    assert document["overlay"] == str(Path("else/where.jsonl"))
    assert document["skipped"] == {"00.png": OWN_CAPTION}
    assert "[2/2] 02.png" in captured.err


def test_a_dry_run_loads_no_model_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert auto("--dry-run", tagger=Path("no/model")) == 0
    assert "wd14 would caption 4 pictures into cats.captions.jsonl." in capsys.readouterr().out
    assert auto("--dry-run", "--json", "--replace-captions", tagger=Path("no/model")) == 0
    assert json.loads(capsys.readouterr().out)["wanted"] == [f"0{n}.png" for n in range(5)]
    assert not Path("cats.captions.jsonl").exists()


def test_options_reach_the_captioner(folder: Path, tagger: Path) -> None:
    settings = ["--general-threshold", "0", "--blacklist", "1girl, long hair", "--blacklist", "^_^"]
    assert auto(*settings, "--set", "rating=first", "--set", 'replace={solo = "alone"}', tagger=tagger) == 0
    for captions in texts(Path("cats.captions.jsonl")).values():
        assert captions is not None
        rating, *tags = captions[0].split(", ")
        assert rating in ("general", "sensitive")
        assert {"alone", "blue eyes"} <= set(tags)
        assert not {"1girl", "long hair", "^_^", "solo"} & set(tags)


def test_ctrl_c_ends_after_the_picture_and_keeps_what_is_done(
    folder: Path, tagger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorasmith.engine.captioners import wd14

    prepare, asked = wd14.prepare_picture, []

    def interrupt(image: Image.Image, side: int) -> Any:
        asked.append(1)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return prepare(image, side)

    monkeypatch.setattr(wd14, "prepare_picture", interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert auto(tagger=tagger) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert len(texts(Path("cats.captions.jsonl"))) == 2
    out = capsys.readouterr().out
    assert "Stopped after" in out
    assert "The same command goes on with the rest." in out
    assert auto(tagger=tagger) == 0
    assert len(texts(Path("cats.captions.jsonl"))) == 4


def test_a_failed_picture_gives_the_exit_code_of_datasets(
    folder: Path, tagger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorasmith.engine.captioners import wd14

    prepare = wd14.prepare_picture

    def fail_on_one(image: Image.Image, side: int) -> Any:
        if image.getpixel((0, 0)) == (2, 0, 0):
            raise RuntimeError("broken \x1b[31m")
        return prepare(image, side)

    monkeypatch.setattr(wd14, "prepare_picture", fail_on_one)
    assert auto(tagger=tagger) == DatasetError.exit_code
    out = capsys.readouterr().out
    assert "failed: 02.png: RuntimeError: broken" in out
    assert "\x1b" not in out
    assert len(texts(Path("cats.captions.jsonl"))) == 3


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--overlay", "cats/overlay.jsonl"], 3, "is inside the dataset"),
        (["--prompt", "x"], 3, "wd14 has no setting prompt"),
        (["--set", "mcut"], 3, "Cannot read --set mcut"),
        (["--set", "max_tags=-1"], 3, "max_tags = -1"),
        (["--general-threshold", "2"], 3, "general_threshold = 2.0"),
        (["--with", "gpt"], 3, "There is no captioner gpt"),
        (["--model", "./nothing"], 4, "There is no folder ./nothing"),
        (["--limit", "0"], 2, "limit"),
    ],
)
def test_wrong_options_are_told_before_any_work(
    more: list[str], code: int, words: str, folder: Path, tagger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert auto(*more, tagger=tagger) == code
    assert words in capsys.readouterr().err
    assert not Path("cats.captions.jsonl").exists()


def test_the_list_names_every_captioner_with_size_and_license(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", "list"]) == 0
    out = capsys.readouterr().out
    for words in ("wd14", "florence2", "blip", "joycaption", "Apache 2.0", "446.1 MiB", "tags", "prose"):
        assert words in out
    assert main(["caption", "list", "--json"]) == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} == {
        "wd14",
        "florence2",
        "blip",
        "joycaption",
    }
    assert main(["caption", "list", "wd14"]) == 0
    assert "--set general_threshold=0.35" in capsys.readouterr().out
