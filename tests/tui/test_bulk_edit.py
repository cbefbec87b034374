"""One change in many captions: seen before it is made, and taken back as one step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Button

from lorasmith.engine.dataset.overlay import Edit
from lorasmith.engine.errors import ConfigError
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.caption_operations import BY_NAME, OPERATIONS
from lorasmith.tui.forms import Choice, SafeInput
from lorasmith.tui.screens.bulk_edit import BulkEdit
from lorasmith.tui.while_open import while_open
from tests.tui.caption_screens import a_draft, edits_of, open_over_scan, until
from tests.tui.conftest import SIZES, replace_text, screen_text

MakeApp = Callable[..., LorasmithApp]


def bulk(app: LorasmithApp) -> BulkEdit:
    assert isinstance(app.screen, BulkEdit)
    return app.screen


def prefilled(operation: str, first: str = "") -> Callable[[Any], BulkEdit]:
    return lambda found: BulkEdit(found, None, operation, first)


async def previewed(pilot: Any, count: int) -> None:
    await until(pilot, lambda: f"{count} of 4 captions change" in screen_text(pilot.app))


@pytest.mark.parametrize("size", SIZES)
async def test_the_change_is_listed_before_it_is_made_and_undone_as_one_step(
    make_app: MakeApp, pictures: Path, size: tuple[int, int]
) -> None:
    app = make_app(a_draft(pictures))
    async with app.run_test(size=size) as pilot:
        await open_over_scan(pilot, BulkEdit)
        assert "Type the tag." in screen_text(app)
        assert app.screen.query_one("#apply", Button).disabled
        await pilot.press("tab", *"hat")
        await previewed(pilot, 4)
        shown = screen_text(app)
        for words in ("› a.png", "- a red picture a", "+ a red picture a, hat", "Apply (ctrl+s)", "nothing edited"):
            assert words in shown
        assert edits_of(app) == {}
        await pilot.press("ctrl+s")
        await until(pilot, lambda: "Done: add a tag last in 4 captions. u takes all of it back." in screen_text(app))
        await previewed(pilot, 0)
        await until(pilot, lambda: len(edits_of(app)) == 4)
        assert edits_of(app)["a.png"] == Edit(("a red picture a, hat",))
        assert edits_of(app)["d.png"] == Edit(("hat",))
        await pilot.press("f8")
        await previewed(pilot, 4)
        assert "Undone: add a tag last in 4 captions." in screen_text(app)
        await until(pilot, lambda: set(edits_of(app).values()) == {Edit()})
        await pilot.press("f8")
        assert "There is nothing to undo." in screen_text(app)


async def test_a_wrong_regex_is_told_below_its_field_and_changes_nothing(make_app: MakeApp, pictures: Path) -> None:
    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, prefilled("regex", "(red"))
        await until(pilot, lambda: "✗ (red with  is no valid regular expression" in screen_text(app))
        await pilot.press("ctrl+s")
        assert edits_of(app) == {}
        app.screen.query_one("#bulk-field-1").focus()
        await replace_text(pilot, r"(red) (\w+)")
        await pilot.press("enter", *r"\2 \1")
        await until(pilot, lambda: "+ a picture red a" in screen_text(app))
        assert "3 of 4 captions change" in screen_text(app)
        assert app.screen.query_one("#bulk-problem").display is False


async def test_a_regex_that_would_never_end_is_refused(make_app: MakeApp, pictures: Path) -> None:
    (pictures / "a.txt").write_text("a" * 60 + "!")
    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, prefilled("regex", "(a|aa|aaa)+$"))
        await until(pilot, lambda: "✗ The regular expression (a|aa|aaa)+$ takes too long." in screen_text(app))
        assert app.screen.query_one("#apply", Button).disabled


async def test_the_fields_follow_the_operation(make_app: MakeApp, pictures: Path) -> None:
    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, BulkEdit)
        choice = app.screen.query_one("#bulk-operation", Choice)
        for operation in OPERATIONS:
            assert choice.value == operation.label
            shown = screen_text(app)
            assert operation.about in shown
            for label in operation.fields:
                assert f"\n {label}" in shown
            await pilot.press("right")
        await pilot.press("left", "left")
        assert choice.value == BY_NAME["trigger"].label
        assert app.screen.query_one("#bulk-field-1", SafeInput).value == "zqx"
        await previewed(pilot, 4)
        assert "+ zqx, a red picture a" in screen_text(app)


async def test_regularization_pictures_are_changed_only_when_asked(
    make_app: MakeApp, pictures: Path, tmp_path: Path
) -> None:
    regular = tmp_path / "regular"
    regular.mkdir()
    (pictures / "d.png").rename(regular / "d.png")
    (regular / "d.txt").write_text("a picture")
    draft = a_draft(pictures)
    draft.put("dataset.regularization_folder", str(regular))
    app = make_app(draft)
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, prefilled("add-first", "hat"))
        await until(pilot, lambda: "3 of 3 captions change" in screen_text(app))
        app.screen.query_one("#bulk-scope").focus()
        await pilot.press("right")
        await until(pilot, lambda: "1 of 1 captions change" in screen_text(app))
        assert "regular/d.png" in screen_text(app)
        await pilot.press("right")
        await until(pilot, lambda: "4 of 4 captions change" in screen_text(app))


async def test_foreign_captions_are_only_text(make_app: MakeApp, pictures: Path) -> None:
    (pictures / "a.txt").write_text("red [@click=app.quit]x[/] \x1b[2J \u202e end")
    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, prefilled("replace", "red"))
        await previewed(pilot, 3)
        shown = screen_text(app)
        assert "- red [@click=app.quit]x[/] ␛[2J" in shown
        assert "\x1b" not in shown
        assert "\u202e" not in shown


@pytest.mark.parametrize(
    ("name", "first", "second", "before", "after"),
    [
        ("add-last", "hat", "", "red", "red, hat"),
        ("add-first", "hat", "", "red", "hat, red"),
        ("remove", "red", "", "blue, red", "blue"),
        ("rename", "red", "green", "blue, red", "blue, green"),
        ("replace", "r", "R", "red hair", "Red haiR"),
        ("regex", "(r)e", r"\1o", "red", "rod"),
        ("tidy", "", "", " red ,, blue ", "red, blue"),
        ("trigger", "zqx", "", "red zqx", "zqx, red"),
        ("letters", "", "", "cafÃ©", "café"),
    ],
)
def test_each_operation_does_what_it_says(name: str, first: str, second: str, before: str, after: str) -> None:
    assert BY_NAME[name].build(first, second)(before) == after


@pytest.mark.parametrize(
    "name", [operation.name for operation in OPERATIONS if operation.fields and operation.name != "regex"]
)
def test_an_operation_without_its_words_says_so(name: str) -> None:
    with pytest.raises(ConfigError):
        BY_NAME[name].build("", "")("red")


async def test_a_preview_that_ends_after_the_screen_was_left_is_dropped(make_app: MakeApp, pictures: Path) -> None:
    app = make_app(a_draft(pictures))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, prefilled("add-last", "sunny"))
        screen = app.screen
        assert isinstance(screen, BulkEdit)
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is not screen)
        await until(pilot, lambda: not screen.children)
        await while_open(screen, screen._preview(0))
