"""What is shown while the terminal is too small; training goes on behind it."""

from __future__ import annotations

from textual import events
from textual.app import ComposeResult
from textual.screen import ModalScreen
from textual.widgets import Static

MIN_WIDTH, MIN_HEIGHT = 60, 18


def fits(width: int, height: int) -> bool:
    """Whether the pages can be used at this size."""
    return width >= MIN_WIDTH and height >= MIN_HEIGHT


class TooSmall(ModalScreen[None]):
    """Says what is needed and closes itself when the terminal has grown; no key acts on what cannot be seen."""

    def compose(self) -> ComposeResult:
        """One text."""
        yield Static("", id="too-small", markup=False)

    def on_mount(self) -> None:
        """Show the sizes."""
        self._tell(self.app.size.width, self.app.size.height)

    def on_resize(self, event: events.Resize) -> None:
        """Show the new size, or go."""
        if fits(event.size.width, event.size.height):
            self.dismiss()
        else:
            self._tell(event.size.width, event.size.height)

    def _tell(self, width: int, height: int) -> None:
        self.query_one("#too-small", Static).update(
            f"Terminal too small\nneed {MIN_WIDTH}×{MIN_HEIGHT}, have {width}×{height}\n"
            "enlarge it; a training goes on\nctrl+q quits"
        )
