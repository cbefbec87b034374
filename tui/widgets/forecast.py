"""What a run takes, as the pages show it: the bar of its memory, its time and money, and what was done to fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.containers import Vertical

from lorasmith.tui.widgets.line import Line
from lorasmith.tui.widgets.memory_bar import MemoryBar

if TYPE_CHECKING:
    from lorasmith.engine.fit import Fit
    from lorasmith.tui.card import Estimate


class Forecast(Vertical):
    """Bar, time, switches and the gravest warning: rows that are hidden while nothing can be said."""

    DEFAULT_CSS = "Forecast { height: auto; padding: 0 1 0 2; display: none; }"

    def compose(self) -> ComposeResult:
        """The rows."""
        yield MemoryBar()
        yield Line(id="time")
        yield Line(id="switches")
        yield Line(id="warning")

    def show(self, estimate: Estimate | None, fit: Fit | None, warnings: Sequence[str] = ()) -> None:
        """Show an estimate, the plan behind it and what is warned of; nothing is painted that is shown already."""
        self.display = estimate is not None
        if estimate is None:
            return
        self.query_one(MemoryBar).show(estimate.view)
        self._say("time", "time ", estimate.words[0] if estimate.words else "")
        self._say("switches", "fit  ", switch_words(fit))
        more = f" (and {len(warnings) - 1} more; the review lists all)" if len(warnings) > 1 else ""
        self._say("warning", "!    ", f"{warnings[0]}{more}" if warnings else "")

    def _say(self, name: str, label: str, words: str) -> None:
        line = self.query_one(f"#{name}", Line)
        line.display = bool(words)
        line.show([(label, "strong"), (words, "")])


def switch_words(fit: Fit | None) -> str:
    """Return what was done to fit, or what would make it fit."""
    if fit is None:
        return ""
    if fit.verdict == "no":
        return f"{fit.reason}. {fit.nearest}" if fit.nearest else fit.reason
    return "; ".join(switch.words for switch in fit.switches)
