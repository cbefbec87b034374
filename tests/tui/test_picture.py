"""One picture in the terminal: read in a thread, drawn once, and any file is survived."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from PIL import Image
from textual.app import App, ComposeResult

from lorasmith.tui import thumbnails
from lorasmith.tui.glyphs import ASCII
from lorasmith.tui.thumbnails import Thumbnails, Wish
from lorasmith.tui.widgets import picture as picture_module
from lorasmith.tui.widgets.picture import Picture


@pytest.fixture(autouse=True)
def colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLORTERM", "truecolor")


class OnePicture(App[None]):
    def compose(self) -> ComposeResult:
        yield Picture()


def shown(app: App[None]) -> str:
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


async def loaded(app: App[None]) -> None:
    widget = app.query_one(Picture)
    for _ in range(500):
        if not widget.busy():
            break
        await asyncio.sleep(0.01)


def red(path: Path, size: tuple[int, int] = (64, 64)) -> Path:
    Image.new("RGB", size, "red").save(path)
    return path


async def test_a_picture_fills_the_space_with_its_caption_below(tmp_path: Path) -> None:
    app = OnePicture()
    async with app.run_test(size=(40, 12)) as pilot:
        assert "▀" not in shown(app)
        app.query_one(Picture).show(red(tmp_path / "a.png"), "a \x1b[31m[b]red picture")
        await loaded(app)
        await pilot.pause()
        screen = shown(app)
        assert screen.count("▀") == 22 * 11
        assert screen.splitlines()[-1].startswith("a ␛[31m[b]red picture")
        await pilot.resize_terminal(60, 20)
        await pilot.pause()
        await loaded(app)
        await pilot.pause()
        assert shown(app).count("▀") == 38 * 19
        app.query_one(Picture).show(None)
        await pilot.pause()
        assert not shown(app).strip()


async def test_a_damaged_or_missing_picture_is_said_in_words(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nonsense")
    app = OnePicture()
    async with app.run_test(size=(60, 8)) as pilot:
        for path in (bad, tmp_path / "none.png"):
            app.query_one(Picture).show(path)
            await loaded(app)
            await pilot.pause()
            assert "Cannot show it: " in shown(app)


async def test_the_same_picture_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    load = thumbnails.load_cells
    monkeypatch.setattr(thumbnails, "load_cells", lambda wish: reads.append(wish.path) or load(wish))
    app = OnePicture()
    path = red(tmp_path / "a.png")
    async with app.run_test(size=(40, 12)) as pilot:
        for caption in ("one", "two", "two"):
            app.query_one(Picture).show(path, caption)
            await loaded(app)
            await pilot.pause()
        assert reads == [path]


async def test_a_terminal_without_half_blocks_or_colors_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_module, "glyphs", lambda: ASCII)
    app = OnePicture()
    async with app.run_test(size=(60, 8)) as pilot:
        app.query_one(Picture).show(red(tmp_path / "a.png"))
        await pilot.pause()
        assert "This terminal cannot show pictures." in shown(app)
    monkeypatch.undo()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not picture_module.can_draw_pictures()


def test_a_new_wish_replaces_what_was_not_loaded_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, over = threading.Event(), threading.Event(), threading.Event()
    reads: list[str] = []

    def slow(wish: Wish) -> str:
        reads.append(wish.path.name)
        begun.set()
        go_on.wait(10)
        return "no picture"

    monkeypatch.setattr(thumbnails, "load_cells", slow)
    found = Thumbnails(lambda: over.set() if len(reads) == 2 else None)
    found.want([Wish(Path(name), 4, 4) for name in "abcdef"])
    assert begun.wait(10)
    found.want([Wish(Path("z"), 4, 4)])
    go_on.set()
    assert over.wait(10)
    assert reads == ["a", "z"]


def test_the_longest_unseen_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(thumbnails, "load_cells", lambda wish: wish.path.name)
    told: list[int] = []
    found = Thumbnails(lambda: (told.append(1), done.set() if len(told) == 3 else None)[0], bound=2)
    wishes = [Wish(Path(name), 4, 4) for name in "abc"]
    found.want(wishes)
    assert done.wait(10)
    assert [found.get(wish) for wish in wishes] == [None, "b", "c"]
