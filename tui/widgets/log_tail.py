"""The newest lines of the log; only the rows in sight are drawn (textual's RichLog repaints for 10 ms a line)."""

from __future__ import annotations

import textwrap
import time
from typing import ClassVar

from rich.cells import cell_len, chop_cells
from textual.binding import Binding, BindingType
from textual.strip import Strip

from lorasmith.tui.state import LogLine
from lorasmith.tui.text import safe_str
from lorasmith.tui.widgets.line import Painted, Part

WORDS = {"warning": ("WARNING ", "high"), "error": ("ERROR ", "critical"), "info": ("", "")}


def log_rows(line: LogLine, width: int) -> list[list[Part]]:
    """Return one log line wrapped to `width` cells: local time, a word for what is not info, the message."""
    clock = time.strftime("%H:%M:%S ", time.localtime(line.time))
    word, role = WORDS[line.severity]
    room = max(8, width - len(clock))
    pieces = _wrap(word + safe_str(line.message).rstrip(), room)
    rows: list[list[Part]] = [[(clock, "dim"), (word, role), (pieces[0][len(word) :], "")]]
    return rows + [[(" " * len(clock), ""), (piece, "")] for piece in pieces[1:]]


def _wrap(text: str, width: int) -> list[str]:
    """Return pieces of at most `width` cells, broken between words where every character is one cell."""
    if cell_len(text) == len(text):
        return textwrap.wrap(text, width, break_on_hyphens=False, drop_whitespace=True) or [""]
    return chop_cells(text, width) or [""]


class LogTail(Painted, can_focus=True):
    """The end of the log; up, down, page up, page down, home and end look back and return."""

    DEFAULT_CSS = "LogTail { height: 1fr; width: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "back(1)", "Older line", show=False),
        Binding("down", "back(-1)", "Newer line", show=False),
        Binding("pageup", "back(10)", "Older lines", show=False),
        Binding("pagedown", "back(-10)", "Newer lines", show=False),
        Binding("home", "back(1000000)", "Oldest line", show=False),
        Binding("end", "back(-1000000)", "Newest line", show=False),
    ]

    def __init__(self, *, id: str | None = None) -> None:
        """Start empty."""
        super().__init__(id=id)
        self._lines: tuple[LogLine, ...] = ()
        self._back = 0
        self._strips: list[Strip] | None = None

    def show(self, lines: tuple[LogLine, ...]) -> None:
        """Show the end of `lines`; a reader who looked back stays at the same lines."""
        if lines is self._lines or lines == self._lines:
            return
        if self._back and self._lines:
            self._back += max(0, len(lines) - len(self._lines)) or 1
        self._lines = lines
        self._repaint()

    def action_back(self, count: int) -> None:
        """Look `count` lines further back."""
        self._back = max(0, min(self._back + count, len(self._lines) - 1))
        self._repaint()

    def notify_style_update(self) -> None:
        """Draw anew in the new theme."""
        super().notify_style_update()
        self._strips = None

    def on_resize(self) -> None:
        """Wrap anew."""
        self._repaint()

    def _repaint(self) -> None:
        self._strips = None
        self.refresh()

    def _visible(self, width: int, height: int) -> list[Strip]:
        rows: list[list[Part]] = []
        lines = self._lines[: len(self._lines) - self._back] if self._back else self._lines
        for line in reversed(lines):
            rows = log_rows(line, width) + rows
            if len(rows) >= height:
                break
        return [self.paint(row, width) for row in rows[-height:]]

    def render_line(self, y: int) -> Strip:
        """Return row `y` of the part in sight."""
        width, height = self.size
        if self._strips is None:
            self._strips = self._visible(width, height)
        if y < len(self._strips):
            return self._strips[y]
        return Strip.blank(width, self.rich_style)
