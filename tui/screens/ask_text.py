"""A question over a screen that is answered by a line of text."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from lorasmith.tui.text import safe_text


class AskText(ModalScreen[str]):
    """Asks `question`; Enter gives the text, escape an empty one."""

    DEFAULT_CSS = """
    AskText { align: center middle; }
    AskText > Vertical {
        width: 64; max-width: 95%; height: auto; padding: 1 2; background: $surface; border: round $primary;
    }
    AskText #question { text-style: bold; }
    AskText #detail { margin: 1 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "give_up", "Back", show=False)]

    def __init__(self, question: str, detail: str, value: str = "") -> None:
        """Ask with `value` as the text to begin with."""
        super().__init__()
        self._question, self._detail, self._value = question, detail, value

    def compose(self) -> ComposeResult:
        """Question, what it is for, the field."""
        with Vertical():
            yield Static(safe_text(self._question), id="question")
            yield Static(safe_text(self._detail, lines=True), id="detail")
            yield Input(self._value, id="answer", compact=True)

    def request_quit(self) -> None:
        """Take the wish to quit for no answer; the screen below can then be asked to quit."""
        self.dismiss("")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Give the text."""
        event.stop()
        self.dismiss(event.value)

    def action_give_up(self) -> None:
        """Give no text."""
        self.dismiss("")
