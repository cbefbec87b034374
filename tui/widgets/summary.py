"""Rows of words that are there only while there is something to say: what became of a run, or why it waits."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from textual.widgets import Static

from lorasmith.tui.text import safe_str
from lorasmith.tui.widgets.line import Painted, Part


class Summary(Painted, Static):
    """Rows of parts, wrapped where they are too long, hidden while there are none; it is laid out when they change."""

    DEFAULT_CSS = "Summary { height: auto; max-height: 12; display: none; }"

    _rows: Sequence[Sequence[Part]] = ()

    def show(self, rows: Sequence[Sequence[Part]]) -> None:
        """Show these rows, or hide where there are none; nothing is done where they are what is shown."""
        if rows == self._rows or not (rows or self._rows):
            return
        self._rows = rows
        lines = [Text.assemble(*((safe_str(text), self.role_style(role)) for text, role in row)) for row in rows]
        self.update(Text("\n").join(lines))
        self.display = bool(rows)
