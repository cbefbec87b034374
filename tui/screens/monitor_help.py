"""What the monitor shows and which keys it has."""

from __future__ import annotations

from textual import events
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from lorasmith.tui.text import safe_str

TEXT = """\
A diffusion loss is noisy and falls little: judge by the previews.
Whatever you look at here, training goes on until you pause or stop.

  p           pause after this step, or go on
  s           save a checkpoint now
  v           draw the previews now
  k           park: free the card for another program; p brings it back
  x           stop: asks, saves a checkpoint, ends; can be resumed
  space       hold the chart still, or let it go on

  l           linear or logarithmic y axis
  [ ]         smooth less, smooth more
  z           all steps, or only the last ones
  n           held-out loss by noise level, or the curve again
  left right  previews of earlier and later steps
  up down     another prompt; in the log, other lines
  y           copy the path of the LoRA or the preview
  tab         move between chart, previews and log

  q enter     leave, if the run is over or another process trains
  ctrl+q      quit; asks while this process trains

Closing the terminal never ends a training. Shift+mouse selects text."""
ATTACH = "In any other terminal: "
SCROLL_KEYS = {"up", "down", "pageup", "pagedown", "home", "end"}


class MonitorHelp(ModalScreen[None]):
    """A sheet over the monitor; arrows scroll it, any other key closes it."""

    AUTO_FOCUS = "#monitor-help"
    DEFAULT_CSS = """
    MonitorHelp { align: center middle; }
    MonitorHelp #monitor-help {
        width: 80; max-width: 100%; height: auto; max-height: 100%; padding: 0 2;
        background: $surface; border: round $primary;
    }
    MonitorHelp Static { height: auto; }
    """

    def __init__(self, attach: str = "") -> None:
        """`attach` is the command that shows the run in another terminal."""
        super().__init__()
        self._attach_command = attach

    def compose(self) -> ComposeResult:
        """One text."""
        with VerticalScroll(id="monitor-help"):
            attach = f"\n{ATTACH}{self._attach_command}" if self._attach_command else ""
            yield Static(safe_str(TEXT + attach, lines=True), markup=False)

    def request_quit(self) -> None:
        """Close, so that the question of the monitor can be asked."""
        self.dismiss()

    def on_key(self, event: events.Key) -> None:
        """Close on any key that does not scroll."""
        if event.key not in SCROLL_KEYS:
            event.stop()
            self.dismiss()
