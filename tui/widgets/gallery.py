"""Thumbnails of pictures in rows: of all of them page by page, or of groups that belong together, a group a row.

Only what is visible is read, in a thread, and kept while it is likely to be seen again. A terminal that cannot draw
pictures gets a list of names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import clamp
from textual.message import Message
from textual.strip import Strip

from lorasmith.tui.thumbnails import Thumbnails, Wish
from lorasmith.tui.widgets.line import Drawn, glyphs
from lorasmith.tui.widgets.picture import can_draw_pictures
from lorasmith.tui.widgets.preview import GAP, len_cells
from lorasmith.tui.widgets.tiles import TEXT_ROWS, USUAL_WIDTH, WIDTHS, Grid, Tile, lay_out, plan_for, plan_tiles


class Gallery(Drawn, can_focus=True):
    """Pictures to move through with the arrow keys; `Selected` tells which one is selected, `Opened` Enter on it."""

    DEFAULT_CSS = "Gallery { height: 1fr; width: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "Previous picture", show=False, id="gallery-left"),
        Binding("right", "move(1)", "Next picture", show=False, id="gallery-right"),
        Binding("up", "move_rows(-1)", "Row above", show=False, id="gallery-up"),
        Binding("down", "move_rows(1)", "Row below", show=False, id="gallery-down"),
        Binding("pageup", "move_pages(-1)", "Page up", show=False, id="gallery-page-up"),
        Binding("pagedown", "move_pages(1)", "Page down", show=False, id="gallery-page-down"),
        Binding("home", "select(0)", "First picture", show=False, id="gallery-home"),
        Binding("end", "select(-1)", "Last picture", show=False, id="gallery-end"),
        Binding("enter", "open", "Open", show=False, id="gallery-open"),
        Binding("plus,equals_sign", "zoom(1)", "Larger", show=False, id="gallery-larger"),
        Binding("minus", "zoom(-1)", "Smaller", show=False, id="gallery-smaller"),
    ]
    waiting: ClassVar[str] = "No pictures."

    class Selected(Message):
        """Another picture is selected; None where there is none."""

        def __init__(self, gallery: Gallery, tile: Tile | None) -> None:
            super().__init__()
            self.gallery = gallery
            self.tile = tile

        @property
        def control(self) -> Gallery:
            """The gallery that it is selected in."""
            return self.gallery

    class Opened(Message):
        """Enter was pressed on a picture."""

        def __init__(self, gallery: Gallery, tile: Tile) -> None:
            super().__init__()
            self.gallery = gallery
            self.tile = tile

        @property
        def control(self) -> Gallery:
            """The gallery that it is in."""
            return self.gallery

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        """Start without pictures."""
        super().__init__(id=id, classes=classes)
        self.tiles: tuple[Tile, ...] = ()
        self.index = 0
        self._groups: tuple[int, ...] = ()
        self._shape = 1.0
        self._zoom: int | None = None
        """The size that was chosen, of WIDTHS; None: what shows enough pictures."""
        self._top = 0
        self._rows: list[range] = []
        self._loaded = Thumbnails(self._tell_loaded)

    @property
    def selected(self) -> Tile | None:
        """The selected picture."""
        return self.tiles[self.index] if self.index < len(self.tiles) else None

    def show(self, tiles: Sequence[Tile], groups: Sequence[int] = ()) -> None:
        """Show these pictures; `groups` are the numbers of those that belong together, in order.

        The selected picture stays selected where it is still there, else what took its place is.
        """
        shown = tuple(groups) or (len(tiles),)
        if (tuple(tiles), shown) == (self.tiles, self._groups):
            return
        before = self.selected
        self.tiles, self._groups = tuple(tiles), shown
        self._shape = max((tile.shape for tile in tiles), default=1.0)
        here = [number for number, tile in enumerate(self.tiles) if before and tile.relative == before.relative]
        if self.index not in here:
            self.index = here[0] if here else clamp(self.index, 0, max(0, len(self.tiles) - 1))
        self._request()
        if self.selected != before:
            self.post_message(self.Selected(self, self.selected))

    def select(self, relative: str) -> None:
        """Select a picture by its `relative` path, where it is shown."""
        for number, tile in enumerate(self.tiles):
            if tile.relative == relative:
                self.action_select(number)
                return

    def busy(self) -> bool:
        """Whether visible pictures are still to come."""
        return self._loaded.loading()

    # Moving

    def action_select(self, index: int) -> None:
        """Select a picture by its number; negative ones count from the end."""
        index = clamp(index % len(self.tiles) if index < 0 and self.tiles else index, 0, max(0, len(self.tiles) - 1))
        if index != self.index:
            self.index = index
            self._request()
            self.post_message(self.Selected(self, self.selected))

    def action_move(self, by: int) -> None:
        """Select the next or the previous picture."""
        self.action_select(max(0, self.index + by))

    def action_move_rows(self, by: int) -> None:
        """Select the picture above or below."""
        row = self._row_of(self.index)
        target = clamp(row + by, 0, max(0, len(self._rows) - 1))
        if target == row or not self._rows:
            return
        column = self.index - self._rows[row].start
        self.action_select(min(self._rows[target].start + column, self._rows[target].stop - 1))

    def action_move_pages(self, by: int) -> None:
        """Go as many rows further as are visible."""
        self.action_move_rows(by * self._grid().rows)

    def action_open(self) -> None:
        """Tell that Enter was pressed on the selected picture."""
        if self.selected is not None:
            self.post_message(self.Opened(self, self.selected))

    def action_zoom(self, by: int) -> None:
        """Show fewer and larger pictures, or more and smaller ones."""
        self._zoom = clamp(self._level() + by, 0, len(WIDTHS) - 1)
        self._request()

    def on_click(self, event: events.Click) -> None:
        """Select the picture that was clicked."""
        grid = self._grid()
        row, column = self._top + event.y // self._row_height(grid), event.x // (grid.width + GAP)
        if row < len(self._rows) and column < len(self._rows[row]):
            self.action_select(self._rows[row][column])

    def on_mouse_scroll_down(self) -> None:
        """Go a row further."""
        self.action_move_rows(1)

    def on_mouse_scroll_up(self) -> None:
        """Go a row back."""
        self.action_move_rows(-1)

    # Drawing

    def on_resize(self) -> None:
        """Scale anew."""
        self._request()

    def on_focus(self) -> None:
        """Mark the selected picture as the one that keys are for."""
        self.draw_anew()

    def on_blur(self) -> None:
        """Mark the selected picture as one that keys are not for."""
        self.draw_anew()

    def _grid(self) -> Grid:
        width, height = self.size
        if can_draw_pictures():
            return plan_for(self._groups, width, height, self._level(), self._shape)
        return Grid(1, max(1, height), max(1, width), 0)  # a line of text each

    def _level(self) -> int:
        if self._zoom is not None:
            return self._zoom
        usual, small = (plan_tiles(*self.size, WIDTHS[level]).rows for level in (USUAL_WIDTH, 0))
        return 0 if usual == 1 < small else USUAL_WIDTH

    def _row_height(self, grid: Grid) -> int:
        return grid.height + TEXT_ROWS if grid.height else 1

    def _row_of(self, index: int) -> int:
        return next((number for number, row in enumerate(self._rows) if index in row), 0)

    def _request(self) -> None:
        """Lay out, scroll to the selected picture, and have the visible ones and the next page read."""
        grid = self._grid()
        self._rows = lay_out(self._groups, grid.columns)
        row = self._row_of(self.index)
        self._top = clamp(self._top, row - grid.rows + 1, row)
        self._top = clamp(self._top, 0, max(0, len(self._rows) - grid.rows))
        if grid.height and self.size.area:
            near = self._rows[self._top : self._top + 2 * grid.rows]
            self._loaded.want([self._wish(self.tiles[number], grid) for row in near for number in row])
        self.draw_anew()

    def _wish(self, tile: Tile, grid: Grid) -> Wish:
        return Wish(tile.path, grid.width, grid.height)

    def _tell_loaded(self) -> None:
        self.call_later(self.draw_anew)  # from the loading thread: it only puts a message into the queue

    def draw(self) -> list[Strip]:
        """Return all rows."""
        width, grid = self.size.width, self._grid()
        if not self.tiles:
            return [self.paint([(self.waiting, "dim")], width)]
        strips: list[Strip] = []
        for row in self._rows[self._top : self._top + grid.rows]:
            if grid.height:
                strips += self._draw_row(row, grid, width)
            else:
                strips += [self._draw_name(number, width) for number in row]
        return strips[: self.size.height]

    def _draw_row(self, row: range, grid: Grid, width: int) -> list[Strip]:
        """Return a row of tiles, their names on one line and the pictures right above it."""
        pictures = [self._draw_picture(self.tiles[number], grid) for number in row]
        tallest = max(map(len, pictures))
        blank = [Strip.blank(grid.width, self.rich_style)]
        tiles = []
        for number, picture in zip(row, pictures, strict=True):
            note = self.paint([(self.tiles[number].note, "dim")], grid.width)
            text = [self._draw_name(number, grid.width, alone=False), note]
            tiles.append(blank * (tallest - len(picture)) + picture + text + blank * (grid.height - tallest))
        gap = Strip.blank(GAP, self.rich_style)
        lines = [Strip.join([part for strip in line for part in (strip, gap)]) for line in zip(*tiles, strict=True)]
        return [line.adjust_cell_length(width, self.rich_style) for line in lines]

    def _draw_picture(self, tile: Tile, grid: Grid) -> list[Strip]:
        shown = self._loaded.get(self._wish(tile, grid))
        if shown is None:
            waiting = self.paint([(glyphs().ellipsis, "dim")], grid.width)
            return [waiting] + [Strip.blank(grid.width, self.rich_style)] * (min(grid.height, grid.width // 2) - 1)
        if isinstance(shown, str):
            return [self.paint([(f"cannot show: {shown}", "high")], grid.width)]
        left = Segment(" " * ((grid.width - len_cells(shown)) // 2), self.rich_style)
        rows = [Strip([left, *row]) for row in shown[: grid.height]]
        return [row.adjust_cell_length(grid.width, self.rich_style) for row in rows]

    def _draw_name(self, number: int, width: int, *, alone: bool = True) -> Strip:
        tile = self.tiles[number]
        words = f"{tile.relative}  {tile.note}" if alone else tile.name
        parts = [(f"{tile.mark} " if tile.mark else "", "high"), (words, "strong" if number == self.index else "")]
        strip = self.paint(parts, width)
        if number != self.index:
            return strip
        # Every terminal has reverse video and underlining: the keys go to this picture, or are for something else.
        mark = Style(reverse=True) if self.has_focus else Style(underline=True)
        return Strip([Segment(segment.text, (segment.style or Style.null()) + mark) for segment in strip])
