"""A program in a pty of a given size whose screen can be read: pyte is the terminal."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pyte

ROOT = Path(__file__).resolve().parents[2]


class TerminalProgram:
    """Starts `arguments` under this Python as the leader of a session whose terminal is a new pty."""

    def __init__(
        self, arguments: list[str], columns: int = 80, rows: int = 24, environ: Mapping[str, str] | None = None
    ) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.modes_before = termios.tcgetattr(slave)
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.output = b""
        self._slave = slave
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **(environ or {})},
        )  # fmt: skip

    def read(self, seconds: float = 0.05) -> None:
        """Take in what the program writes for that long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and self.master >= 0:
            if not select.select([self.master], [], [], left)[0]:
                return
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            self.output += data
            # pyte does not know kitty's key protocol and would print its letters.
            self.stream.feed(data.replace(b"\x1b[<u", b"").replace(b"\x1b[>25u", b""))

    def wait_for(self, seen: Callable[[], bool], seconds: float = 30.0) -> bool:
        """Read until `seen()`, at most `seconds`."""
        end = time.monotonic() + seconds
        while not seen() and time.monotonic() < end:
            self.read()
        return seen()

    def text(self) -> str:
        return "\n".join(self.screen.display)

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def modes(self) -> list[object]:
        return list(termios.tcgetattr(self._slave))

    def hang_up(self) -> None:
        """Close the terminal, as a closed window or a dropped connection does."""
        os.close(self._slave)
        os.close(self.master)
        self.master = self._slave = -1

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 30.0) -> int:
        """Return the exit code, reading on meanwhile."""
        self.wait_for(lambda: self.process.poll() is not None, seconds)
        return self.process.wait(1.0)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if self.master >= 0:
            self.hang_up()
