"""One picture as half blocks, as large as the widget, with a caption below; read and scaled in a thread."""

from __future__ import annotations

import os
from pathlib import Path

from rich.segment import Segment
from textual.strip import Strip

from lorasmith.tui.theme import limited_colors
from lorasmith.tui.thumbnails import Cells, Thumbnails, Wish
from lorasmith.tui.widgets.line import Drawn, glyphs
from lorasmith.tui.widgets.preview import len_cells


def can_draw_pictures() -> bool:
    """Whether this terminal has the half blocks and the colors that pictures are made of."""
    return glyphs().half_blocks and not limited_colors(os.environ)


class Picture(Drawn):
    """Shows one picture; it is drawn anew only when it is another one or the size changed.

    What keeps it from being shown is said in words, and so is a terminal that cannot draw pictures.
    """

    DEFAULT_CSS = "Picture { height: 1fr; width: 1fr; }"

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        """Start empty."""
        super().__init__(id=id, classes=classes)
        self._path: Path | None = None
        self._caption = ""
        self._loaded = Thumbnails(self._tell_loaded, bound=8)

    def show(self, path: Path | None, caption: str = "") -> None:
        """Show the picture at `path` with a line of text below it; None: nothing."""
        if (path, caption) == (self._path, self._caption):
            return
        self._path, self._caption = path, caption
        self._request()

    def busy(self) -> bool:
        """Whether the picture is still to come."""
        return self._loaded.loading()

    def on_resize(self) -> None:
        """Scale anew."""
        self._request()

    def _wish(self) -> Wish | None:
        height = self.size.height - (1 if self._caption else 0)
        if self._path is None or height < 1 or self.size.width < 1:
            return None
        return Wish(self._path, self.size.width, height)

    def _request(self) -> None:
        wish = self._wish()
        self._loaded.want([wish] if wish is not None and can_draw_pictures() else [])
        self.draw_anew()

    def _tell_loaded(self) -> None:
        self.call_later(self.draw_anew)  # from the loading thread: it only puts a message into the queue

    def draw(self) -> list[Strip]:
        """Return all rows."""
        wish, width = self._wish(), self.size.width
        if wish is None:
            return []
        strips = self._body(wish)
        if self._caption:
            blank = Strip.blank(width, self.rich_style)
            strips = (strips + [blank] * wish.height)[: wish.height]
            strips.append(self.paint([(self._caption, "dim")], width))
        return strips

    def _body(self, wish: Wish) -> list[Strip]:
        if not can_draw_pictures():
            return [self.paint([("This terminal cannot show pictures.", "dim")], wish.width)]
        shown = self._loaded.get(wish)
        if shown is None:
            return [self.paint([("Loading the picture", "dim")], wish.width)]
        if isinstance(shown, str):
            return [self.paint([(f"Cannot show it: {shown}", "high")], wish.width)]
        return [self._center(row, shown, wish.width) for row in shown[: wish.height]]

    def _center(self, row: list[Segment], cells: Cells, width: int) -> Strip:
        left = (width - len_cells(cells)) // 2
        return Strip([Segment(" " * left, self.rich_style), *row]).adjust_cell_length(width, self.rich_style)
