"""A text area for one caption: foreign characters are shown as marks, Enter goes on to the next picture."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.widgets import TextArea

from lorasmith.tui.text import masked

_PRINTABLE = {"slash", "question_mark"}
"""Keys of ours that print a character."""


class CaptionArea(TextArea):
    """Wraps, does not blink, never hands a control character to the terminal, and knows whether it was edited."""

    DEFAULT_CSS = """
    CaptionArea { border: none; padding: 0 1; background: $panel; }
    CaptionArea:focus { border: none; background: $primary 30%; }
    CaptionArea .text-area--cursor { text-style: reverse; color: $foreground; background: $background; }
    CaptionArea:ansi { background: ansi_default; }
    CaptionArea:ansi:focus { background: ansi_default; text-style: underline; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "screen.picture(1)", "Next picture", show=False, id="caption-area-accept"),
        Binding("ctrl+j", "new_line", "New line", show=False, id="caption-new-line"),
        Binding("pagedown", "screen.picture(1)", "Next", id="caption-area-next"),
        Binding("pageup", "screen.picture(-1)", "Previous", id="caption-area-previous"),
        Binding("escape", "screen.focus_list", "To the list", id="caption-area-leave"),
    ]

    def __init__(self, *, id: str | None = None) -> None:
        """Start empty and read-only, until a caption is shown."""
        super().__init__("", id=id, compact=True, highlight_cursor_line=False, read_only=True)
        self.cursor_blink = False
        self._shown = ""

    def show(self, text: str) -> None:
        """Show a caption; what was typed before is gone."""
        with self.prevent(TextArea.Changed):
            self.load_text(text)
        # Odd line ends become plain ones in here: compared is what the area made of the text.
        self._shown = self.text
        self.move_cursor(self.document.end)

    @property
    def touched(self) -> bool:
        """Whether the text is another one than was shown."""
        return self.text != self._shown

    def get_line(self, line_index: int) -> Text:
        """Return a line with one mark for each character that is not safe."""
        return Text(masked(self.document.get_line(line_index)), end="", no_wrap=True)

    def action_new_line(self) -> None:
        """Begin a new line."""
        if not self.read_only:
            self.replace("\n", *self.selection, maintain_selection_offset=False)

    def check_consume_key(self, key: str, character: str | None = None) -> bool:
        """Take printable keys; the footer asks by name for those that it knows no character of."""
        return super().check_consume_key(key, character) or (not self.read_only and key in _PRINTABLE)

    async def _on_key(self, event: events.Key) -> None:
        # At once and here: through the app's bindings, Enter would come after letters that were typed behind it, and
        # these would end up in the caption before.
        own = [] if event.is_printable else self._bindings.key_to_bindings.get(event.key, [])
        if own and await self.app.run_action(own[0].action, self):
            event.stop()
            event.prevent_default()
            return
        await super()._on_key(event)
