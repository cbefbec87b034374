"""A program in a real pty, read as fast as it writes."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping


class PtyChild:
    """Runs `arguments` on a new pty of `columns` x `rows`."""

    def __init__(self, arguments: list[str], columns: int, rows: int, environ: Mapping[str, str] | None = None) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            arguments, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **(environ or {})},
        )  # fmt: skip
        os.close(slave)

    def read(self, seconds: float) -> bytes:
        """Return what is there within `seconds`, as soon as there is anything."""
        if not select.select([self.master], [], [], max(0.0, seconds))[0]:
            return b""
        try:
            return os.read(self.master, 1 << 16)
        except OSError:
            return b""

    def read_for(self, seconds: float) -> bytes:
        """Return everything that comes within `seconds`."""
        end, taken = time.perf_counter() + seconds, b""
        while (left := end - time.perf_counter()) > 0:
            taken += self.read(left)
            if self.process.poll() is not None:
                break
        return taken

    def read_until(self, words: bytes, seconds: float) -> bool:
        """Read until `words` come; return whether they came within `seconds`."""
        end, tail = time.perf_counter() + seconds, b""
        while (left := end - time.perf_counter()) > 0 and self.process.poll() is None:
            tail = tail[-len(words) :] + self.read(min(left, 0.2))
            if words in tail:
                return True
        return False

    def write(self, keys: bytes) -> None:
        """Type."""
        os.write(self.master, keys)

    def close(self) -> None:
        """End the program."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)
