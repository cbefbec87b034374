"""What became of a run, shown when it is over."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from textual.widgets import Static

from lorasmith.tui.text import safe_str
from lorasmith.tui.widgets.line import Painted, Part


class Summary(Painted, Static):
    """The outcome, the paths of the results and what to do next, hidden until `show`; it is laid out once."""

    DEFAULT_CSS = "Summary { height: auto; max-height: 12; display: none; }"

    def show(self, rows: Sequence[Sequence[Part]]) -> None:
        """Show these rows."""
        lines = [Text.assemble(*((safe_str(text), self.role_style(role)) for text, role in row)) for row in rows]
        self.update(Text("\n").join(lines))
        self.display = True
