"""How wide the terminal really draws characters: each is drawn, and the terminal is asked where its cursor is."""

from __future__ import annotations

import os
import re
import select
import sys
import time
from collections.abc import Sequence
from typing import Final

ANSWER_SECONDS: Final = 0.4
"""For all answers together; a terminal that does not know the question never answers."""
_ASK: Final = "\x1b[6n"
_CLEAR: Final = "\r\x1b[2K"


def drawn_widths(texts: Sequence[str], seconds: float = ANSWER_SECONDS) -> dict[str, int]:
    """Return the cells that the terminal takes for each text; those that it did not answer for are left out.

    The line that the cursor is in is cleared. Nothing is asked where stdin or stdout is no terminal, or this process
    is not in its foreground.
    """
    try:
        import termios
        import tty
    except ImportError:
        return {}
    if not (sys.__stdin__ and sys.__stdout__ and os.isatty(0) and os.isatty(1)) or not _in_foreground():
        return {}
    try:
        before = termios.tcgetattr(0)
    except termios.error:
        return {}
    widths: dict[str, int] = {}
    try:
        tty.setcbreak(0, termios.TCSANOW)
        deadline = time.monotonic() + seconds
        for text in texts:
            os.write(1, f"{_CLEAR}{text}{_ASK}".encode())
            column = _read_column(deadline)
            if column is None:
                break
            widths[text] = column - 1
    except OSError:
        return {}
    finally:
        os.write(1, _CLEAR.encode())
        # With what came too late, which would be read as keys.
        termios.tcsetattr(0, termios.TCSAFLUSH, before)
    return widths


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _read_column(deadline: float) -> int | None:
    """Return the column of the terminal's answer `ESC [ row ; column R`; None where it does not come in time."""
    answer = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([0], [], [], left)[0]:
            break
        got = os.read(0, 64)
        if not got:
            break
        answer += got
        if found := re.search(rb"\x1b\[\d+;(\d+)R", answer):
            return int(found[1])
    return None
