"""How thumbnails are laid out: tiles of a picture with two lines of text, in rows that groups begin anew."""

from __future__ import annotations

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
    """One picture: its `relative` path, its file, and two lines of text; `mark` is that of its worst finding."""

    relative: str
    path: Path
    note: str = ""
    mark: str = ""

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


def plan_tiles(width: int, height: int, wanted: int, pictures: bool = True) -> Grid:
    """Return the grid of tiles in `width` x `height` cells whose pictures are about `wanted` cells wide.

    Without `pictures`, a tile is a line of text.
    """
    if not pictures:
        return Grid(1, max(1, height), max(1, width), 0)
    columns = clamp((width + GAP) // (wanted + GAP), 1, max(1, width))
    cell_width = max(1, (width - GAP * (columns - 1)) // columns)
    # A cell is about twice as high as it is wide: a square picture is half as many cells high.
    cell_height = clamp(cell_width // 2, 1, max(1, height - TEXT_ROWS))
    rows = max(1, height // (cell_height + TEXT_ROWS))
    return Grid(columns, rows, cell_width, max(1, height // rows - TEXT_ROWS))


def lay_out(groups: Sequence[int], columns: int) -> list[range]:
    """Return rows of tile numbers: each group of so many tiles begins a row, and goes on in the next where it must."""
    rows, begin = [], 0
    for size in groups:
        rows += [range(first, min(first + columns, begin + size)) for first in range(begin, begin + size, columns)]
        begin += size
    return rows
