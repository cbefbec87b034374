"""The dataset page, its findings and its gallery: real scans of small folders, edits that can be taken back."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from textual.pilot import Pilot
from textual.widgets import Button, OptionList

from lorasmith.engine.dataset.overlay import Edit, append_edits, read_overlay
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.draft import Draft
from lorasmith.tui.findings import FoundDataset, Look, find_dataset, remaining
from lorasmith.tui.forms import Choice, SafeInput, Status
from lorasmith.tui.glyphs import ASCII
from lorasmith.tui.screens.dataset import DatasetPage
from lorasmith.tui.screens.dataset_findings import FindingsScreen
from lorasmith.tui.screens.dataset_gallery import GalleryScreen
from lorasmith.tui.screens.help import HelpScreen
from lorasmith.tui.widgets import gallery as gallery_module
from lorasmith.tui.widgets.gallery import Gallery
from tests.tui.conftest import SIZES, go_to, replace_text, screen_text, settle

MakeApp = Callable[..., LorasmithApp]


def noise(path: Path, seed: int, size: tuple[int, int] = (96, 64)) -> Path:
    """Write a sharp picture that no other seed looks like."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.NEAREST)).astype(int)
    fine = pixels + rng.integers(-30, 30, (size[1], size[0], 3))
    Image.fromarray(np.clip(fine, 0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """Nine pictures: two of them the same file, one without a caption; and a file that is no picture."""
    folder = tmp_path / "cats"
    folder.mkdir()
    for number in range(8):
        noise(folder / f"cat{number}.png", number)
        if number != 7:
            (folder / f"cat{number}.txt").write_text(f"a cat on a chair, number {number}")
    (folder / "same.png").write_bytes((folder / "cat3.png").read_bytes())
    (folder / "same.txt").write_text("a cat once more")
    (folder / "notes.docx").write_bytes(b"PK nothing")
    return folder


def draft_of(folder: Path) -> Draft:
    draft = Draft()
    draft.put("dataset.folder", str(folder))
    draft.put("dataset.regularization_folder", "")
    draft.put("dataset.resolution", "64")
    draft.put("dataset.missing_captions", "trigger")
    return draft


async def rest(pilot: Pilot[Any]) -> None:
    """Wait until edits are written, looks are done and pictures are drawn."""
    app = pilot.app
    assert isinstance(app, LorasmithApp)
    await app.edits_written()
    await settle(pilot)
    for _ in range(500):
        if not any(gallery.busy() for screen in app.screen_stack for gallery in screen.query(Gallery)):
            break
        await asyncio.sleep(0.01)
    await pilot.pause()


async def open_page(pilot: Pilot[Any]) -> None:
    """Visit the dataset page and leave its text field."""
    await go_to(pilot, "dataset")
    await rest(pilot)
    pilot.app.screen.query_one("#next").focus()
    await pilot.pause()


def codes(app: LorasmithApp) -> list[str]:
    checked = app.known.checked
    assert checked is not None
    return [finding.code for finding in checked.findings]


def names(app: LorasmithApp) -> list[str]:
    found = app.known.dataset
    assert found is not None
    return [item.relative for item in found.dataset.items]


async def highlight(pilot: Pilot[Any], code: str) -> None:
    """Move the highlight of the list of findings to the one with this code."""
    listed = pilot.app.screen.query_one("#list", OptionList)
    listed.highlighted = codes(pilot.app).index(code)  # type: ignore[arg-type]
    await rest(pilot)


@pytest.mark.parametrize("size", SIZES)
async def test_the_page_tells_findings_buckets_prompts_and_unused_files(
    make_app: MakeApp, cats: Path, size: tuple[int, int]
) -> None:
    app = make_app(draft_of(cats))
    async with app.run_test(size=size) as pilot:
        await open_page(pilot)
        page = app.screen
        assert isinstance(page, DatasetPage)
        told = {name: str(page.query_one(name, Status).content) for name in ("#found", "#findings", "#details")}
        assert "9 pictures · 1 of 10 files not used" in told["#found"]
        assert "8 found, 1 missing" in told["#found"]
        assert "exact copy" in told["#findings"]
        for words in ("64 × 64", "zqx, a cat on a chair, number 0", "a cat on a chair (7)", "notes.docx: "):
            assert words in told["#details"]
        for name in ("open-findings", "open-gallery", "open-captions"):
            page.query_one(f"#{name}").scroll_visible(animate=False)
            await pilot.pause()
            assert str(page.query_one(f"#{name}", Button).label) in screen_text(app)


async def test_enter_in_the_folder_scans_and_leaves_the_field_so_that_letters_are_keys(
    make_app: MakeApp, cats: Path
) -> None:
    app = make_app(Draft())
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "dataset")
        await replace_text(pilot, str(cats))
        await pilot.press("enter")
        await rest(pilot)
        await pilot.press("g")
        await rest(pilot)
        assert isinstance(app.screen, GalleryScreen)
        assert app.draft.value("dataset.folder") == str(cats)


async def test_every_answer_for_missing_captions_is_offered(make_app: MakeApp, cats: Path) -> None:
    app = make_app(draft_of(cats))
    async with app.run_test(size=(120, 36)) as pilot:
        await open_page(pilot)
        choice = app.screen.query_one("#captions-choice", Choice)
        assert choice.options == ("ask", "trigger", "filename", "folder", "exclude")
        choice.focus()
        await pilot.press("left")
        await rest(pilot)
        assert app.draft.value("dataset.missing_captions") == "ask"
        assert "dataset.missing_captions" in [problem.key for problem in app.known.problems()]
        await pilot.press("left")
        await rest(pilot)
        assert app.draft.value("dataset.missing_captions") == "exclude"
        checked = app.known.checked
        assert checked is not None
        assert sum(row.pictures for row in checked.rows) == 8


@pytest.mark.parametrize("size", SIZES)
async def test_a_finding_is_shown_with_its_pictures_side_by_side(
    make_app: MakeApp, cats: Path, size: tuple[int, int]
) -> None:
    app = make_app(draft_of(cats))
    async with app.run_test(size=size) as pilot:
        await open_page(pilot)
        await pilot.press("f")
        await rest(pilot)
        assert isinstance(app.screen, FindingsScreen)
        await highlight(pilot, "exact-duplicates")
        screen = screen_text(app)
        finding = app.screen.finding
        assert finding is not None
        assert any("cat3.png" in line and "same.png" in line for line in screen.splitlines())
        assert screen.count("▀") > 60
        assert finding.action is not None
        assert finding.action.label in screen
        first = app.screen.selected()
        await pilot.press("right")
        await pilot.pause()
        assert {first, app.screen.selected()} == {"cat3.png", "same.png"}


async def test_a_does_what_a_finding_proposes_and_u_takes_it_back(make_app: MakeApp, cats: Path) -> None:
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in cats.iterdir()}
    app = make_app(draft_of(cats))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_page(pilot)
        await pilot.press("f")
        await rest(pilot)
        await highlight(pilot, "exact-duplicates")
        await pilot.press("a")
        await rest(pilot)
        assert "exact-duplicates" not in codes(app)
        overlay = app.draft.overlay_path()
        assert overlay is not None
        (left_out,) = read_overlay(overlay)
        assert left_out in ("cat3.png", "same.png")
        assert left_out not in names(app)
        assert app.draft.value("dataset.overlay") == str(overlay)
        await pilot.press("u")
        await rest(pilot)
        assert "exact-duplicates" in codes(app)
        assert left_out in names(app)
        await pilot.press("u")
        await rest(pilot)
        assert "exact-duplicates" in codes(app)
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in cats.iterdir()} == before


async def test_an_action_on_settings_changes_the_draft_and_is_taken_back(make_app: MakeApp, cats: Path) -> None:
    from lorasmith.engine.dataset.findings import Action

    app = make_app(draft_of(cats))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_page(pilot)
        app.carry_out(Action("Larger", settings={"dataset.resolution": 128, "dataset.flip": True}))
        await rest(pilot)
        assert (app.draft.value("dataset.resolution"), app.draft.value("dataset.flip")) == (128, True)
        assert app.undo() == "Larger"
        await rest(pilot)
        assert app.draft.value("dataset.resolution") == 64
        assert "dataset.flip" not in app.draft.answers
        assert app.undo() == ""


async def test_taking_back_brings_earlier_edits_again(make_app: MakeApp, cats: Path) -> None:
    from lorasmith.engine.dataset.findings import Action

    draft = draft_of(cats)
    overlay = draft.overlay_path()
    assert overlay is not None
    append_edits(overlay, {"cat0.png": Edit(("a machine's text",), by="wd14")})
    app = make_app(draft)
    async with app.run_test(size=(80, 24)) as pilot:
        await open_page(pilot)
        app.carry_out(Action("Both", exclude=("cat0.png",), captions={"cat0.png": "mine", "cat1.png": "mine too"}))
        await rest(pilot)
        now = read_overlay(overlay)
        assert now["cat0.png"] == Edit(("mine",), exclude=True)
        assert now["cat1.png"] == Edit(("mine too",))
        assert app.undo() == "Both"
        await rest(pilot)
        now = read_overlay(overlay)
        assert now["cat0.png"] == Edit(("a machine's text",), by="wd14")
        assert now["cat1.png"] == Edit()


@pytest.mark.parametrize("size", SIZES)
async def test_the_gallery_shows_finds_leaves_out_and_takes_in_again(
    make_app: MakeApp, cats: Path, size: tuple[int, int]
) -> None:
    app = make_app(draft_of(cats))
    async with app.run_test(size=size) as pilot:
        await open_page(pilot)
        await pilot.press("g")
        await rest(pilot)
        assert "picture 1 of 9" in screen_text(app)
        await pilot.press("slash", *"number 5")
        await pilot.press("enter")
        await rest(pilot)
        assert "picture 1 of 1 found among 9" in screen_text(app)
        assert "cat5.png" in screen_text(app)
        await pilot.press("x")
        await rest(pilot)
        assert "cat5.png" not in names(app)
        await pilot.press("slash", "escape", "t")
        await rest(pilot)
        assert "Not used: " in screen_text(app)
        assert "cat5.png: left out by you" in screen_text(app)
        assert "notes.docx: " in screen_text(app)
        listed = app.screen.query_one("#unused", OptionList)
        found = app.known.dataset
        assert found is not None
        listed.highlighted = [refusal.relative for refusal in found.dataset.refused].index("cat5.png")
        await pilot.press("x")
        await rest(pilot)
        assert "cat5.png" in names(app)
        await pilot.press("escape", "escape")
        await pilot.pause()
        assert isinstance(app.screen, DatasetPage)


async def test_the_filter_also_finds_what_findings_say(make_app: MakeApp, cats: Path) -> None:
    app = make_app(draft_of(cats))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_page(pilot)
        await pilot.press("f")
        await rest(pilot)
        await highlight(pilot, "exact-duplicates")
        await pilot.press("g")
        await rest(pilot)
        shown = app.screen.query_one("#grid", Gallery).tiles
        assert {tile.relative for tile in shown} == {"cat3.png", "same.png"}


async def test_without_half_blocks_names_and_words_are_enough(
    make_app: MakeApp, cats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.tui.widgets.picture.glyphs", lambda: ASCII)
    monkeypatch.setattr(gallery_module, "glyphs", lambda: ASCII)
    app = make_app(draft_of(cats))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_page(pilot)
        for key in ("g", "f"):
            await pilot.press(key)
            await rest(pilot)
            assert "▀" not in screen_text(app)
            assert "cat" in screen_text(app)
            await pilot.press("escape")


async def test_errors_among_the_findings_block_the_start_and_lead_here(make_app: MakeApp, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    for number in range(2):
        noise(folder / f"{number}.png", number)
    draft = draft_of(folder)
    draft.put("dataset.missing_captions", "ask")
    app = make_app(draft)
    async with app.run_test(size=(120, 36)) as pilot:
        await go_to(pilot, "review")
        await rest(pilot)
        assert app.screen.query_one("#next", Button).disabled
        assert "1 thing to solve before the start" in screen_text(app)
        await pilot.press("enter")
        await rest(pilot)
        assert isinstance(app.screen, DatasetPage)
        assert isinstance(app.focused, Choice | SafeInput)


async def test_checks_follow_the_settings_without_a_new_scan(make_app: MakeApp, cats: Path) -> None:
    scans: list[str] = []

    def counted(settings: Any, tell: Any) -> FoundDataset:
        scans.append(settings.folder)
        return find_dataset(settings, tell)

    app = make_app(draft_of(cats), dataset=counted)
    async with app.run_test(size=(80, 24)) as pilot:
        await open_page(pilot)
        checked = app.known.checked
        assert checked is not None
        assert all(row.size != "96x96" for row in checked.rows)
        app.change("dataset.resolution", "1024")
        await rest(pilot)
        again = app.known.checked
        assert again is not None
        assert max(row.scale for row in again.rows) > 4
        assert len(scans) == 1
        app.change("dataset.masks", "off")
        app.known.look_at_dataset()
        await rest(pilot)
        assert len(scans) == 2


async def test_edits_made_while_a_scan_runs_are_seen_by_one_more_scan(make_app: MakeApp, cats: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    scans: list[int] = []

    def slow(settings: Any, tell: Any) -> FoundDataset:
        scans.append(1)
        if len(scans) == 2:
            begun.set()
            go_on.wait(10)
        return find_dataset(settings, tell)

    app = make_app(draft_of(cats), dataset=slow)
    async with app.run_test(size=(80, 24)) as pilot:
        await open_page(pilot)
        app.edit({"cat0.png": Edit(exclude=True)}, "one")
        await app.edits_written()
        await asyncio.to_thread(begun.wait, 10)
        for number in range(1, 4):
            app.edit({f"cat{number}.png": Edit(exclude=True)}, "more")
        await app.edits_written()
        assert app.known.shown_dataset is not None
        go_on.set()
        await rest(pilot)
        assert len(scans) == 3
        assert names(app) == ["cat4.png", "cat5.png", "cat6.png", "cat7.png", "same.png"]


async def test_an_edit_that_cannot_be_written_is_said(make_app: MakeApp, cats: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    draft = draft_of(cats)
    app = make_app(draft)
    async with app.run_test(size=(80, 24)) as pilot:
        await open_page(pilot)
        draft.answers["dataset.overlay"] = str(tmp_path / "file" / "overlay.jsonl")
        app.edit({"cat0.png": Edit(exclude=True)}, "one")
        await rest(pilot)
        assert [notice.title for notice in app._notifications] == ["Not saved"]
        assert app.undo() == ""


async def test_more_settings_are_shown_on_request_and_stay(make_app: MakeApp, cats: Path) -> None:
    app = make_app(draft_of(cats))
    async with app.run_test(size=(120, 36)) as pilot:
        await open_page(pilot)
        assert not app.screen.query("SettingField")
        await pilot.press("m")
        await rest(pilot)
        assert len(app.screen.query("SettingField")) == 5
        await go_to(pilot, "trigger")
        await go_to(pilot, "dataset")
        assert len(app.screen.query("SettingField")) == 5
        app.visit("dataset", "dataset.weights")
        await rest(pilot)
        assert app.focused is app.screen.query_one("#field-dataset-weights").query_one(SafeInput)


async def test_the_caption_editor_opens_at_the_selected_picture_and_its_edits_are_seen(
    make_app: MakeApp, cats: Path
) -> None:
    from lorasmith.tui.screens.caption_editor import CaptionEditor

    app = make_app(draft_of(cats))
    async with app.run_test(size=(120, 36)) as pilot:
        await open_page(pilot)
        await pilot.press("c")
        await rest(pilot)
        assert isinstance(app.screen, CaptionEditor)
        assert app.screen.chosen == "cat0.png"
        app.screen.dismiss(False)
        await rest(pilot)
        await pilot.press("g", "right", "right", "e")
        await rest(pilot)
        editor = app.screen
        assert isinstance(editor, CaptionEditor)
        assert editor.chosen == "cat2.png"
        overlay = app.draft.overlay_path()
        assert overlay is not None
        append_edits(overlay, {"cat2.png": Edit(("a cat in another light",))})
        editor.dismiss(True)
        await rest(pilot)
        assert isinstance(app.screen, GalleryScreen)
        assert "a cat in another light" in screen_text(app)
        await go_to(pilot, "review")
        assert str(overlay)[:20] in screen_text(app)


@pytest.mark.parametrize("key", ["f", "g"])
async def test_the_smallest_terminal_shows_pictures_and_buttons(make_app: MakeApp, cats: Path, key: str) -> None:
    app = make_app(draft_of(cats))
    async with app.run_test(size=(60, 18)) as pilot:
        await open_page(pilot)
        await pilot.press(key)
        await rest(pilot)
        assert "Back" in screen_text(app)
        assert "cat" in screen_text(app)


async def test_help_lists_the_keys_of_the_screen_that_is_shown(make_app: MakeApp, cats: Path) -> None:
    app = make_app(draft_of(cats))
    async with app.run_test(size=(120, 36)) as pilot:
        await open_page(pilot)
        await pilot.press("g", "f1")
        await rest(pilot)
        assert isinstance(app.screen, HelpScreen)
        assert "Find by name, caption or finding." in screen_text(app)
        assert "Copy the run file." not in screen_text(app)


async def test_hostile_names_and_captions_stay_text(make_app: MakeApp, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for number, hostile in enumerate(("\x1b[2J", "[@click=app.quit]x", "\u202e")):
        noise(folder / f"{number}{hostile}.png", 1)
        (folder / f"{number}{hostile}.txt").write_text(f"a cat {hostile}")
    app = make_app(draft_of(folder))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_page(pilot)
        for key in ("g", "f"):
            await pilot.press(key)
            await rest(pilot)
            for strip in app.screen._compositor.render_strips():
                for segment in strip:
                    assert segment.text.isprintable() or segment.control, segment
                    assert segment.style is None or "app.quit" not in str(segment.style.meta.get("@click"))
            await pilot.press("escape")
            await pilot.pause()


def test_the_time_that_is_left_is_told_when_it_can_be_known() -> None:
    assert remaining(0.5, 10, 100) == ""
    assert remaining(5, 0, 100) == ""
    assert remaining(5, 100, 100) == ""
    assert remaining(10, 100, 300) == "about 20 s left"
    assert remaining(60, 100, 400) == "about 3 min left"
    assert remaining(3600, 1, 3) == "about 2.0 h left"
    look = Look(())
    look.tell("opening pictures", 1200, 10_000)
    look.stage_started -= 12
    assert look.progress().startswith("opening pictures 1,200 of 10,000 · ")
    assert look.progress().endswith(" · about 1 min left")
