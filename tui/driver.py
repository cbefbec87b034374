"""A Linux driver that survives its terminal: a stalled or vanished terminal never holds up the event loop.

Textual's own driver puts output into a bounded queue from the event loop and waits when it is full, spins on the end of
the input, and stops the whole process on SIGTSTP; each would stop a training that lives in the same process.
"""

from __future__ import annotations

import codecs
import logging
import os
import queue
import selectors
import threading
from collections.abc import Callable
from functools import partial
from typing import IO, TYPE_CHECKING, Any

from textual._parser import ParseError
from textual._xterm_parser import XTermParser
from textual.drivers import linux_driver
from textual.drivers._writer_thread import WriterThread
from textual.drivers.linux_driver import LinuxDriver

if TYPE_CHECKING:
    from textual.app import App

MAX_QUEUED_FRAMES = 30
STOP_SECONDS = 1.0

logger = logging.getLogger("lorasmith.screen")


class SafeWriter(WriterThread):
    """Writes to the terminal from a thread of its own; `write` never waits.

    While the terminal does not read, whole frames are dropped; `on_recovered` is called from the thread when it reads
    again, so that everything is painted anew. `dead` is set when the terminal is gone; `on_lost` is called then.
    """

    def __init__(self, file: IO[str], on_recovered: Callable[[], None], on_lost: Callable[[], None]) -> None:
        """Write to the descriptor of `file`, past its buffer, which a blocked thread would keep locked at exit."""
        super().__init__(file)
        self._frames: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUED_FRAMES)
        self._fd = file.fileno()
        self._on_recovered = on_recovered
        self._on_lost = on_lost
        self._dropped = False
        self.dead = False

    def write(self, text: str) -> None:
        """Queue `text`, or drop it when the terminal is behind or gone."""
        if self.dead:
            return
        try:
            self._frames.put_nowait(text.encode("utf-8", "replace"))
        except queue.Full:
            self._dropped = True

    def run(self) -> None:
        """Write until stopped; after an error only empty the queue."""
        while (frame := self._frames.get()) is not None:
            try:
                self._show(frame)
            except Exception:
                # Without a word, the screen would stand still for ever: it ends as if the terminal was gone.
                logger.exception("the writer of the screen failed")
                self._die()

    def _show(self, frame: bytes) -> None:
        if not self.dead:
            self._write_all(frame)
        if self._dropped and self._frames.empty() and not self.dead:
            self._dropped = False
            self._on_recovered()

    def _die(self) -> None:
        self.dead = True
        self._on_lost()

    def _write_all(self, frame: bytes) -> None:
        try:
            while frame:
                frame = frame[os.write(self._fd, frame) :]
        except OSError:
            self._die()

    def stop(self) -> None:
        """End the thread; a terminal that does not read gets a moment, then the daemon thread is left behind."""
        try:
            self._frames.put(None, timeout=STOP_SECONDS)
        except queue.Full:
            return
        self.join(STOP_SECONDS)


class SafeDriver(LinuxDriver):
    """The driver for an application that hosts a training: use it as `App.driver_class`.

    When the terminal is gone it calls the application's `tty_lost()` on the event loop, or `exit()` if there is none.
    """

    def __init__(
        self, app: App[Any], *, debug: bool = False, mouse: bool = True, size: tuple[int, int] | None = None
    ) -> None:
        """Drive `app` on the terminal of `sys.__stdin__` and `sys.__stderr__`."""
        super().__init__(app, debug=debug, mouse=mouse, size=size)
        self._lost = threading.Lock()
        self._loss_told = False

    def start_application_mode(self) -> None:
        """Take over the terminal, with the writer that never waits."""
        # The base class makes its writer by this module-level name, in the middle of a long method.
        names = vars(linux_driver)
        names["WriterThread"] = self._make_writer
        try:
            super().start_application_mode()  # type: ignore[no-untyped-call]
        finally:
            names["WriterThread"] = WriterThread

    def _get_terminal_size(self) -> tuple[int, int]:
        """Return columns and rows as the terminal has them; the base class believes an exported $COLUMNS for ever."""
        try:
            width, height = os.get_terminal_size(self.fileno)
        except (OSError, ValueError):
            return super()._get_terminal_size()
        return width or 80, height or 24

    def _make_writer(self, file: IO[str]) -> SafeWriter:
        return SafeWriter(file, on_recovered=self._repaint, on_lost=self._tell_loss)

    def _sigtstp_application(self, *_: object) -> None:
        """Go on: stopping the process would stop the training."""

    def _sigcont_application(self, *_: object) -> None:
        """Paint anew; the base class would start a second input thread."""
        self._repaint()

    def _repaint(self) -> None:
        self._call_app(lambda: self._app.screen.refresh())

    def _tell_loss(self) -> None:
        with self._lost:
            if self._loss_told:
                return
            self._loss_told = True
        self._call_app(lambda: getattr(self._app, "tty_lost", self._app.exit)())

    def _call_app(self, callback: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The loop is closed: the application is already gone.
            return

    def end_threads(self) -> None:
        """End what reads keys and what paints, after a crash that left them at work."""
        self.exit_event.set()
        if self._key_thread is not None:
            self._key_thread.join(STOP_SECONDS)
        if self._writer_thread is not None:
            self._writer_thread.stop()

    def write(self, data: str) -> None:
        """Write to the terminal; nothing before application mode and after its end."""
        if self._writer_thread is not None:
            self._writer_thread.write(data)

    def _run_input_thread(self) -> None:
        """Read keys; a failure there ends the screen with its traceback in the log, for no key would be heard."""
        try:
            self.run_input_thread()
        except Exception as error:
            self._call_app(partial(self._app._handle_exception, error))

    def run_input_thread(self) -> None:
        """Read keys until asked to end, or until the terminal is gone."""
        parser = XTermParser(self._debug)
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        with selectors.SelectSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            while not self.exit_event.is_set():
                ready = selector.select(0.1)
                data = self._read() if ready else b""
                if ready and not data:
                    self._tell_loss()
                    break
                for event in parser.feed(decode(data)) if data else ():
                    self.process_message(event)
                for event in parser.tick():
                    self.process_message(event)
        try:
            for _ in parser.feed(""):
                pass
        except (EOFError, ParseError):
            pass

    def _read(self) -> bytes:
        """Return what was typed, nothing when the terminal is gone."""
        try:
            return os.read(self.fileno, 4096)
        except OSError:
            return b""
