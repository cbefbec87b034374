"""Thumbnails in rows: laid out, moved through, read only where they are seen."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from textual import on
from textual.app import App, ComposeResult
from textual.pilot import Pilot

from lorasmith.tui import thumbnails
from lorasmith.tui.glyphs import ASCII
from lorasmith.tui.thumbnails import Wish
from lorasmith.tui.widgets import picture as picture_module
from lorasmith.tui.widgets.gallery import Gallery
from lorasmith.tui.widgets.tiles import TEXT_ROWS, Tile, lay_out, plan_for, plan_tiles


@pytest.fixture(autouse=True)
def colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLORTERM", "truecolor")


class OneGallery(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []

    def compose(self) -> ComposeResult:
        yield Gallery()

    @on(Gallery.Opened)
    def _opened(self, event: Gallery.Opened) -> None:
        self.opened.append(event.tile.relative)


def tiles(count: int, folder: Path = Path("/nowhere")) -> list[Tile]:
    return [Tile(f"cats/{number:05}.png", folder / f"{number:05}.png", "64×64") for number in range(count)]


def shown(app: App[None]) -> str:
    return "\n".join(strip.text.rstrip() for strip in app.screen._compositor.render_strips())


async def loaded(pilot: Pilot[None]) -> None:
    gallery = pilot.app.query_one(Gallery)
    for _ in range(500):
        if not gallery.busy():
            break
        await asyncio.sleep(0.01)
    await pilot.pause()


@given(st.integers(1, 300), st.integers(1, 100), st.sampled_from([12, 18, 28, 44]))
def test_tiles_fit_the_space(width: int, height: int, wanted: int) -> None:
    grid = plan_tiles(width, height, wanted)
    assert grid.columns * (grid.width + 1) - 1 <= width
    assert grid.rows == 1 or grid.rows * (grid.height + TEXT_ROWS) <= height
    assert min(grid.columns, grid.rows, grid.width, grid.height) >= 1


def test_few_pictures_are_shown_large_and_many_small() -> None:
    many, few, pair = (plan_for(groups, 72, 26, 1) for groups in ((500,), (2,), (2, 2)))
    assert many == plan_tiles(72, 26, 18)
    assert few.width > many.width
    assert pair.columns >= 2
    assert pair.rows >= 2


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 9))
def test_every_picture_has_one_place_and_each_group_begins_a_row(groups: list[int], columns: int) -> None:
    rows = lay_out(groups, columns)
    assert [number for row in rows for number in row] == list(range(sum(groups)))
    assert all(0 < len(row) <= columns for row in rows)
    begins, first = {row.start for row in rows}, 0
    for size in groups:
        assert first in begins
        first += size


async def test_arrows_pages_and_ends_move_through_the_pictures() -> None:
    app = OneGallery()
    async with app.run_test(size=(56, 22)) as pilot:
        gallery = app.query_one(Gallery)
        gallery.focus()
        gallery.show(tiles(100))
        await pilot.pause()
        grid = plan_tiles(56, 22, 18)
        assert (grid.columns, grid.rows) == (3, 2)
        for key, index in (
            ("right", 1),
            ("down", 4),
            ("left", 3),
            ("up", 0),
            ("up", 0),
            ("left", 0),
            ("pagedown", 6),
            ("end", 99),
            ("down", 99),
            ("right", 99),
            ("pageup", 93),
            ("home", 0),
        ):
            await pilot.press(key)
            assert gallery.index == index, key
        await pilot.press("right", "enter")
        await pilot.pause()
        assert app.opened == ["cats/00001.png"]


async def test_the_selected_picture_is_always_visible() -> None:
    app = OneGallery()
    async with app.run_test(size=(56, 22)) as pilot:
        gallery = app.query_one(Gallery)
        gallery.focus()
        gallery.show(tiles(50))
        for key in ("end", "up", "pageup", "minus", "plus", "plus", "plus", "pagedown", "home"):
            await pilot.press(key)
            await pilot.pause()
            assert gallery.selected is not None
            assert gallery.selected.name in shown(app), key
        await pilot.resize_terminal(30, 9)
        await pilot.pause()
        assert gallery.selected.name in shown(app)


async def test_only_what_is_seen_is_read_out_of_ten_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    monkeypatch.setattr(thumbnails, "load_cells", lambda wish: reads.append(wish.path.name) or "no picture")
    app = OneGallery()
    async with app.run_test(size=(56, 22)) as pilot:
        gallery = app.query_one(Gallery)
        gallery.focus()
        gallery.show(tiles(10_000))
        await loaded(pilot)
        assert sorted(reads) == [f"{number:05}.png" for number in range(12)]  # what is seen, and the next page
        reads.clear()
        await pilot.press("end")
        await loaded(pilot)
        assert 0 < len(reads) <= 12
        assert all(name >= "09980.png" for name in reads)


async def test_pictures_are_drawn_with_name_and_mark(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"nonsense")
    app = OneGallery()
    async with app.run_test(size=(56, 12)) as pilot:
        app.query_one(Gallery).show(
            [
                Tile("cats/a.png", tmp_path / "a.png", "64×64", "!"),
                Tile("cats/\x1b[31m[b]b.png", tmp_path / "b.png", "1×1"),
            ]
        )
        await loaded(pilot)
        screen = shown(app)
        assert screen.count("▀") > 100
        assert "! a.png" in screen
        assert "␛[31m[b]b.png" in screen
        assert "cannot show" in screen


async def test_without_half_blocks_names_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_module, "glyphs", lambda: ASCII)
    monkeypatch.setattr(thumbnails, "load_cells", lambda wish: pytest.fail("a picture was read"))
    app = OneGallery()
    async with app.run_test(size=(56, 12)) as pilot:
        gallery = app.query_one(Gallery)
        gallery.focus()
        gallery.show(tiles(100))
        await pilot.press("pagedown")
        lines = shown(app).splitlines()
        assert len(lines) == 12
        assert lines[11] == "cats/00012.png  64×64"


async def test_the_selection_stays_with_its_picture_and_else_with_its_place() -> None:
    app = OneGallery()
    async with app.run_test(size=(56, 22)) as pilot:
        gallery = app.query_one(Gallery)
        gallery.show(tiles(10))
        gallery.select("cats/00005.png")
        await pilot.pause()
        gallery.show([tile for tile in tiles(10) if tile.name != "00002.png"])
        assert gallery.selected is not None
        assert gallery.selected.name == "00005.png"
        gallery.show([tile for tile in tiles(10) if tile.name != "00005.png"])
        assert gallery.selected.name == "00004.png" or gallery.selected.name == "00006.png"
        gallery.show([])
        await pilot.pause()
        assert gallery.selected is None
        assert "No pictures." in shown(app)


def test_a_wish_is_for_one_size() -> None:
    assert Wish(Path("a"), 4, 4) != Wish(Path("a"), 4, 5)
