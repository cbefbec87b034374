"""The monitor of a run that another process trains: opened anywhere, left at any time, and the run goes on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Static

from lorasmith.tui.bridge import AttachedRun
from lorasmith.tui.screens.monitor import MonitorScreen
from lorasmith.tui.screens.too_small import TooSmall, fits
from lorasmith.tui.text import safe_str
from lorasmith.tui.theme import THEME, limited_colors

if TYPE_CHECKING:
    from textual import events

    from lorasmith.engine.run_folder import RunFolder

POLL_SECONDS = 0.1


class ReadingScreen(Screen[None]):
    """Says how much of a long journal was read; q leaves."""

    DEFAULT_CSS = "ReadingScreen { align: center middle; } ReadingScreen Static { width: auto; }"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("q,escape", "app.quit", "Leave")]

    def compose(self) -> ComposeResult:
        """One line."""
        yield Static("", id="reading", markup=False)

    def tell(self, run: str, share: float) -> None:
        """Show the share of the journal that was read, 0 to 1."""
        self.query_one("#reading", Static).update(safe_str(f"Reading what {run} did so far: {100 * share:.0f} %"))


class AttachApp(App[int]):
    """The monitor of `source` once its journal was read; it never does anything to the run but send commands."""

    TITLE = "lorasmith"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+q", "quit", "Quit", show=False, priority=True)]

    def __init__(self, source: AttachedRun) -> None:
        """Watch `source`, which is started here."""
        limited = limited_colors(os.environ)
        super().__init__(ansi_color=True if limited else None)
        self.register_theme(THEME)
        if limited or "TEXTUAL_THEME" not in os.environ:
            self.theme = "ansi-dark" if limited else THEME.name
        self.animation_level = "none"
        self.source = source
        self._reading = ReadingScreen()

    def on_mount(self) -> None:
        """Begin to read."""
        self.source.start()
        self.push_screen(self._reading)
        self._wait = self.set_interval(POLL_SECONDS, self._open_when_read)
        if not fits(self.size.width, self.size.height):
            self.push_screen(TooSmall())

    def on_resize(self, event: events.Resize) -> None:
        """Cover the monitor while the terminal is too small for it."""
        if not fits(event.size.width, event.size.height) and not isinstance(self.screen, TooSmall):
            self.push_screen(TooSmall())

    def _open_when_read(self) -> None:
        if self.screen is not self._reading:
            return
        if self.source.share_read < 1.0:
            self._reading.tell(self.source.run.name, self.source.share_read)
            return
        self._wait.stop()
        self.switch_screen(MonitorScreen(self.source, state=self.source.state))

    async def action_quit(self) -> None:
        """Leave; the run is not touched."""
        for screen in reversed(self.screen_stack):
            request: Any = getattr(screen, "request_quit", None)
            if request is not None:
                request()
                return
        self.exit(0)


def open_attached(run: RunFolder, read_only: bool) -> int:
    """Show the monitor of `run` on this terminal until the user leaves, say how to come back, return the exit code."""
    from lorasmith.engine.cli.attach import attach_command, interrupted
    from lorasmith.tui.draft import state_folder
    from lorasmith.tui.screen_host import run_app

    source = AttachedRun(run, read_only=read_only)
    app = AttachApp(source)
    code = run_app(app, lambda: None, state_folder() / "attach.log")
    source.close()
    ended = source.ended
    if source.alive and ended is None:
        words = f"The run goes on; attach again with: {attach_command(run)}"
    elif ended is None:
        words = str(interrupted(run))
    else:
        words = f"{ended.message} The run: {run.path}"
    print(safe_str(words), flush=True)
    return code
