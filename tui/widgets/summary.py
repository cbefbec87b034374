"""What became of a run, shown when it is over."""

from __future__ import annotations

from rich.text import Text
from textual.widgets import Static

from lorasmith.tui.screens.monitor_text import summary_rows
from lorasmith.tui.state import RunState
from lorasmith.tui.text import safe_str
from lorasmith.tui.widgets.line import Painted


class Summary(Painted, Static):
    """The outcome, the paths of the LoRA and the previews, and what to do next; it is laid out once."""

    DEFAULT_CSS = "Summary { height: auto; max-height: 12; display: none; }"

    def show(self, state: RunState) -> None:
        """Show the end of `state`."""
        rows = summary_rows(state)
        if not rows:
            rows = [[("The run ended without a word. ", "critical"), ("run.log in its folder may say why.", "")]]
        rows.append([("Enter or q leaves.", "dim")])
        lines = [Text.assemble(*((safe_str(text), self.role_style(role)) for text, role in row)) for row in rows]
        self.update(Text("\n").join(lines))
        self.display = True
