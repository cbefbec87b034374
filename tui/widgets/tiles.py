"""How thumbnails are laid out: tiles of a picture with two lines of text, in rows that groups begin anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from textual.geometry import clamp

from lorasmith.tui.widgets.preview import GAP

WIDTHS = (12, 18, 28, 44)
"""Cells that a picture takes at least, from many small ones to few large ones."""
USUAL_WIDTH = 1
TEXT_ROWS = 2


@dataclass(frozen=True)
class Tile:
    """One picture: its `relative` path, its file, and two lines of text; `mark` is that of its worst finding.

    `shape` is its height over its width.
    """

    relative: str
    path: Path
    note: str = ""
    mark: str = ""
    shape: float = 1.0

    @property
    def name(self) -> str:
        """The file's own name; the folder is told where the picture is selected."""
        return self.relative.rpartition("/")[2]


@dataclass(frozen=True)
class Grid:
    """How many tiles are side by side, how many rows of them are visible, and the cells of one picture."""

    columns: int
    rows: int
    width: int
    height: int


def plan_tiles(width: int, height: int, wanted: int, shape: float = 1.0) -> Grid:
    """Return the grid of tiles in `width` x `height` cells whose pictures are at least `wanted` cells wide.

    `shape` is the height over the width of the tallest picture; from 1.5 on, pictures are shown narrower instead.
    """
    # Where there is little height, a picture cannot use the width.
    wanted = clamp((height - TEXT_ROWS) * 5 // 2, min(WIDTHS), wanted)
    columns = clamp((width + GAP) // (wanted + GAP), 1, max(1, width))
    cell_width = max(1, (width - GAP * (columns - 1)) // columns)
    # A cell is about twice as high as wide: a square picture is half as many cells high.
    least, most = max(1, cell_width // 2), max(1, math.ceil(cell_width * clamp(shape, 1.0, 1.5) / 2))
    rows = max(1, height // (min(least, max(1, height - TEXT_ROWS)) + TEXT_ROWS))
    if 5 * (height // (rows + 1) - TEXT_ROWS) >= 4 * least:
        rows += 1  # a little lower each is better than a row's space left empty
    return Grid(columns, rows, cell_width, clamp(height // rows - TEXT_ROWS, 1, most))


def plan_for(groups: Sequence[int], width: int, height: int, zoom: int, shape: float = 1.0) -> Grid:
    """Return the grid for groups of so many pictures: of size `zoom` of WIDTHS, or larger where all fit even so."""
    grid = plan_tiles(width, height, WIDTHS[zoom], shape)
    for wanted in WIDTHS[zoom + 1 :]:
        larger = plan_tiles(width, height, wanted, shape)
        if len(lay_out(groups, larger.columns)) > larger.rows or larger.height < grid.height:
            break
        grid = larger
    return grid


def lay_out(groups: Sequence[int], columns: int) -> list[range]:
    """Return rows of tile numbers: each group of so many tiles begins a row, and goes on in the next where it must."""
    rows, begin = [], 0
    for size in groups:
        rows += [range(first, min(first + columns, begin + size)) for first in range(begin, begin + size, columns)]
        begin += size
    return rows
