"""Seconds in which this process really ran: while it is stopped by Ctrl-Z, the clock stands still.

Without it, the first step after `fg` would seem to have taken an hour, and a watchdog would report a stall.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

_stopped: tuple[float, float | None] = (0.0, None)
"""Seconds lost in all stops before, and when the present one began; one tuple, since every thread may look at it."""


def running_seconds() -> float:
    """Return seconds since some moment, without those in which the process was stopped by the user."""
    lost, since = _stopped
    return (time.monotonic() if since is None else since) - lost


@contextlib.contextmanager
def clock_stopped() -> Iterator[None]:
    """Hold the clock meanwhile; the main thread alone stops the process, so one at a time uses this."""
    global _stopped
    lost, began = _stopped[0], time.monotonic()
    _stopped = (lost, began)
    try:
        yield
    finally:
        _stopped = (lost + time.monotonic() - began, None)
