"""The terminal that the wizard would be shown on: text encoding, colors, size, character widths, pictures."""

from __future__ import annotations

import locale
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Final

import psutil

from lorasmith.engine.doctor.check import Check
from lorasmith.engine.doctor.cursor_probe import drawn_widths

COLUMNS, LINES = 80, 24
SAMPLES: Final[Mapping[str, int]] = {"⣿": 1, "█": 1, "‹": 1, "✓": 1, "漢": 2}
"""Characters that the wizard draws, with the cells that it reckons for each."""
_KITTY_LIKE: Final = ("kitty", "ghostty", "WezTerm")


def check_locale() -> Check:
    """Text is UTF-8, so that file names and captions of every language survive."""
    encodings = {locale.getpreferredencoding(False), sys.getfilesystemencoding()}
    if any(name.lower().replace("-", "") != "utf8" for name in encodings):
        detail = f"The text encoding is {', '.join(sorted(encodings))}."
        return Check("locale", "warn", detail, "export LANG=C.UTF-8", "Captions and names with other letters break.")
    return Check("locale", "pass", "UTF-8")


def check_terminal() -> Check:
    """The terminal can show the wizard: a known kind, 80 x 24 at least, characters as wide as they are taken for."""
    if not sys.stdout.isatty():
        return Check("terminal", "skip", "the output is not a terminal")
    kind = os.environ.get("TERM", "")
    size = shutil.get_terminal_size()
    wrong = _wrong_widths()
    parts = [f"{kind or 'unknown kind'}{_inside()}", f"{size.columns} x {size.lines}", _colors(kind), _pictures(kind)]
    detail = ", ".join(parts)
    if kind in ("", "dumb"):
        fix = "export TERM=xterm-256color"
        return Check("terminal", "warn", detail, fix, "The wizard needs a terminal; lorasmith train RUN.toml does not.")
    if size.columns < COLUMNS or size.lines < LINES:
        fix = f"Make the window at least {COLUMNS} x {LINES}."
        return Check("terminal", "warn", detail, fix, "The wizard cannot be drawn in less.")
    if wrong:
        detail += f", draws {', '.join(wrong)} with another width"
        meaning = "Columns of the wizard may be out of line."
        return Check("terminal", "warn", detail, "export LANG=C.UTF-8   # and a font with these characters", meaning)
    if _number_of_colors(kind) < 256:
        meaning = "The wizard shows with few colors."
        return Check("terminal", "warn", detail, "export TERM=xterm-256color", meaning)
    return Check("terminal", "pass", detail)


def _inside() -> str:
    around = [name for name, is_there in _AROUND.items() if is_there()]
    return f" inside {' and '.join(around)}" if around else ""


def _runs_under_mosh() -> bool:
    try:
        return any(process.name() == "mosh-server" for process in psutil.Process().parents())
    except psutil.Error:
        return False


_AROUND: Final[Mapping[str, Callable[[], bool]]] = {
    "tmux": lambda: bool(os.environ.get("TMUX")),
    "GNU screen": lambda: bool(os.environ.get("STY")),
    "mosh": _runs_under_mosh,
    "SSH": lambda: bool(os.environ.get("SSH_CONNECTION")) and not _runs_under_mosh(),
}


def _colors(kind: str) -> str:
    if os.environ.get("NO_COLOR"):
        return "colors switched off (NO_COLOR)"
    if os.environ.get("COLORTERM") in ("truecolor", "24bit"):
        return "true color"
    number = _number_of_colors(kind)
    return f"{number} colors announced" if number else "no colors announced"


def _number_of_colors(kind: str) -> int:
    """Return how many colors the terminal announces by its name, or by the system's description of it."""
    if os.environ.get("COLORTERM") in ("truecolor", "24bit") or "256color" in kind or "direct" in kind:
        return 256
    try:
        import curses

        curses.setupterm(kind, fd=1)
        return max(0, curses.tigetnum("colors"))
    except Exception:  # no description of it on this machine, or no curses
        return 8


def _pictures(kind: str) -> str:
    """Return how the wizard draws pictures there, by what the terminal says of itself without being asked."""
    program = os.environ.get("TERM_PROGRAM", "")
    if os.environ.get("TMUX") or os.environ.get("STY") or _runs_under_mosh():
        return "pictures as half blocks"
    if os.environ.get("KITTY_WINDOW_ID") or any(name in (kind + " " + program) for name in _KITTY_LIKE):
        return "pictures by the kitty protocol"
    if "sixel" in kind or kind.startswith(("foot", "mlterm", "contour")) or program == "iTerm.app":
        return "pictures by sixel"
    return "pictures as half blocks"


def _wrong_widths() -> list[str]:
    """Return the characters that the terminal draws with another width than the wizard reckons."""
    drawn = drawn_widths(list(SAMPLES))
    return [text for text, width in drawn.items() if width != SAMPLES[text]]
