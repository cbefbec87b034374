"""The process around the screen: what signals mean, and what happens when the screen is gone.

The training lives in this process and must outlive its screen. A hang-up or a crash of the screen ends the screen only;
the main thread then waits beside the training and prints plain lines. SIGTERM and the first SIGINT save a checkpoint
and end with code 130; the second ends at once.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from textual.app import App
from textual.worker import WorkerFailed

from lorasmith.engine.commands import Command
from lorasmith.engine.end_notice import terminal_notice
from lorasmith.engine.errors import EXIT_STOPPED
from lorasmith.engine.events import Event, Logged, RunEnded
from lorasmith.engine.run_log import write_stacks
from lorasmith.engine.stopping import Stopping, tell_loss
from lorasmith.tui.driver import SafeDriver
from lorasmith.tui.terminal import Terminal, prepare_terminal

HEADLESS_POLL_SECONDS = 0.5

logger = logging.getLogger("lorasmith.screen")


class HostedRun(Protocol):
    """What is needed of `engine.session.Session` to look after it without a screen."""

    run: Any
    latest: dict[type[Event], Event]

    @property
    def finished(self) -> bool:
        """Whether the engine is over."""
        ...

    @property
    def outcome(self) -> RunEnded | None:
        """How the run ended."""
        ...

    def drain(self) -> list[Event]:
        """Return the events since the last call."""
        ...

    def send(self, command: Command) -> None:
        """Ask the engine for something."""
        ...

    def emit(self, event: Event) -> None:
        """Journal and show an event."""
        ...

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the engine is over."""
        ...


class SignalHandlers:
    """What signals mean for `app` and the run that `get_session` returns.

    SIGHUP ends the screen, SIGINT and SIGTERM the run with a checkpoint, the second of these the process. SIGTSTP does
    nothing, as it would stop the training; SIGUSR1 saves a checkpoint, SIGUSR2 writes all stacks to the log.
    """

    def __init__(self, app: App[Any], get_session: Callable[[], HostedRun | None], terminal: Terminal) -> None:
        """Nothing is installed yet."""
        self._app = app
        self._get_session = get_session
        self._terminal = terminal
        self.stopping = Stopping()
        self.hung_up = self.screen_lost = False

    def install(self) -> None:
        """Handle signals from now on, beyond the end of the screen; once more after it, which takes some away."""
        # signal.signal, not loop.add_signal_handler: asyncio puts the default back when its loop closes, and the
        # second SIGHUP would then kill the process.
        signal.signal(signal.SIGHUP, self._hang_up)
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)
        signal.signal(signal.SIGUSR1, self._save)
        for number in (signal.SIGTSTP, signal.SIGCONT):
            signal.signal(number, _go_on)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, write_stacks)

    def tty_lost(self) -> None:
        """End the screen, which can no longer be drawn; the training goes on."""
        self.screen_lost = True
        self._leave_screen()

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        self.hung_up = True
        self._leave_screen()

    def _save(self, number: int, frame: FrameType | None) -> None:
        session = self._get_session()
        if session is not None and not session.finished:
            session.send(Command.SAVE_NOW)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self.stopping.asked:
            self._terminal.leave_screen()
            os._exit(EXIT_STOPPED)
        self.stopping.ask(self._get_session())
        self._leave_screen()

    def _leave_screen(self) -> None:
        loop = self._app._loop
        if loop is None or loop.is_closed():
            return
        # The handler runs between two bytecodes of this thread: the loop must be woken, or it waits for its next timer.
        loop.call_soon_threadsafe(self._exit_app)

    def _exit_app(self) -> None:
        if self._app.is_running:
            self._app.exit(return_code=EXIT_STOPPED if self.stopping.asked else 0)


def _go_on(number: int, frame: FrameType | None) -> None:
    """Do nothing: the default of SIGTSTP would stop the training with the process."""


def install_signal_handlers(
    app: App[Any], get_session: Callable[[], HostedRun | None], terminal: Terminal
) -> SignalHandlers:
    """Make SIGHUP end the screen only, SIGTERM and SIGINT the run with a checkpoint; return what was asked so far."""
    handlers = SignalHandlers(app, get_session, terminal)
    handlers.install()
    return handlers


def run_app(app: App[Any], get_session: Callable[[], HostedRun | None], log_path: Path, *, mouse: bool = True) -> int:
    """Show `app` on the terminal until it ends, look after a run that goes on without it, and return the exit code.

    The code is 130 after SIGTERM or SIGINT, else the run's own, else 1 where the screen crashed, else the app's.
    """
    terminal = prepare_terminal(log_path)
    handlers = install_signal_handlers(app, get_session, terminal)
    app.driver_class = SafeDriver
    app.tty_lost = handlers.tty_lost  # type: ignore[attr-defined]
    crash = _show(app, mouse)
    terminal.leave_screen()
    handlers.install()
    session = get_session()
    if session is not None and not session.finished:
        _tell_going_on(session, crash, terminal, handlers)
    elif crash:
        terminal.say(f"The screen failed: {crash}. The details are in {log_path}.")
    if session is not None:
        wait_headless(session, handlers, terminal)
    terminal.restore()
    if handlers.stopping.asked:
        return EXIT_STOPPED
    ended = session.outcome if session is not None else None
    return ended.exit_code if ended else 1 if crash else app.return_code or 0


def _show(app: App[Any], mouse: bool) -> str:
    """Run the screen and return how it crashed, "" if it did not."""
    # Its own report would show the values of all variables on the terminal; the log gets the traceback.
    app._fatal_error = app._close_messages_no_wait  # type: ignore[method-assign]
    app._print_error_renderables = app._exit_renderables.clear  # type: ignore[method-assign]
    app._print = _print_to_log  # type: ignore[method-assign]
    try:
        app.run(mouse=mouse)
        error: BaseException | None = app._exception
    except BaseException as raised:
        # Whatever it is, SystemExit of a handler included: a training may go on.
        error = raised
    if error is None:
        return "" if app._exit else "it ended without a word"
    if isinstance(error, WorkerFailed):
        # What happened and where is told by the exception inside.
        error = error.error
    logger.error("the screen crashed", exc_info=error)
    _end_driver(app)
    # Imported late: it is not needed before the first page is painted.
    from lorasmith.tui.text import safe_str

    return safe_str(f"{type(error).__name__}: {error}"[:300])


def _end_driver(app: App[Any]) -> None:
    """End the threads of a driver that the crash may have left at work: they would go on painting and reading keys."""
    if isinstance(app._driver, SafeDriver):
        app._driver.end_threads()


def _print_to_log(text: str, stderr: bool = False) -> None:
    """Write what any thread prints while the screen is shown to stray output; textual would drop it."""
    try:
        os.write(2 if stderr else 1, text.encode("utf-8", "backslashreplace"))
    except OSError:
        # A full disk: a print is not worth the end of a training.
        return


def _tell_going_on(session: HostedRun, crash: str, terminal: Terminal, handlers: SignalHandlers) -> None:
    """Say on the terminal and in the journal why there is no screen, and how to get one again."""
    path = session.run.path
    if handlers.stopping.asked:
        terminal.say("Saving a checkpoint, then ending. Once more ends at once, without saving.")
        return
    if terminal.lost:
        tell_loss(session, str(path))
        return
    if crash:
        text = f"The screen failed ({crash}; details in {session.run.log}); training goes on without it."
    elif handlers.hung_up:
        text = "A hang-up signal came; training goes on without the screen."
    elif handlers.screen_lost:
        text = "The screen could no longer be drawn; training goes on without it."
    else:
        text = "Waiting for the training to end."
    text = f"{text} `lorasmith attach {path}` shows it; Ctrl-C saves a checkpoint and ends."
    # The journal's line comes back by `drain` and is printed there.
    session.emit(Logged(severity="error" if crash else "info", message=text))


def wait_headless(session: HostedRun, handlers: SignalHandlers, terminal: Terminal) -> None:
    """Wait beside a run without a screen until it is over, and print its news as plain lines.

    A run that does not end in time after a signal is left behind: the process ends.
    """
    seen = session.finished
    while True:
        over = session.join(0.0 if session.finished else HEADLESS_POLL_SECONDS)
        for event in session.drain():
            _print_event(event, terminal)
        if over:
            break
        terminal.lines.flush()
        if handlers.stopping.is_overdue(session):
            _leave_behind(session, terminal)
    if not seen and session.outcome is not None and not handlers.stopping.asked and not terminal.lost:
        terminal.lines.write(terminal_notice(session.outcome, session.run.path.name, os.environ))


def _leave_behind(session: HostedRun, terminal: Terminal) -> NoReturn:
    """End the process while the engine still works on something that cannot be interrupted."""
    for event in session.drain():
        _print_event(event, terminal)
    terminal.restore()
    os._exit(EXIT_STOPPED)


def _print_event(event: Event, terminal: Terminal) -> None:
    # Imported late: numpy is not needed before the first page is painted.
    from lorasmith.engine.event_words import describe_event
    from lorasmith.tui.text import safe_str

    try:
        text = safe_str(describe_event(event))
    except Exception:
        # What made the screen fail may fail here again; the journal has the event.
        logger.exception("cannot be told: %s", type(event).__name__)
        return
    if text:
        terminal.say(text)
