"""The newest previews as half-block pictures, with the path of each; left and right browse steps, up and down prompts.

Half blocks need no probe of the terminal and work in tmux and over ssh. Reading and scaling happen in a thread; a
picture is drawn again only when it is another one or the size changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.worker import Worker

from lorasmith.engine.errors import LorasmithError
from lorasmith.engine.events import PreviewReady
from lorasmith.tui.widgets.line import Drawn, glyphs

Pixels = npt.NDArray[np.uint8]
GAP = 1
MIN_SIDE = 20
"""Pixels below which several pictures side by side show nothing."""


@dataclass(frozen=True)
class Grid:
    """How many pictures are side by side and above each other, and the cells that each may take."""

    columns: int
    rows: int
    cell_width: int
    cell_height: int


def plan_grid(count: int, width: int, height: int) -> Grid:
    """Return the grid for at most `count` square pictures in `width` x `height` cells: large ones, rather two than one.

    One row of each picture's cells is for its caption.
    """
    best, most = Grid(1, 1, max(1, width), max(1, height - 1)), 0.0
    for columns in range(1, count + 1):
        for rows in range(1, -(-count // columns) + 1):
            cell_width, cell_height = (width - GAP * (columns - 1)) // columns, height // rows - 1
            side = min(cell_width, 2 * cell_height)
            # Area alone would favor one: pictures with and without the trigger are worth seeing together.
            worth = min(count, columns * rows) ** 1.5 * side * side
            if (side >= MIN_SIDE or columns * rows == 1) and worth > most:
                best, most = Grid(columns, rows, cell_width, cell_height), worth
    return best


def read_pixels(path: Path, width: int, height: int) -> Pixels:
    """Return the picture scaled to fit `width` x `height` cells of two pixels each: (rows, columns, 3), rows even.

    Raises LorasmithError or OSError where it cannot be read.
    """
    from PIL import Image

    from lorasmith.engine.dataset.images import open_image

    image = open_image(path)
    scale = min(width / image.width, 2 * height / image.height)
    columns = max(1, min(width, round(image.width * scale)))
    rows = max(2, min(2 * height, 2 * round(image.height * scale / 2)))
    return np.asarray(
        image.resize((columns, rows), Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    )


def pixel_rows(pixels: Pixels, half_blocks: bool) -> list[list[Segment]]:
    """Return cells that show `pixels`: a half block for two of them, or a space in their mean color."""
    top, bottom = pixels[0::2].astype(int), pixels[1::2].astype(int)
    if not half_blocks:
        top = bottom = (top + bottom) // 2
    rows = []
    for above, below in zip(top.tolist(), bottom.tolist(), strict=True):
        row: list[Segment] = []
        for upper, lower in zip(above, below, strict=True):
            mark = "▀" if half_blocks else " "
            style = _pixel_style(tuple(upper), tuple(lower))
            if row and row[-1].style == style:
                row[-1] = Segment(row[-1].text + mark, style)
            else:
                row.append(Segment(mark, style))
        rows.append(row)
    return rows


@lru_cache(maxsize=8192)
def _pixel_style(upper: tuple[int, int, int], lower: tuple[int, int, int]) -> Style:
    return Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower))


class Browser:
    """Which previews are selected: a step and one of its pictures; it follows new steps while at the newest."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.steps: list[int] = []
        self.step_index = -1
        self.prompt_index = 0
        self._by_step: dict[int, list[PreviewReady]] = {}

    def update(self, previews: Sequence[PreviewReady]) -> None:
        """Take in the previews of the run; a user at the newest step stays at the newest."""
        following = self.step_index >= len(self.steps) - 1
        chosen = self.steps[self.step_index] if self.steps else None
        self._by_step = {}
        for preview in previews:
            self._by_step.setdefault(preview.step, []).append(preview)
        self.steps = sorted(self._by_step)
        if following or chosen not in self.steps:
            self.step_index = len(self.steps) - 1
        else:
            self.step_index = self.steps.index(chosen)
        self.prompt_index = min(self.prompt_index, max(0, len(self.pictures) - 1))

    @property
    def pictures(self) -> list[PreviewReady]:
        """All pictures of the selected step."""
        return self._by_step.get(self.steps[self.step_index], []) if self.steps else []

    @property
    def selected(self) -> PreviewReady | None:
        """The selected picture."""
        return self.pictures[self.prompt_index] if self.pictures else None

    def move(self, steps: int, prompts: int) -> None:
        """Select another step or prompt; at the ends nothing changes."""
        self.step_index = max(0, min(self.step_index + steps, len(self.steps) - 1))
        self.prompt_index = max(0, min(self.prompt_index + prompts, len(self.pictures) - 1))


@dataclass(frozen=True)
class _Loaded:
    """Rows of cells per path, for one size."""

    key: object
    rows: dict[str, list[list[Segment]]]
    failures: dict[str, str]


def _load(key: object, paths: Sequence[str], grid: Grid, half_blocks: bool) -> _Loaded:
    loaded = _Loaded(key, {}, {})
    for path in paths:
        try:
            pixels = read_pixels(Path(path), grid.cell_width, grid.cell_height)
        except (OSError, ValueError, LorasmithError) as error:
            loaded.failures[path] = str(error)
            continue
        loaded.rows[path] = pixel_rows(pixels, half_blocks)
    return loaded


class Preview(Drawn, can_focus=True):
    """The pictures of one step, as many side by side as the space shows well, and the selected one's path."""

    DEFAULT_CSS = "Preview { height: 1fr; width: 1fr; }"
    waiting: ClassVar[str] = "Previews appear here."

    def __init__(self, *, id: str | None = None) -> None:
        """Start without pictures."""
        super().__init__(id=id)
        self.browser = Browser()
        self._previews: tuple[PreviewReady, ...] = ()
        self._loaded = _Loaded(None, {}, {})
        self._wanted: object = None

    def show(self, previews: tuple[PreviewReady, ...]) -> None:
        """Show the newest of `previews`, or what the user browsed to."""
        if previews == self._previews:
            return
        self._previews = previews
        self.browser.update(previews)
        self._request()

    def browse(self, steps: int = 0, prompts: int = 0) -> None:
        """Select another step or prompt."""
        self.browser.move(steps, prompts)
        self._request()

    def on_resize(self) -> None:
        """Scale anew."""
        self._request()

    def _grid(self) -> Grid:
        return plan_grid(len(self.browser.pictures), self.size.width, self.size.height - 2)

    def _shown(self, grid: Grid) -> list[PreviewReady]:
        many = grid.columns * grid.rows
        begin = self.browser.prompt_index // many * many
        return self.browser.pictures[begin : begin + many]

    def _request(self) -> None:
        self.draw_anew()
        if not self.size.area or not self.browser.pictures:
            return
        grid = self._grid()
        paths = tuple(preview.path for preview in self._shown(grid))
        key: object = (paths, grid)
        self._wanted = key
        if key != self._loaded.key:
            _: Worker[None] = self.run_worker(
                partial(self._fetch, key, paths, grid), group="preview", exclusive=True, exit_on_error=False
            )

    async def _fetch(self, key: object, paths: tuple[str, ...], grid: Grid) -> None:
        loaded = await asyncio.to_thread(_load, key, paths, grid, glyphs().half_blocks)
        if key == self._wanted:
            self._loaded = loaded
            self.draw_anew()

    def draw(self) -> list[Strip]:
        """Return all rows."""
        width, height = self.size
        blank = Strip.blank(width, self.rich_style)
        selected = self.browser.selected
        if selected is None:
            lines = [blank] * height
            lines[0] = self.paint([("Previews", "strong")], width)
            if height > 2:
                lines[height // 2] = self.paint([(f"{self.waiting:^{width}}", "dim")], width)
            return lines
        browser, mark = self.browser, f" {glyphs().separator} "
        grid = self._grid()
        title = [(f"step {selected.step} ({browser.step_index + 1} of {len(browser.steps)})", "strong")]
        if len(browser.pictures) > grid.columns * grid.rows:
            which = f"{browser.prompt_index + 1} of {len(browser.pictures)}"
            fits = len(title[0][0]) + len(f"{mark}picture {which}") <= width
            title.append((f"{mark}{'picture ' if fits else ''}{which}", "dim"))
        if sum(len(text) for text, _ in title) + len(f"Previews{mark}") <= width:
            title.insert(0, (f"Previews{mark}", "strong"))
        body: list[Strip] = []
        shown = self._shown(grid)
        for begin in range(0, len(shown), grid.columns):
            body += self._draw_row(shown[begin : begin + grid.columns], grid)
        body = [strip.adjust_cell_length(width, self.rich_style) for strip in body[: height - 2]]
        body += [blank] * (height - 2 - len(body))
        return [self.paint(title, width), *body, self.paint([(_tail(selected.path, width), "dim")], width)]

    def _draw_row(self, pictures: Sequence[PreviewReady], grid: Grid) -> list[Strip]:
        gap = Strip.blank(GAP, self.rich_style)
        columns = [self._draw_picture(picture, grid) for picture in pictures]
        return [Strip.join([part for strip in line for part in (strip, gap)]) for line in zip(*columns, strict=True)]

    def _draw_picture(self, preview: PreviewReady, grid: Grid) -> list[Strip]:
        width = grid.cell_width
        rows = self._loaded.rows.get(preview.path, []) if self._current(grid) else []
        left = (width - len_cells(rows)) // 2
        strips = []
        for row in rows[: grid.cell_height]:
            strip = Strip([Segment(" " * left, self.rich_style), *row])
            strips.append(strip.adjust_cell_length(width, self.rich_style))
        failure = self._loaded.failures.get(preview.path)
        if failure:
            strips.append(self.paint([(f"Cannot show it: {failure}", "high")], width))
        role = "strong" if preview is self.browser.selected and len(self.browser.pictures) > 1 else "dim"
        strips.append(self.paint([(f"{preview.prompt} (seed {preview.seed})", role)], width))
        return strips + [Strip.blank(width, self.rich_style)] * (grid.cell_height + 1 - len(strips))

    def _current(self, grid: Grid) -> bool:
        key = self._loaded.key
        return isinstance(key, tuple) and key[1] == grid


def len_cells(rows: Sequence[Sequence[Segment]]) -> int:
    """Return the width of the first row in cells."""
    return sum(len(segment.text) for segment in rows[0]) if rows else 0


def _tail(path: str, width: int) -> str:
    """Return the end of `path`, which tells more than its beginning."""
    return path if len(path) <= width else glyphs().ellipsis + path[-(width - 1) :]
