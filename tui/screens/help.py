"""Help for the focused field, and the keys."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from lorasmith.tui.actions import Place, actions_of
from lorasmith.tui.text import safe_text


class HelpScreen(ModalScreen[None]):
    """A sheet over the page; arrows scroll it, any other key closes it."""

    AUTO_FOCUS = "#help"
    SCROLL_KEYS: ClassVar[set[str]] = {"up", "down", "pageup", "pagedown", "home", "end"}

    def __init__(
        self, title: str, text: str, places: tuple[Place, ...] = ("app", "page", "settings", "review")
    ) -> None:
        """Explain with `text`, and list the keys of `places`."""
        super().__init__()
        self._title = title
        self._text = text
        self._places = places

    def compose(self) -> ComposeResult:
        """Title, text, keys."""
        keys = [f"  {action.keys.replace(',', ' '):<18} {action.help}" for action in actions_of(*self._places)]
        keys += [
            "  tab shift+tab      Move between the fields of the page.",
            "  ctrl+p             Find any action by name.",
        ]
        with VerticalScroll(id="help"):
            yield Static(safe_text(self._title, "bold"), markup=False)
            yield Static(safe_text(self._text, lines=True), classes="gap", markup=False)
            yield Static(safe_text("Keys (single letters work where no text is typed)", "bold"), markup=False)
            yield Static("\n".join(keys), markup=False)
            yield Static(
                safe_text("Any key closes this. Hold Shift to select text with the mouse.", "dim"), classes="gap"
            )

    def on_key(self, event: events.Key) -> None:
        """Close on any key that does not scroll."""
        if event.key not in self.SCROLL_KEYS:
            event.stop()
            self.dismiss()
