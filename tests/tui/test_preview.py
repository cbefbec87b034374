"""Previews: what is selected, how pictures are laid out, and that any file is survived."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from textual.app import App, ComposeResult

from lorasmith.engine.errors import LorasmithError
from lorasmith.engine.events import PreviewReady
from lorasmith.tui.widgets.preview import Browser, Preview, pixel_rows, plan_grid, read_pixels


def preview(step: int, prompt: str = "zqx", path: str = "", seed: int = 1) -> PreviewReady:
    return PreviewReady(step=step, prompt=prompt, seed=seed, path=path or f"{step}-{prompt}.png", line="")


def picture(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> str:
    Image.new("RGB", size, color).save(path)
    return str(path)


def test_the_browser_follows_new_steps_until_the_user_looks_back() -> None:
    browser = Browser()
    told = [preview(100), preview(200)]
    browser.update(told)
    assert browser.selected == told[-1]
    told.append(preview(300))
    browser.update(told)
    assert browser.selected == told[-1]
    browser.move(-1, 0)
    told.append(preview(400))
    browser.update(told)
    assert browser.selected is not None
    assert browser.selected.step == 200
    browser.move(99, 0)
    told.append(preview(500))
    browser.update(told)
    assert browser.selected.step == 500


def test_the_prompt_stays_selected_from_step_to_step() -> None:
    browser = Browser()
    browser.update([preview(step, prompt) for step in (100, 200) for prompt in ("a", "b", "c")])
    browser.move(0, 1)
    assert browser.selected is not None
    assert (browser.selected.step, browser.selected.prompt) == (200, "b")
    browser.move(-1, 0)
    assert (browser.selected.step, browser.selected.prompt) == (100, "b")
    browser.move(-5, -5)
    assert (browser.selected.step, browser.selected.prompt) == (100, "a")


def test_previews_that_vanish_on_a_resume_do_not_leave_a_dangling_selection() -> None:
    browser = Browser()
    browser.update([preview(100), preview(200, "a"), preview(200, "b")])
    browser.move(0, 1)
    browser.update([preview(100)])
    assert browser.selected is not None
    assert browser.selected.step == 100
    browser.update([])
    assert browser.selected is None


def test_a_picture_keeps_its_shape_and_fits() -> None:
    assert plan_grid(2, 30, 12).columns == 1
    assert plan_grid(2, 60, 14).columns == 2
    assert plan_grid(2, 30, 40).rows == 2


def test_pixels_fit_the_cells_and_keep_the_aspect(tmp_path: Path) -> None:
    wide = picture(tmp_path / "wide.png", (255, 0, 0), (200, 100))
    pixels = read_pixels(Path(wide), 40, 40)
    assert pixels.shape == (20, 40, 3)
    assert (pixels == (255, 0, 0)).all()


def test_a_cell_shows_two_pixels_one_above_the_other() -> None:
    pixels = np.array([[[255, 0, 0]], [[0, 0, 255]]], dtype=np.uint8)
    (row,) = pixel_rows(pixels, half_blocks=True)
    assert row[0].text == "▀"
    assert row[0].style is not None
    assert row[0].style.color is not None
    assert row[0].style.bgcolor is not None
    assert row[0].style.color.triplet == (255, 0, 0)
    assert row[0].style.bgcolor.triplet == (0, 0, 255)
    (row,) = pixel_rows(pixels, half_blocks=False)
    assert row[0].text == " "


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_a_file_that_is_no_picture_is_an_error_that_is_caught(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError, LorasmithError)):
        read_pixels(path, 10, 10)


class OnePreview(App[None]):
    def compose(self) -> ComposeResult:
        yield Preview()


def shown(app: App[None]) -> str:
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


async def test_the_widget_draws_the_picture_its_prompt_and_its_path(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", (200, 100, 50))
    app = OnePreview()
    async with app.run_test(size=(60, 20)) as pilot:
        widget = app.query_one(Preview)
        assert "Previews appear here." in shown(app)
        widget.show((preview(100, "zqx, a \x1b[31m[bold]cat", path),))
        await app.workers.wait_for_complete()
        await pilot.pause()
        screen = shown(app)
        assert screen.count("▀") > 300
        assert "step 100 (1 of 1)" in screen
        assert "zqx, a ␛[31m[bold]cat (seed 1)" in screen
        assert path[-30:] in screen


async def test_a_vanished_or_damaged_picture_is_said_and_harms_nothing(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nonsense")
    app = OnePreview()
    async with app.run_test(size=(60, 20)) as pilot:
        widget = app.query_one(Preview)
        widget.show((preview(100, "a", str(bad)),))
        await app.workers.wait_for_complete()
        await pilot.pause()
        assert "Cannot show it" in shown(app)
        good = picture(tmp_path / "good.png", (1, 2, 3))
        widget.show((preview(100, "a", str(bad)), preview(200, "a", good)))
        await app.workers.wait_for_complete()
        await pilot.pause()
        assert "▀" in shown(app)
