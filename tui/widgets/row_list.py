"""A list of any length of which one entry is selected: only the rows that are seen are ever made.

Ten thousand pictures are listed, filtered and marked anew as quickly as ten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.strip import Strip

from lorasmith.tui.widgets.line import Painted, Part, glyphs

DrawRow = Callable[[int, int], Sequence[Part]]
"""Returns the parts of an entry, by the numbers of the entry and of its line."""
WHEEL_ROWS = 3


class RowList(Painted, can_focus=True):
    """Entries of `lines` rows each; the selected one has a mark in front, a bar at the right shows the place."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"row-list--selected"}
    DEFAULT_CSS = """
    RowList { height: 1fr; width: 1fr; min-height: 1; }
    RowList:focus > .row-list--selected { background: $primary 30%; text-style: bold; }
    RowList > .row-list--selected { background: $panel; }
    RowList:ansi > .row-list--selected { background: ansi_default; color: ansi_default; text-style: bold; }
    RowList:ansi:focus > .row-list--selected { text-style: bold reverse; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "Up", show=False, id="rows-up"),
        Binding("down", "move(1)", "Down", show=False, id="rows-down"),
        Binding("pageup", "page(-1)", "Page up", show=False, id="rows-page-up"),
        Binding("pagedown", "page(1)", "Page down", show=False, id="rows-page-down"),
        Binding("home", "end(0)", "First", show=False, id="rows-first"),
        Binding("end", "end(1)", "Last", show=False, id="rows-last"),
        Binding("enter", "choose", "Choose", show=False, id="rows-choose"),
    ]

    class Moved(Message):
        """The user selected another row."""

        def __init__(self, rows: RowList, index: int) -> None:
            super().__init__()
            self.rows = rows
            self.index = index

        @property
        def control(self) -> RowList:
            """The list."""
            return self.rows

    class Chosen(Moved):
        """The user pressed Enter on a row, or clicked the selected one."""

    def __init__(self, *, id: str | None = None, empty: str = "", lines: int = 1) -> None:
        """Start without entries; `empty` is what stands there then."""
        super().__init__(id=id)
        self.count = 0
        self.selected = 0
        self.empty = empty
        self._lines = lines
        self._draw: DrawRow = lambda index, line: ()
        self._first = 0

    def show(self, count: int, draw: DrawRow, selected: int | None = None) -> None:
        """Show `count` rows; the selection stays at its number unless `selected` says another."""
        self.count, self._draw = count, draw
        self.select(self.selected if selected is None else selected)

    def select(self, index: int) -> None:
        """Select a row without telling anyone; one that does not exist becomes the nearest."""
        self.selected = max(0, min(index, self.count - 1))
        self._bring_into_view()
        self.refresh()

    def move_to(self, index: int) -> None:
        """Select a row as the user does."""
        before = self.selected
        self.select(index)
        if self.selected != before:
            self.post_message(self.Moved(self, self.selected))

    @property
    def _seen(self) -> int:
        return max(1, self.size.height // self._lines)

    def _bring_into_view(self) -> None:
        height = self._seen
        self._first = max(0, min(self._first, self.count - height))
        self._first = min(max(self._first, self.selected - height + 1), self.selected)

    def on_resize(self) -> None:
        """Keep the selected row in view."""
        self._bring_into_view()

    def action_move(self, by: int) -> None:
        """Select the row `by` further down."""
        self.move_to(self.selected + by)

    def action_page(self, by: int) -> None:
        """Select the row a screenful further down."""
        self.move_to(self.selected + by * max(1, self._seen - 1))

    def action_end(self, last: int) -> None:
        """Select the first or the last row."""
        self.move_to(self.count - 1 if last else 0)

    def action_choose(self) -> None:
        """Choose the selected row."""
        if self.count:
            self.post_message(self.Chosen(self, self.selected))

    def on_click(self, event: events.Click) -> None:
        """Select the row under the pointer, or choose it where it is selected."""
        event.stop()
        index = self._first + event.y // self._lines
        if index >= self.count:
            return
        if index == self.selected:
            self.action_choose()
        else:
            self.move_to(index)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Go down some rows."""
        event.stop()
        self.move_to(self.selected + WHEEL_ROWS)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Go up some rows."""
        event.stop()
        self.move_to(self.selected - WHEEL_ROWS)

    def render_line(self, y: int) -> Strip:
        """Return one row."""
        width, index = self.size.width, self._first + y // self._lines
        if not self.count and y == 0:
            return self.paint([(self.empty, "dim")], width)
        if index >= self.count:
            return Strip.blank(width, self.rich_style)
        bar = self._bar(y)
        chosen = index == self.selected
        sign = ">" if glyphs().name == "ascii" else "›"
        mark = sign if chosen and y % self._lines == 0 else " "
        strip = self.paint([(f"{mark} ", ""), *self._draw(index, y % self._lines)], width - len(bar))
        if chosen:
            strip = strip.apply_style(self.get_component_rich_style("row-list--selected"))
        return Strip.join([strip, self.paint([(bar, "dim")], len(bar))]) if bar else strip

    def _bar(self, y: int) -> str:
        height, seen = self.size.height, self._seen
        if self.count <= seen:
            return ""
        length = max(1, height * seen // self.count)
        top = round(self._first / (self.count - seen) * (height - length))
        full = "#" if glyphs().name == "ascii" else "█"
        return full if top <= y < top + length else glyphs().vertical
