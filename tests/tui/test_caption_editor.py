"""The caption editor: what is typed is kept, foreign text is only text, and files are written on request alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Button

from lorasmith.engine.dataset import overlay as overlay_module
from lorasmith.engine.dataset.overlay import Edit
from lorasmith.engine.errors import StorageError
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.screens.ask import AskScreen
from lorasmith.tui.screens.bulk_edit import BulkEdit
from lorasmith.tui.screens.caption_editor import CaptionEditor
from lorasmith.tui.screens.help import HelpScreen
from lorasmith.tui.widgets.caption_area import CaptionArea
from lorasmith.tui.widgets.caption_list import CaptionList
from tests.tui.caption_screens import a_draft, edits_of, open_over_scan, until
from tests.tui.conftest import SIZES, FakeTokenizer, screen_text

MakeApp = Callable[..., LorasmithApp]


def area(app: LorasmithApp) -> CaptionArea:
    return app.screen.query_one(CaptionArea)


def listed(app: LorasmithApp) -> list[str]:
    return app.screen.query_one(CaptionList).names


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_a_tokenizer_that_reads_less_than_its_family_sets_the_limit(make_app: MakeApp, pictures: Path) -> None:
    short = FakeTokenizer()
    short.model_max_length = 20
    app = make_app(a_draft(pictures), tokenizers=lambda base, tell: [short])
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, lambda found: CaptionEditor(found, "b.png"))
        await until(pilot, lambda: "! 22 of 20 tokens: the last 2 are not read" in screen_text(app))


@pytest.mark.parametrize("size", SIZES)
async def test_the_picture_its_caption_its_length_and_its_prompt_are_shown(
    make_app: MakeApp, pictures: Path, size: tuple[int, int]
) -> None:
    app = make_app(a_draft(pictures))
    async with app.run_test(size=size) as pilot:
        await open_over_scan(pilot, lambda found: CaptionEditor(found, "b.png"))
        await until(pilot, lambda: "▀" in screen_text(app))
        shown = screen_text(app)
        for words in (
            "lorasmith · Captions · 4 pictures",
            "nothing edited",
            "4 of 4 · 1 missing",
            "b.png · 96 × 64",
            "Caption · from b.txt",
            "a red picture b",
            "22 of 77 tokens · 5 words",
            "Prompt: zqx, a red picture b",
            "Enter: next picture",
        ):
            assert words in shown
        for button in app.screen.query(Button):
            assert str(button.label) in shown
        assert app.focused is area(app)


async def test_what_is_typed_is_kept_when_the_picture_is_left_and_the_dataset_stays_as_it_is(
    make_app: MakeApp, pictures: Path
) -> None:
    before = files_of(pictures)
    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        returned = await open_over_scan(pilot, CaptionEditor)
        await pilot.press(*", hat", "enter")
        assert area(app).text == "a red picture b"
        await pilot.press("pagedown", "pagedown")
        assert "! no caption" not in screen_text(app)
        assert "no caption" in screen_text(app)
        await pilot.press(*"new", "pageup")
        await pilot.press("escape", "escape")
        await until(pilot, lambda: bool(returned))
    assert returned == [True]
    assert edits_of(app) == {"a.png": Edit(("a red picture a, hat",)), "d.png": Edit(("new",))}
    assert files_of(pictures) == before


async def test_going_through_the_missing_ones_keeps_its_place(make_app: MakeApp, pictures: Path) -> None:
    for name in ("b", "c"):
        (pictures / f"{name}.txt").unlink()
    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, CaptionEditor)
        await pilot.press("escape", "m", "down", "enter")
        assert listed(app) == ["b.png", "c.png", "d.png"]
        # One burst, as a quick typist's keys arrive over a slow line.
        await pilot.press(*"for c", "enter", *"for d", "ctrl+s")
        assert listed(app) == ["b.png"]
        await until(pilot, lambda: len(edits_of(app)) == 2)
    assert edits_of(app) == {"c.png": Edit(("for c",)), "d.png": Edit(("for d",))}


async def test_looking_alone_edits_nothing_even_a_caption_with_odd_line_ends(make_app: MakeApp, pictures: Path) -> None:
    (pictures / "b.txt").write_bytes("one\rtwo\u2028three\r\n\tfour".encode())
    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        returned = await open_over_scan(pilot, CaptionEditor)
        await pilot.press(*["pagedown"] * 3, *["pageup"] * 3, "escape", "escape")
        await until(pilot, lambda: bool(returned))
    assert returned == [False]
    assert edits_of(app) == {}


async def test_marks_filter_and_the_show_key_find_pictures(make_app: MakeApp, pictures: Path) -> None:
    app = make_app(a_draft(pictures, a=Edit(("a boat",)), b=Edit(("tags",), by="wd14")))
    (pictures / "c.txt").write_text("long " * 40)
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, CaptionEditor)
        await pilot.press("escape")
        shown = screen_text(app)
        for words in ("*  a.png", "~  b.png", " + c.png", "!  d.png"):
            assert words in shown
        await pilot.press("m")
        assert listed(app) == ["d.png"]
        assert "missing only (m)" in screen_text(app)
        await pilot.press("m", "m")
        assert listed(app) == ["b.png"]
        assert "written by wd14" in screen_text(app)
        await pilot.press("m")
        assert listed(app) == ["c.png"]
        await pilot.pause()
        assert "! 206 of 77 tokens: the last 129 are not read" in screen_text(app)
        await pilot.press("m", "slash", *"boat")
        assert listed(app) == ["a.png"]
        await pilot.press("enter", "enter")
        assert area(app).text == "a boat"
        await pilot.press("escape", "slash", *" x")
        assert "No picture matches." in screen_text(app)
        await pilot.press("escape")
        assert len(listed(app)) == 4


async def test_undo_and_the_files_own_text(make_app: MakeApp, pictures: Path) -> None:
    app = make_app(a_draft(pictures, a=Edit(("edited before",))))
    async with app.run_test(size=(120, 36)) as pilot:
        await open_over_scan(pilot, CaptionEditor)
        assert area(app).text == "edited before"
        await pilot.press("escape", "r")
        assert area(app).text == "a red picture a"
        assert "from a.txt" in screen_text(app)
        await pilot.press("r")
        assert "This caption is that of the file." in screen_text(app)
        await pilot.press("down", "enter", *"!", "f8")
        assert area(app).text == "a red picture b"
        await pilot.press("f8")
        assert area(app).text == "edited before"
        await pilot.press("f8")
        assert "There is nothing to undo." in screen_text(app)
    assert edits_of(app)["a.png"] == Edit(("edited before",))


async def test_a_picture_with_several_captions_keeps_the_others(make_app: MakeApp, pictures: Path) -> None:
    app = make_app(a_draft(pictures, a=Edit(("one", "two"))))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, CaptionEditor)
        assert "Caption 1 of 2" in screen_text(app)
        await pilot.press("f9", *"!", "f9")
        assert area(app).text == "one"
        await until(pilot, lambda: edits_of(app)["a.png"].captions == ("one", "two!"))


async def test_a_prompt_that_is_drawn_anew_each_time_is_shown_as_the_first_use_has_it(
    make_app: MakeApp, pictures: Path
) -> None:
    draft = a_draft(pictures)
    draft.put("captions.tag_dropout", "1")
    app = make_app(draft)
    async with app.run_test(size=(120, 36)) as pilot:
        await open_over_scan(pilot, CaptionEditor)
        assert "Prompt: zqx, a red picture a" in screen_text(app)
        assert "Drawn anew each time; first: zqx\n" in screen_text(app)


async def test_foreign_text_is_only_text_and_new_lines_are_typed_with_ctrl_j(make_app: MakeApp, pictures: Path) -> None:
    (pictures / "a.txt").write_text("[@click=app.quit]x[/] \x1b[2J \u202e end")
    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, CaptionEditor)
        shown = screen_text(app)
        assert "[@click=app.quit]x[/] ␛[2J" in shown
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        await pilot.press("ctrl+j", "z", "ctrl+s")
        await until(pilot, lambda: bool(edits_of(app)))
    assert edits_of(app)["a.png"].captions == ("[@click=app.quit]x[/] \x1b[2J \u202e end\nz",)


async def test_files_are_written_after_a_question_and_the_originals_are_kept(
    make_app: MakeApp, pictures: Path, state_folder: Path
) -> None:
    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, CaptionEditor)
        await pilot.press("escape", "w")
        assert "Nothing is edited" in screen_text(app)
        await pilot.press("enter", *" new", "escape", "w")
        await until(pilot, lambda: isinstance(app.screen, AskScreen))
        assert "Write 1 caption to your own files?" in screen_text(app)
        assert "caption-backups" in screen_text(app)
        await pilot.press("k")
        assert (pictures / "a.txt").read_text() == "a red picture a"
        await pilot.press("w")
        await until(pilot, lambda: isinstance(app.screen, AskScreen))
        await pilot.press("w")
        await until(pilot, lambda: "1 caption file replaced, 0 new." in screen_text(app))
        assert "lorasmith caption restore" in screen_text(app)
        await pilot.press("o")
        await until(pilot, lambda: "nothing edited" in screen_text(app))
    assert (pictures / "a.txt").read_text() == "a red picture a new"
    assert edits_of(app)["a.png"] == Edit()
    kept = [path.read_text() for path in state_folder.rglob("a.txt")]
    assert kept == ["a red picture a"]


async def test_edits_that_cannot_be_written_are_told_and_leaving_asks(
    make_app: MakeApp, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, full = overlay_module.append_edits, threading.Event()
    full.set()

    def append(path: Path, edits: Any) -> None:
        if full.is_set():
            raise StorageError("The disk is full.", fix="Make room.")
        real(path, edits)

    monkeypatch.setattr(overlay_module, "append_edits", append)
    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        returned = await open_over_scan(pilot, CaptionEditor)
        await pilot.press("x", "enter")
        await until(pilot, lambda: "! not saved" in screen_text(app))
        assert "The disk is full. Make room." in screen_text(app)
        await pilot.press("escape", "escape")
        await until(pilot, lambda: isinstance(app.screen, AskScreen))
        await pilot.press("escape")
        assert not returned
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, AskScreen))
        full.clear()
        await pilot.press("t")
        await until(pilot, lambda: bool(returned))
    assert edits_of(app)["a.png"] == Edit(("a red picture ax",))


async def test_quitting_keeps_what_is_being_typed(make_app: MakeApp, pictures: Path) -> None:
    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, CaptionEditor)
        await pilot.press("x", "ctrl+q")
        await until(pilot, lambda: app.return_code is not None)
    assert edits_of(app)["a.png"] == Edit(("a red picture ax",))


async def test_help_lists_the_keys_of_the_editor_and_buttons_open_the_tools(make_app: MakeApp, pictures: Path) -> None:
    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, CaptionEditor)
        await pilot.press("f1")
        assert isinstance(app.screen, HelpScreen)
        await pilot.press("end")
        assert "Write the edits to your caption files." in screen_text(app)
        await pilot.press("escape")
        await pilot.press("x")
        await pilot.click("#bulk")
        await until(pilot, lambda: isinstance(app.screen, BulkEdit))
        assert "1 edited" in screen_text(app)
        names = {command.title for command in app.get_system_commands(app.screen_stack[-2])}
        assert {"Next", "Filter", "Undo", "Write to files"} <= names


async def test_a_dataset_of_thousands_is_listed_and_filtered(make_app: MakeApp, pictures: Path) -> None:
    from dataclasses import replace

    def many(found: Any) -> CaptionEditor:
        item = found.dataset.items[0]
        items = tuple(replace(item, relative=f"{n:05}.png", captions=(f"number {n}",)) for n in range(10_000))
        return CaptionEditor(replace(found, dataset=replace(found.dataset, items=items)), "09999.png")

    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, many)
        assert "number 9999" in screen_text(app)
        await pilot.press("escape", "home")
        assert "› " in screen_text(app)
        assert "number 0" in screen_text(app)
        await pilot.press("slash", *"number 1234")
        assert listed(app) == ["01234.png"]
