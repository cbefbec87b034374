"""A run beside a terminal that may vanish: what signals mean, where output goes, and when the process ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO, cast

from lorasmith.engine.cli.progress import RunPrinter, default_stream
from lorasmith.engine.commands import Command
from lorasmith.engine.end_notice import terminal_notice, tmux_passes_through
from lorasmith.engine.errors import EXIT_STOPPED
from lorasmith.engine.events import Logged
from lorasmith.engine.patient_stream import PatientStream
from lorasmith.engine.run_log import write_stacks
from lorasmith.engine.running_clock import clock_stopped
from lorasmith.engine.stopping import Stopping, tell_loss
from lorasmith.engine.stray_output import stray_output

if TYPE_CHECKING:
    from lorasmith.engine.session import RunFolder, Session

POLL_SECONDS = 0.1
UNWATCHED_POLL_SECONDS = 0.5
LAST_WORDS_SECONDS = 5.0


@contextlib.contextmanager
def open_output(log_path: Path, *, as_json: bool) -> Iterator[TextIO]:
    """Yield where progress goes; libraries that write to the descriptors 1 and 2 reach the log meanwhile."""
    with stray_output(log_path) as stray:
        if stray is None:
            yield default_stream(as_json)
            return
        stream = PatientStream(stray.saved[2 if as_json else 1], sys.stdout.encoding or "utf-8")
        try:
            yield cast(TextIO, stream)
        finally:
            stream.finish(LAST_WORDS_SECONDS)


class Hosting:
    """Looks after one session from the main thread until it is over.

    SIGINT and SIGTERM save a checkpoint and end with 130, the second ends at once. A hang-up ends the output only.
    SIGTSTP stops the process until `fg`, and no time is counted meanwhile. SIGUSR1 saves a checkpoint, SIGUSR2 writes
    the stacks of all threads to the log. Handlers only set marks: the thread may be in the middle of a line.
    """

    def __init__(self, session: Session, run: RunFolder, printer: RunPrinter, stream: TextIO) -> None:
        self._session = session
        self._run = run
        self._printer = printer
        self._stream = stream
        self._stopping = Stopping()
        self._stop_told = False
        self._hang_ups = 0
        self._loss_told = False
        self._suspend = False

    def run(self) -> None:
        """Start the session, show its events, and return when it is over."""
        with self._signals():
            self._session.start()
            while not self._session.join(UNWATCHED_POLL_SECONDS if self._lost else POLL_SECONDS):
                self._look_around()
                self._show_events()
            # A short checkpoint may be saved before the next look.
            self._tell_stop()
        self._show_events()
        self._ring()

    @property
    def _lost(self) -> bool:
        return isinstance(self._stream, PatientStream) and self._stream.lost

    def _show_events(self) -> None:
        for event in self._session.drain():
            self._printer.show(event)

    def _look_around(self) -> None:
        if isinstance(self._stream, PatientStream):
            self._stream.look()
            self._stream.flush()
        if self._lost or self._hang_ups:
            self._take_hang_up()
        if self._suspend:
            self._suspend = False
            self._stop_process()
        self._tell_stop()
        if self._stopping.is_overdue(self._session):
            self._leave_behind()

    def _tell_stop(self) -> None:
        if self._stopping.asked and not self._stop_told:
            self._stop_told = True
            self._printer.line("Saving a checkpoint, then ending. Once more ends at once, without saving.")

    def _take_hang_up(self) -> None:
        hung_up, self._hang_ups = self._hang_ups > 0, 0
        if self._lost:
            self._printer.go_to_log()
        if self._loss_told or not (self._lost or hung_up):
            return
        if self._stream.isatty() and not self._lost:
            # Somebody sent the signal by hand, or the shell left before its terminal did.
            self._session.emit(Logged(severity="info", message="A hang-up signal came; training goes on."))
            return
        self._loss_told = True
        tell_loss(self._session, str(self._run.path))

    def _leave_behind(self) -> NoReturn:
        """End the process while the engine still works on something that cannot be interrupted."""
        self._show_events()
        self._printer.hide()
        if self._printer.ended is not None:
            self._printer.line(self._printer.ended.message)
        if isinstance(self._stream, PatientStream):
            self._stream.finish(LAST_WORDS_SECONDS)
        os._exit(EXIT_STOPPED)

    def _stop_process(self) -> None:
        self._printer.hide()
        before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        with clock_stopped():
            # To this thread and not the process, so that nothing runs on before it takes effect; the default action
            # and not SIGSTOP, since the kernel leaves it out where no shell is there to say `fg`.
            signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, before)
        self._printer.show_again()

    def _ring(self) -> None:
        ended = self._printer.ended
        # Who stopped it sits at the terminal.
        if ended is not None and ended.outcome != "stopped" and self._stream.isatty() and not self._lost:
            passes = tmux_passes_through(os.environ)
            self._stream.write(terminal_notice(ended, self._run.path.name, os.environ, passthrough=passes))
            self._stream.flush()

    # Signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        handlers: dict[int, signal.Handlers | Callable[[int, FrameType | None], None]] = {
            signal.SIGINT: self._end,
            signal.SIGTERM: self._end,
            signal.SIGHUP: self._hang_up,
            signal.SIGTSTP: self._suspend_soon,
            signal.SIGUSR1: self._save,
            signal.SIGUSR2: write_stacks,
            # A background job whose terminal has `stty tostop` would be stopped at its first line.
            signal.SIGTTOU: signal.SIG_IGN,
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._stopping.asked:
            if self._stream.isatty():
                with contextlib.suppress(OSError):
                    os.write(self._stream.fileno(), b"\x1b[?25h\r\n")
            os._exit(EXIT_STOPPED)
        self._stopping.ask(self._session)

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        self._hang_ups += 1

    def _suspend_soon(self, number: int, frame: FrameType | None) -> None:
        self._suspend = True

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._session.send(Command.SAVE_NOW)
