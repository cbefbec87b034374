"""The bell and the message of the terminal when a run ends that somebody waited for."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from textual.app import App

from lorasmith.engine.end_notice import terminal_notice, tmux_passes_through
from lorasmith.engine.events import RunEnded

NEWS_SECONDS = 30.0


def ring(app: App[Any], ended: RunEnded | None, run: str) -> None:
    """Ring once on the terminal of `app` for a run that ended just now by itself; who stopped it knows it already."""
    driver = app._driver
    if driver is None or ended is None or ended.outcome == "stopped" or time.time() - ended.time > NEWS_SECONDS:
        return

    def tell() -> None:
        # In a thread of its own: tmux may take its time to answer.
        driver.write(terminal_notice(ended, run, os.environ, passthrough=tmux_passes_through(os.environ)))
        driver.flush()

    threading.Thread(target=tell, name="end-bell", daemon=True).start()
