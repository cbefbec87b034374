"""The process around the screen: who owns the terminal, what signals do, and what happens when the screen is gone.

The training lives in this process and must outlive its screen. A hang-up or a crash of the screen ends the screen only;
the main thread then waits beside the training and prints plain lines. SIGTERM and the first SIGINT save a checkpoint
and end with code 130; the second ends at once.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TextIO

from textual.app import App

from lorasmith.engine.commands import Command
from lorasmith.engine.errors import EXIT_STOPPED
from lorasmith.engine.events import Event, RunEnded
from lorasmith.tui.driver import SafeDriver

TTY_IN, TTY_OUT, TTY_ERR = 200, 201, 202
"""Fixed numbers of the private descriptors of the terminal: rich remembers them at its import."""
STOP_DEADLINE_SECONDS = 120.0
HEADLESS_POLL_SECONDS = 0.2
# Mouse, focus, paste and resize reports off, kitty keys off, line wrap on, main screen, colors plain, cursor visible.
RESET = (
    b"\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?1015l\x1b[?1016l\x1b[?1004l\x1b[?2004l\x1b[?2048l"
    b"\x1b[?7h\x1b[<u\x1b[?1049l\x1b[0m\x1b[?25h"
)

logger = logging.getLogger("lorasmith.terminal")


class HostedRun(Protocol):
    """What is needed of `engine.session.Session` to look after it without a screen."""

    @property
    def finished(self) -> bool:
        """Whether the engine is over."""
        ...

    def drain(self) -> list[Event]:
        """Return the events since the last call."""
        ...

    def send(self, command: Command) -> None:
        """Ask the engine for something."""
        ...

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the engine is over."""
        ...


class Terminal:
    """The terminal while a screen owns it: private descriptors for the screen, a log file behind stdout and stderr."""

    def __init__(self, log_path: Path) -> None:
        """Take the terminal of stdin and stdout; see `prepare_terminal`."""
        self.lost = False
        self._restored = False
        self._saved = [os.dup(fd) for fd in (0, 1, 2)]
        self._modes = termios.tcgetattr(0)
        for source, target in ((0, TTY_IN), (1, TTY_OUT), (1, TTY_ERR)):
            os.dup2(source, target, inheritable=False)
        self._streams = (sys.__stdin__, sys.__stdout__, sys.__stderr__)
        own = [_stream(fd, mode) for fd, mode in ((TTY_IN, "r"), (TTY_OUT, "w"), (TTY_ERR, "w"))]
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = own  # type: ignore[misc]
        _tell_rich()
        self._redirect(log_path)

    def _redirect(self, log_path: Path) -> None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.close(log)
        os.close(nothing)

    def restore(self) -> None:
        """Give the terminal back: main screen, cursor, modes, stdin, stdout and stderr; calling it again does nothing.

        A lost terminal is not touched: stdout and stderr stay the log.
        """
        if self._restored:
            return
        self._restored = True
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = self._streams  # type: ignore[misc]
        if self.lost:
            return
        self._write(RESET)
        try:
            # TCSANOW: waiting for the output to drain would wait for a stalled terminal.
            termios.tcsetattr(TTY_IN, termios.TCSANOW, self._modes)
            termios.tcflush(TTY_IN, termios.TCIFLUSH)
        except termios.error:
            self.lost = True
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for target, saved in enumerate(self._saved):
            os.dup2(saved, target)

    def _write(self, data: bytes) -> None:
        """Write to the terminal, unless it does not take anything within a second."""
        _, ready, _ = select.select([], [TTY_OUT], [], 1.0)
        try:
            if ready:
                os.write(TTY_OUT, data)
        except OSError:
            self.lost = True


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


class SignalHandlers:
    """What signals mean for `app` and the run that `get_session` returns."""

    def __init__(self, app: App[Any], get_session: Callable[[], HostedRun | None], terminal: Terminal) -> None:
        """Nothing is installed yet."""
        self._app = app
        self._get_session = get_session
        self._terminal = terminal
        self.deadline = float("inf")

    @property
    def stopping(self) -> bool:
        """Whether a signal asked for the end."""
        return self.deadline < float("inf")

    def install(self) -> None:
        """Handle SIGHUP, SIGTERM and SIGINT from now on, beyond the end of the screen."""
        # signal.signal, not loop.add_signal_handler: asyncio puts the default back when its loop closes, and the
        # second SIGHUP would then kill the process.
        signal.signal(signal.SIGHUP, self._hang_up)
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def tty_lost(self) -> None:
        """End the screen; the training goes on."""
        self._terminal.lost = True
        self._leave_screen()

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        self.tty_lost()

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            self._terminal.restore()
            os._exit(EXIT_STOPPED)
        self.deadline = time.monotonic() + STOP_DEADLINE_SECONDS
        session = self._get_session()
        if session is not None and not session.finished:
            session.send(Command.STOP)
        self._leave_screen()

    def _leave_screen(self) -> None:
        loop = self._app._loop
        if loop is None or loop.is_closed():
            return
        # The handler runs between two bytecodes of this thread: the loop must be woken, or it waits for its next timer.
        loop.call_soon_threadsafe(self._exit_app)

    def _exit_app(self) -> None:
        if self._app.is_running:
            self._app.exit(return_code=EXIT_STOPPED if self.stopping else 0)


def install_signal_handlers(
    app: App[Any], get_session: Callable[[], HostedRun | None], terminal: Terminal
) -> SignalHandlers:
    """Make SIGHUP end the screen only, SIGTERM and SIGINT the run with a checkpoint; return what was asked so far."""
    handlers = SignalHandlers(app, get_session, terminal)
    handlers.install()
    return handlers


def run_app(app: App[Any], get_session: Callable[[], HostedRun | None], log_path: Path, *, mouse: bool = True) -> int:
    """Show `app` on the terminal until it ends, look after a run that goes on without it, and return the exit code.

    The code is 130 after SIGTERM or SIGINT, else the run's own where the screen did not see its end, else the app's.
    """
    terminal = prepare_terminal(log_path)
    handlers = install_signal_handlers(app, get_session, terminal)
    app.driver_class = SafeDriver
    app.tty_lost = handlers.tty_lost  # type: ignore[attr-defined]
    crashed = _show(app, mouse)
    terminal.restore()
    session = get_session()
    ended = None
    if session is not None:
        if not session.finished:
            _say_why(crashed, terminal, handlers, log_path)
        ended = wait_headless(session, handlers, sys.stdout)
    if handlers.stopping:
        return EXIT_STOPPED
    return ended.exit_code if ended else 1 if crashed else app.return_code or 0


def _show(app: App[Any], mouse: bool) -> bool:
    """Run the screen and say whether it crashed."""
    try:
        app.run(mouse=mouse)
    except (Exception, asyncio.CancelledError):
        logger.exception("the screen crashed")
        return True
    if app._exception is not None:
        logger.error("the screen crashed", exc_info=app._exception)
        return True
    return False


def _say_why(crashed: bool, terminal: Terminal, handlers: SignalHandlers, log_path: Path) -> None:
    if handlers.stopping:
        text = "Saving a checkpoint, then ending. Once more ends at once, without saving."
    elif terminal.lost:
        text = f"The terminal is gone; training goes on without it (process {os.getpid()}; SIGTERM saves and ends)."
    elif crashed:
        text = f"The screen failed (see {log_path}); training goes on. Ctrl-C saves a checkpoint and ends."
    else:
        text = "Waiting for the training to end. Ctrl-C saves a checkpoint and ends."
    _say(sys.stdout, text)


def wait_headless(session: HostedRun, handlers: SignalHandlers, out: TextIO) -> RunEnded | None:
    """Wait beside a run without a screen and print its news to `out` as plain lines; return its end, if it came now.

    A run that does not end within STOP_DEADLINE_SECONDS after a signal is left behind: the process ends.
    """
    ended = None
    while True:
        over = session.finished
        for event in session.drain():
            _print_event(event, out)
            ended = event if isinstance(event, RunEnded) else ended
        if over:
            session.join()
            return ended
        if time.monotonic() > handlers.deadline:
            _say(out, f"The run did not end within {STOP_DEADLINE_SECONDS:.0f} s; ending without waiting for it.")
            os._exit(EXIT_STOPPED)
        time.sleep(HEADLESS_POLL_SECONDS)


def _print_event(event: Event, out: TextIO) -> None:
    # Imported late: numpy is not needed before the first page is painted.
    from lorasmith.tui.event_words import describe_event
    from lorasmith.tui.text import safe_str

    text = describe_event(event)
    if text:
        _say(out, safe_str(text))


def _say(out: TextIO, text: str) -> None:
    try:
        print(text, file=out, flush=True)
    except (OSError, ValueError):
        logger.info("%s", text)
