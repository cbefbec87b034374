"""Printing that can neither fail nor wait: a training must not end, or stand still, with whoever reads its output."""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import threading
import time

MAX_WAITING_BYTES = 1 << 20
"""What waits for a reader that does not read; more is left out, and a line says so."""
CHUNK_BYTES = 1 << 16


class PatientStream(io.TextIOBase):
    """Text for the terminal, pipe or file behind a descriptor; `write` never raises and never blocks.

    A terminal or pipe gets a description of its own that does not block, so that the shell's stays as it is. What the
    reader does not take yet waits in memory until the next `flush`. Once the terminal or the reader is gone, `lost` is
    true and text is dropped. Safe to use from several threads, not from a signal handler.
    """

    def __init__(self, fd: int, encoding: str = "utf-8") -> None:
        """Print to what `fd` is now; `fd` itself may then be closed or pointed elsewhere."""
        self.lost = False
        self._encoding = encoding
        self._tty = os.isatty(fd)
        self._fd = _own_description(fd)
        self._waiting = bytearray()
        self._left_out = 0
        self._writing = threading.RLock()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the text; characters that it lacks are spelled out."""
        return self._encoding

    def isatty(self) -> bool:
        """Whether this is a terminal."""
        return self._tty

    def fileno(self) -> int:
        """Return the stream's own descriptor, which may not block."""
        return self._fd

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Take `text` and print what can be printed at once."""
        with self._writing:
            data = text.encode(self._encoding, "backslashreplace")
            if len(self._waiting) + len(data) > MAX_WAITING_BYTES:
                self._left_out += len(data)
            elif not self.lost:
                self._waiting += data
        self.flush()
        return len(text)

    def flush(self) -> None:
        """Print what waits, as much as the reader takes now."""
        with self._writing:
            while self._waiting and not self.lost and not self.closed:
                try:
                    del self._waiting[: os.write(self._fd, self._waiting[:CHUNK_BYTES])]
                except BlockingIOError:
                    return
                except OSError as error:
                    self._give_up(error)
            if self._left_out and not self.lost and not self.closed:
                note, self._left_out = f"[{self._left_out} bytes were left out: nobody read them]\n", 0
                self._waiting += note.encode()

    def look(self) -> None:
        """Find out whether the reader is gone, without writing anything."""
        if not self.lost and is_gone(self._fd):
            self.lose()

    def lose(self) -> None:
        """Treat the reader as gone from now on."""
        with self._writing:
            self._waiting.clear()
            self.lost = True

    def finish(self, seconds: float) -> None:
        """Wait at most `seconds` for a reader that is behind, then close."""
        end = time.monotonic() + seconds
        while self._waiting and not self.lost and (left := end - time.monotonic()) > 0:
            select.select([], [self._fd], [], left)
            self.flush()
        self.close()

    def close(self) -> None:
        """Close the descriptor; what still waits is dropped."""
        with self._writing:
            if not self.closed:
                self._waiting.clear()
                os.close(self._fd)
            super().close()

    def _give_up(self, error: OSError) -> None:
        if stat.S_ISREG(os.fstat(self._fd).st_mode):
            # A full disk, mostly: this text is gone, later text may find room.
            self._waiting.clear()
            return
        self.lose()


def is_gone(fd: int) -> bool:
    """Whether nobody is behind a descriptor any more: a terminal that hung up, or a pipe that nobody reads."""
    looking = select.poll()
    looking.register(fd, 0)
    return any(state & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, state in looking.poll(0))


def _own_description(fd: int) -> int:
    """Open what `fd` is once more without blocking; where that is not possible, return a duplicate."""
    mode = os.fstat(fd).st_mode
    if os.isatty(fd) or stat.S_ISFIFO(mode):
        with contextlib.suppress(OSError):
            path = os.ttyname(fd) if os.isatty(fd) else f"/proc/self/fd/{fd}"
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return os.dup(fd)
