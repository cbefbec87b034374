"""A question over a screen, answered by one key: used where an answer changes a running training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Static

from lorasmith.tui.text import safe_text


@dataclass(frozen=True)
class Answer:
    """One way to answer: `key` is its letter, `value` what the question returns."""

    key: str
    label: str
    value: str


class AskScreen(ModalScreen[str]):
    """Asks `question`; escape gives the last answer, which must be the harmless one."""

    DEFAULT_CSS = """
    AskScreen { align: center middle; }
    AskScreen > Vertical {
        width: 76; max-width: 95%; height: auto; padding: 1 2; background: $surface; border: round $primary;
    }
    AskScreen #question { text-style: bold; }
    AskScreen #detail { margin: 1 0; }
    AskScreen Horizontal { height: auto; }
    AskScreen.-narrow Horizontal { layout: vertical; }
    AskScreen Button { margin-right: 2; padding: 0 1; background: $panel; }
    AskScreen Button:focus { background: $primary; color: $background; text-style: bold; }
    """
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (80, "-wide")]  # noqa: RUF012  (textual declares it so)
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "give_last", "Back", show=False),
        Binding("left", "app.focus_previous", show=False),
        Binding("right", "app.focus_next", show=False),
    ]

    def __init__(self, question: str, detail: str, answers: Sequence[Answer]) -> None:
        """Ask with these answers; the first one has the focus."""
        super().__init__()
        self._question = question
        self._detail = detail
        self._answers = tuple(answers)

    def compose(self) -> ComposeResult:
        """Question, what each answer does, one button for each."""
        with Vertical():
            yield Static(safe_text(self._question), id="question")
            yield Static(safe_text(self._detail, lines=True), id="detail")
            with Horizontal():
                for answer in self._answers:
                    yield Button(f"{answer.key}  {answer.label}", id=f"answer-{answer.key}", compact=True)

    def on_mount(self) -> None:
        """Bind the letters."""
        for answer in self._answers:
            self._bindings.bind(answer.key, f"give('{answer.value}')", answer.label, show=False)

    def request_quit(self) -> None:
        """Take the wish to quit for the harmless answer; the screen below can then be asked to quit."""
        self.action_give_last()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Give the button's answer."""
        event.stop()
        self.dismiss(next(answer.value for answer in self._answers if f"answer-{answer.key}" == event.button.id))

    def action_give(self, value: str) -> None:
        """Give the answer `value`."""
        self.dismiss(value)

    def action_give_last(self) -> None:
        """Give the harmless answer."""
        self.dismiss(self._answers[-1].value)
