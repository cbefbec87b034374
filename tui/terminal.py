"""The terminal while a screen owns it, and how it is given back, whatever happened to it meanwhile."""

from __future__ import annotations

import atexit
import logging
import os
import select
import sys
import termios
from pathlib import Path
from typing import Any

from lorasmith.engine.patient_stream import PatientStream, is_gone
from lorasmith.engine.stray_output import StrayOutput

TTY_IN, TTY_OUT, TTY_ERR = 200, 201, 202
"""Fixed numbers of the private descriptors of the terminal: rich remembers them at its import."""
LAST_WORDS_SECONDS = 2.0
# Mouse, focus, paste and resize reports off, kitty keys off, line wrap on, main screen, colors plain, cursor visible.
RESET = (
    b"\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?1015l\x1b[?1016l\x1b[?1004l\x1b[?2004l\x1b[?2048l"
    b"\x1b[?7h\x1b[<u\x1b[?1049l\x1b[0m\x1b[?25h"
)

logger = logging.getLogger("lorasmith.terminal")


class Terminal:
    """The terminal while a screen owns it: private descriptors for the screen, a log file behind stdout and stderr."""

    def __init__(self, log_path: Path) -> None:
        """Take the terminal of stdin and stdout; see `prepare_terminal`."""
        self._screen_left = self._restored = False
        self._stdin = os.dup(0)
        self._modes = termios.tcgetattr(0)
        for source, target in ((0, TTY_IN), (1, TTY_OUT), (1, TTY_ERR)):
            os.dup2(source, target, inheritable=False)
        self._streams = (sys.__stdin__, sys.__stdout__, sys.__stderr__)
        own = [_stream(fd, mode) for fd, mode in ((TTY_IN, "r"), (TTY_OUT, "w"), (TTY_ERR, "w"))]
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = own  # type: ignore[misc]
        _tell_rich()
        self._stray = StrayOutput(log_path)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        self.lines = PatientStream(TTY_OUT)

    @property
    def lost(self) -> bool:
        """Whether nobody is behind the terminal any more."""
        return is_gone(TTY_OUT)

    def say(self, text: str) -> None:
        """Print a line, or log it where the terminal is gone; never raises and never waits."""
        self.lines.look()
        if self.lines.lost:
            logger.info("%s", text)
        else:
            self.lines.write(text + "\n")

    def leave_screen(self) -> None:
        """Give the terminal back its main screen, cursor, modes and keys; calling it again does nothing.

        stdout and stderr stay the log: a training that goes on must not fail because it prints to a lost terminal.
        """
        if self._screen_left:
            return
        self._screen_left = True
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = self._streams  # type: ignore[misc]
        if self.lost:
            return
        self._write(RESET)
        try:
            # TCSANOW: waiting for the output to drain would wait for a stalled terminal.
            termios.tcsetattr(TTY_IN, termios.TCSANOW, self._modes)
            termios.tcflush(TTY_IN, termios.TCIFLUSH)
        except termios.error:
            logger.info("the terminal went while it was given back")

    def restore(self) -> None:
        """Leave the screen and give back stdin, stdout and stderr, where they still are; again does nothing."""
        if self._restored:
            return
        self._restored = True
        self.leave_screen()
        self.lines.finish(LAST_WORDS_SECONDS)
        self._stray.close()
        if not is_gone(self._stdin):
            os.dup2(self._stdin, 0)

    def _write(self, data: bytes) -> None:
        """Write to the terminal, unless it does not take anything within a second."""
        _, ready, _ = select.select([], [TTY_OUT], [], 1.0)
        try:
            if ready:
                os.write(TTY_OUT, data)
        except OSError:
            logger.info("the terminal went while it was given back")


def _stream(fd: int, mode: str) -> Any:
    return open(fd, mode, encoding="utf-8", errors="replace", closefd=False)


def _tell_rich() -> None:
    """Give rich the new descriptors where it was imported before: it finds the size of the terminal through them."""
    console = sys.modules.get("rich.console")
    if console is not None:
        console._STD_STREAMS = (TTY_IN, TTY_OUT, TTY_ERR)  # type: ignore[attr-defined]
        console._STD_STREAMS_OUTPUT = (TTY_OUT, TTY_ERR)  # type: ignore[attr-defined]


def prepare_terminal(log_path: Path) -> Terminal:
    """Put the terminal on private descriptors for the screen, and a log file behind 1 and 2, /dev/null behind 0.

    What C libraries, child processes and stray prints write then reaches `log_path` instead of tearing the screen, and
    nothing in the engine can fail because the terminal is gone. stdin and stdout must be a terminal. The terminal is
    given back by `restore`, at the latest when the interpreter exits.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="backslashreplace")
    terminal = Terminal(log_path)
    atexit.register(terminal.restore)
    return terminal
