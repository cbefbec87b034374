"""The tag table: how often, which pictures, and from there the caption or the bulk edit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.engine.dataset.overlay import Edit
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.screens.bulk_edit import BulkEdit
from lorasmith.tui.screens.caption_editor import CaptionEditor
from lorasmith.tui.screens.tag_counts import TagCounts
from tests.tui.caption_screens import a_draft, edits_of, open_over_scan, until
from tests.tui.conftest import SIZES, replace_text, screen_text

MakeApp = Callable[..., LorasmithApp]


@pytest.fixture
def tagged(pictures: Path) -> Path:
    for name, text in (("a", "red hair, hat"), ("b", "Red  Hair, boat"), ("c", "red hair, hat, [b]x[/]\x1b[2J")):
        (pictures / f"{name}.txt").write_text(text)
    return pictures


@pytest.mark.parametrize("size", SIZES)
async def test_tags_are_counted_with_their_share_and_their_pictures(
    make_app: MakeApp, tagged: Path, size: tuple[int, int]
) -> None:
    app = make_app(a_draft(tagged))
    async with app.run_test(size=size) as pilot:
        await open_over_scan(pilot, TagCounts)
        await until(pilot, lambda: "4 of 4 tags · 2 used once" in screen_text(app))
        lines = screen_text(app).splitlines()
        first = next(line for line in lines if "› red hair" in line)
        assert "3  75% ━" in first
        hat = next(line for line in lines if "  hat" in line)
        assert "2  50% ━" in hat
        assert "3 pictures: red hair" in screen_text(app)
        assert "[b]x[/]␛[2J" in screen_text(app)
        assert "\x1b" not in screen_text(app)
        await until(pilot, lambda: "▀" in screen_text(app))
        await pilot.press("down")
        assert "2 pictures: hat" in screen_text(app)


async def test_enter_leads_to_the_pictures_and_on_to_their_captions(make_app: MakeApp, tagged: Path) -> None:
    app = make_app(a_draft(tagged))
    async with app.run_test(size=(80, 24)) as pilot:
        returned = await open_over_scan(pilot, TagCounts)
        await until(pilot, lambda: "3 pictures" in screen_text(app))
        await pilot.press("slash", *"boa", "enter", "enter", "enter")
        await until(pilot, lambda: isinstance(app.screen, CaptionEditor))
        await pilot.press(*", sea", "escape", "escape")
        await until(pilot, lambda: isinstance(app.screen, TagCounts) and "1 of 5 tags" in screen_text(app))
        await pilot.press("escape")
        assert app.focused is app.screen.query_one("#tag-rows")
        await pilot.press("escape")
        await until(pilot, lambda: bool(returned))
    assert returned == [True]
    assert edits_of(app) == {"b.png": Edit(("Red  Hair, boat, sea",))}


async def test_a_tag_is_removed_or_renamed_everywhere_after_its_preview(make_app: MakeApp, tagged: Path) -> None:
    app = make_app(a_draft(tagged))
    async with app.run_test(size=(80, 24)) as pilot:
        await open_over_scan(pilot, TagCounts)
        await until(pilot, lambda: "3 pictures" in screen_text(app))
        await pilot.press("d")
        await until(pilot, lambda: isinstance(app.screen, BulkEdit) and "3 of 4 captions" in screen_text(app))
        assert edits_of(app) == {}
        await pilot.press("ctrl+s")
        await until(pilot, lambda: len(edits_of(app)) == 3)
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, TagCounts) and "3 of 3 tags" in screen_text(app))
        assert "red hair" not in screen_text(app)
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, BulkEdit))
        assert app.focused is app.screen.query_one("#bulk-field-2")
        await replace_text(pilot, "cap")
        await until(pilot, lambda: "2 of 4 captions" in screen_text(app))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: edits_of(app)["a.png"] == Edit(("cap",)))
