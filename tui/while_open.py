"""Workers that may end after their screen was left."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from textual.css.query import NoMatches
from textual.screen import Screen


async def while_open(screen: Screen[Any], work: Coroutine[Any, Any, None]) -> None:
    """Do the work of a screen that waits for a thread, and drop what it would show once the screen or app was left.

    Textual removes a screen's widgets before it cancels the screen's workers; one that wakes up in between finds
    nothing to show its result in, which would end the app.
    """
    try:
        await work
    except NoMatches:
        if screen.app.is_running and screen in screen.app.screen_stack:
            raise
