"""`lorasmith check`: the report for people and for scripts, its exit code, and that a dataset is only read."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.engine.cli import main
from lorasmith.engine.cli.check_report import CheckReport, print_report
from lorasmith.engine.cli.progress import FileProgress
from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.buckets import plan_buckets
from lorasmith.engine.dataset.check_captions import CaptionStatistics
from lorasmith.engine.dataset.findings import Action, CheckContext, Finding
from lorasmith.engine.dataset.items import Dataset, ImageItem, Refusal
from lorasmith.engine.dataset.overlay import Edit, append_edits
from lorasmith.engine.dataset.triggers import Word
from tests.engine.cli_runs import make_tiny_run
from tests.engine.test_caption_edits import contents
from tests.tiny import tiny_pictures

Check = Callable[..., dict[str, Any]]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three captioned pictures, one of them without its caption, a broken picture and a file of the system."""
    folder = tmp_path / "pictures"
    tiny_pictures(folder, 3, sizes=[(64, 64), (96, 64)])
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "00.txt").unlink()
    (folder / ".DS_Store").touch()
    return folder


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    """Run `check --json`, which should end with a code, and return the document."""

    def check(*arguments: str, code: int = 0) -> dict[str, Any]:
        assert main(["check", *arguments, "--json"]) == code
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return check


# For scripts


def test_the_document_tells_everything(pictures: Path, tiny_sd15: Path, check: Check) -> None:
    before = contents(pictures)
    report = check(str(pictures), "--base", str(tiny_sd15), "--trigger", "zqx", "--goal", "style", code=5)
    assert (report["found"], report["accepted"], report["system"]) == (4, 3, 1)
    assert [entry["file"] for entry in report["refused"]] == ["broken.png"]
    assert report["goal"] == "style"
    assert report["trigger_tokens"] == [{"tokens": ["z", "q", "x</w>"], "unknown": False}]
    missing = next(finding for finding in report["findings"] if finding["code"] == "captions-missing")
    assert (missing["severity"], missing["files"]) == ("error", ["00.png"])
    assert all(missing[part] for part in ("title", "why", "fix", "action"))
    assert sum(report["counts"].values()) == len(report["findings"])
    assert sum(row["pictures"] for row in report["buckets"]) == 3
    captions = report["captions"]
    assert (captions["found"], captions["missing"], captions["empty"], captions["over_limit"]) == (2, 1, 0, [])
    assert 3 < captions["longest_tokens"] <= captions["token_limit"]
    assert captions["samples"][1] == {"file": "01.png", "text": "zqx, a picture, number 1"}
    assert contents(pictures) == before


def test_it_ends_with_0_where_a_training_could_start(pictures: Path, check: Check) -> None:
    report = check(str(pictures), "--trigger", "zqx", "--set", "dataset.missing_captions=trigger")
    assert report["counts"]["error"] == 0
    assert report["captions"]["samples"][0] == {"file": "00.png", "text": "zqx"}


def test_pictures_that_would_be_left_out_are_in_no_bucket(pictures: Path, check: Check) -> None:
    excluded = check(str(pictures), "--trigger", "zqx", "--set", "dataset.missing_captions=exclude")
    assert sum(row["pictures"] for row in excluded["buckets"]) == 2


def test_settings_come_from_the_base_the_run_file_and_the_options_in_this_order(
    tiny_sd15: Path, tmp_path: Path, check: Check
) -> None:
    tiny = make_tiny_run(tmp_path, tiny_sd15)
    assert check(str(tiny.pictures), "--base", str(tiny_sd15))["resolution"] == 64  # the tiny base's own
    assert check(str(tiny.pictures))["resolution"] == 512
    report = check("--run", str(tiny.run_file))
    assert (report["folder"], report["resolution"], report["trigger"]) == (str(tiny.pictures), 64, "zqx")
    assert report["base"]
    report = check("--run", str(tiny.run_file), "--resolution", "128", "--set", "train.batch_size=2")
    assert (report["resolution"], report["batch_size"]) == (128, 2)
    other = tmp_path / "other"
    tiny_pictures(other, 2)
    assert check(str(other), "--run", str(tiny.run_file))["accepted"] == 2


def test_a_base_that_only_a_run_file_names_is_not_downloaded(pictures: Path, tmp_path: Path, check: Check) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text('[base]\nmodel = "nobody/knows-this"\n')
    report = check(str(pictures), "--run", str(run_file), code=5)
    assert (report["base"], report["trigger_tokens"]) == ("", [])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--goal", "nonsense"], 3, "Known goals: "),
        (["--base", "no/such/folder.safetensors"], 4, "no/such/folder"),
        (["--resolution", "100"], 3, "dataset.resolution"),
        (["--set", "nonsense=1"], 3, "nonsense"),
        (["--run", "none.toml"], 3, "none.toml"),
    ],
)
def test_bad_options_are_refused(
    pictures: Path, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(pictures), *arguments]) == code
    assert said in capsys.readouterr().err


def test_a_folder_without_pictures_ends_as_a_problem_of_the_dataset(tmp_path: Path, check: Check) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in check(str(tmp_path / "empty"), code=5)["error"]["what"]


def test_an_archive_is_checked_too(pictures: Path, tmp_path: Path, check: Check) -> None:
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for path in pictures.iterdir():
            archive.write(path, path.name)
    report = check(str(tmp_path / "pictures.zip"), code=5)
    assert (report["accepted"], len(report["refused"])) == (3, 1)


def test_edited_captions_count_where_a_setting_names_them_and_are_pointed_out_where_none_does(
    pictures: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures.parent)
    edits = Path("pictures.captions.jsonl")
    append_edits(edits, {"00.png": Edit(("written later",))})
    ignored = check("pictures", code=5)
    assert f"--set dataset.overlay={edits}" in ignored["dataset_notes"][0]
    used = check("pictures", "--trigger", "zqx", "--set", f"dataset.overlay={edits}")
    assert used["captions"]["samples"][0]["text"] == "zqx, written later"
    assert used["dataset_notes"] == []


# For people


def report_of(**changes: Any) -> CheckReport:
    """A report with a finding of every kind, a long name and a caption that tries to color the screen."""
    long = "a folder with a long name/and a picture with one that is longer than a line of any terminal \x1b[31m.jpg"
    names = ("a.png", "b.png", "c.png", "d.png", "e.png", long)
    items = tuple(
        ImageItem(Path(name), name, f"{index}", 300 + 90 * index, 300, notes=("named .png, but is a JPEG file",))
        for index, name in enumerate(names)
    )
    config = RunConfig()
    findings = (
        Finding("one", "error", "All lack “it”.", "It matters.", "Set it.", files=names),
        Finding("two", "warning", "Two are alike.", "Why not.", "Keep one.", names, groups=(names[:2], names[2:])),
        Finding("three", "note", "Some are small.", "So.", "Look.", (long,), details={long: "1.8× enlarged"}),
        Finding("four", "note", "The word.", "So.", "Take another.", action=Action("x", {"captions.trigger": "vq"})),
    )
    facts: dict[str, Any] = {
        "config": config,
        "context": CheckContext(config, base_label="A base", token_limit=77, goal="style"),
        "dataset": Dataset(Path("x"), items, (Refusal("x.doc", "not a picture"),), 7, 2, ("a note of the whole",)),
        "plan": plan_buckets(items, config.dataset),
        "findings": findings,
        "statistics": CaptionStatistics(5, 1, 1, ("b.png",), 30, 80, 7.5, (("a cat", 4), ("t" * 90, 2), ("once", 1))),
        "prompts": (("a.png", "zqx, \x1b[2Ja cat"), (long, "")),
        "words": (Word(("z", "qx</w>")),),
    }
    return CheckReport(**(facts | changes))


def printed(report: CheckReport, monkeypatch: pytest.MonkeyPatch, columns: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace"))
    print_report(report)
    sys.stdout.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_report_fits_the_width_and_no_foreign_text_reaches_the_terminal_raw(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(report_of(), monkeypatch, columns)
    assert max(map(len, text.splitlines())) <= columns
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "\x1b" not in text
    assert "\\x1b[2J" in text


def test_each_finding_is_told_by_mark_and_word_with_files_reason_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = printed(report_of(), monkeypatch)
    assert "Findings: 1 error, 1 warning, 2 notes" in text
    for part in (
        "✗ error    All lack “it”.\n           a.png, b.png, c.png, d.png and 2 more\n           Why: It matters.\n",
        "! warning  Two are alike.\n           a.png, b.png\n           c.png, d.png, e.png, a folder",
        "           Do:  Take another. (set captions.trigger to vq)\n",
        "1.8× enlarged",
        "· note     Some are small.",
        "7 files found: 6 accepted, 1 refused; 2 files of the system\n",
        "Captions: 5 found, 1 missing, 1 empty, 1 over 77 tokens\n",
        f"a cat 4×, {'t' * 29}… 2×\n",
        "zqx, \\x1b[2Ja cat\n",
        "(nothing)\n",
        "Refused: 1 file\n  ·  not a picture: x.doc\n",
        "named .png, but is a JPEG file: a.png, b.png, c.png, d.png and 2 more",
        "a note of the whole\n",
    ):
        assert part in text, text
    assert "once" not in text.partition("frequent")[2].partition("\n")[0]


def test_the_bars_are_as_long_as_the_sizes_have_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of()
    lines = printed(report, monkeypatch).splitlines()
    rows = report.plan.rows(1)
    largest = max(row.pictures for row in rows)
    for row in rows:
        (line,) = [line for line in lines if line.strip().startswith(f"{row.size} ")]
        assert line.count("█") == max(1, round(20 * row.pictures / largest))
        assert [row.size, str(row.pictures), str(row.uses), str(row.batches)] == [
            word for word in line.split() if "█" not in word
        ][:4]


def test_a_terminal_without_unicode_gets_letters_for_marks_and_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(report_of(), monkeypatch, encoding="ascii")
    assert 'x error    All lack "it".' in text
    assert "##" in text
    assert "\\u" not in text


def test_nothing_found_is_said_too_and_where_the_sheets_are(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(report_of(findings=(), sheets=(Path("out/s.png"), Path("out/s-2.png"))), monkeypatch)
    assert "Findings: none" in text
    assert text.endswith(f"Contact sheet: {Path('out/s.png')} to s-2.png, 2 files\n")


def test_the_report_of_a_real_folder_is_printed(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "evil\x1b[31m\nname.txt").write_text("x")
    assert main(["check", str(pictures), "--trigger", "zqx"]) == 5
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{pictures}\n" if len(str(pictures)) <= 80 else "/")
    assert "1 picture has no caption" in " ".join(captured.out.split())
    assert "evil\\x1b[31m\\nname.txt" in captured.out
    assert captured.err == ""


# Contact sheets


def test_the_sheet_is_written_and_named(pictures: Path, tmp_path: Path, check: Check) -> None:
    sheet = tmp_path / "sheet.png"
    assert check(str(pictures), "--sheet", str(sheet), code=5)["sheets"] == [str(sheet)]
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"


def test_a_place_for_the_sheet_that_will_not_do_is_refused_before_anything_is_read(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(sheet: Path, code: int) -> str:
        before = contents(tmp_path)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("lorasmith.engine.dataset.scan.scan_dataset", lambda *_: pytest.fail("it was scanned"))
            assert main(["check", str(pictures), "--sheet", str(sheet)]) == code
        assert contents(tmp_path) == before
        return capsys.readouterr().err

    (tmp_path / "link").symlink_to(pictures)
    for inside in (pictures / "sheet.png", tmp_path / "link" / "sheet.png"):
        assert "inside the dataset" in refused(inside, 3)
    assert "no PNG file" in refused(tmp_path / "sheet.jpg", 3)
    assert "cannot be written" in refused(tmp_path / "none" / "sheet.png", 7)
    allowed = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path and allowed(path, mode))
    assert "cannot be written" in refused(tmp_path / "sheet.png", 7)


def test_the_folders_inside_a_kohya_file_are_the_dataset_too(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kohya = tmp_path / "kohya.toml"
    kohya.write_text(f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{pictures.as_posix()}"\n')
    before = contents(pictures)
    assert main(["check", str(kohya), "--sheet", str(pictures / "sheet.png")]) == 3
    assert "inside the dataset" in capsys.readouterr().err
    assert contents(pictures) == before


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_moves_only_at_a_terminal_and_only_after_a_moment() -> None:
    now = [0.0]
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        now[0] = 0.0
        with FileProgress("reading \x1b[31m", stream, lambda: now[0]) as progress:
            progress.update(1, 10)
            assert stream.getvalue() == ""
            now[0] = 5.0
            progress.update(5, 10)
        assert ("reading \\x1b[31m" in stream.getvalue()) == shown
        assert ("5/10" in stream.getvalue()) == shown
