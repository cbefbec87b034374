"""What libraries, C code and child processes write past the log: kept off the screen, cleaned, and bounded.

The descriptors 1 and 2 become a plain file, which takes anything at once: a pipe would have to be read by a thread
here, and C code that fills it while it holds the interpreter's lock would stop the process for good. A thread carries
what arrives to the log, and empties the file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from lorasmith.engine.patient_stream import is_gone
from lorasmith.engine.run_log import RunLog

TICK_SECONDS = 0.5
TICK_BYTES = 1 << 15
"""At most this much of each end of what came within a tick reaches the log; a line counts the rest."""
KEEP_BYTES = 1 << 20
"""The file is emptied when it is larger."""
LINE_CHARACTERS = 2000

logger = logging.getLogger("lorasmith.output")


class StrayOutput:
    """Descriptors 1 and 2 as lines of the log at `log_path`, until closed; `saved` are duplicates of what they were."""

    def __init__(self, log_path: Path) -> None:
        """Redirect both at once; OSError where neither the log nor its folder can be written to."""
        log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._log = RunLog(log_path)
        self._path = log_path.with_name(f"{log_path.stem}-{os.getpid()}.output")
        self._position = 0
        self._rest = b""
        self._reading = threading.Lock()
        self._over = threading.Event()
        self._closed = False
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o600)
        self.saved = {fd: os.dup(fd) for fd in (1, 2)}
        _flush_streams()
        for fd in self.saved:
            os.dup2(self._fd, fd)
        self._take_leftovers(log_path)
        self._thread = threading.Thread(target=self._keep_reading, name="stray-output", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Point 1 and 2 back to what they were, or to nothing where that is gone; again does nothing."""
        if self._closed:
            return
        self._closed = True
        _flush_streams()
        nothing = os.open(os.devnull, os.O_WRONLY)
        for fd, saved in self.saved.items():
            os.dup2(nothing if is_gone(saved) else saved, fd)
            os.close(saved)
        os.close(nothing)
        self._over.set()
        self._thread.join()
        self._read(last=True)
        os.close(self._fd)
        self._path.unlink(missing_ok=True)
        self._log.close()

    def _keep_reading(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            with contextlib.suppress(OSError):
                self._read()

    def _read(self, *, last: bool = False) -> None:
        with self._reading:
            size = os.fstat(self._fd).st_size
            if size > self._position:
                head, skipped, tail = _ends(self._fd, self._position, size)
                self._position = size
                self._tell(head, skipped, tail)
            elif self._rest:
                self._rest = self._tell_lines(self._rest + b"\n")
            if last and self._rest:
                self._tell_lines(self._rest + b"\n")
            if size > KEEP_BYTES:
                # What is written between the look at the size and here is lost: after a megabyte, that is bearable.
                os.ftruncate(self._fd, 0)
                self._position = 0

    def _tell(self, head: bytes, skipped: int, tail: bytes) -> None:
        rest = self._tell_lines(self._rest + head)
        if skipped:
            self._tell_lines(rest + b"\n")
            logger.info("[%d bytes of output were left out here: too much within a moment]", skipped)
            rest = self._tell_lines(tail)
        self._rest = rest if len(rest) <= TICK_BYTES else b""

    def _tell_lines(self, data: bytes) -> bytes:
        """Log the complete lines of `data` and return what follows the last of them."""
        *lines, rest = data.split(b"\n")
        for line in lines:
            # Of a progress bar that is drawn over and over, the last state counts.
            shown = next((part for part in reversed(line.split(b"\r")) if part.strip()), b"")
            if shown:
                logger.info("%s", shown.decode("utf-8", "backslashreplace")[:LINE_CHARACTERS])
        return rest

    def _take_leftovers(self, log_path: Path) -> None:
        """Log the last words of processes that ended suddenly, and remove their files."""
        for path in log_path.parent.glob(f"{log_path.stem}-*.output"):
            number = re.fullmatch(r"\d+", path.stem.rpartition("-")[2])
            if path == self._path or number is None or _is_alive(int(number.group())):
                continue
            with contextlib.suppress(OSError), path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                head, skipped, tail = _ends(file.fileno(), max(0, size - 2 * TICK_BYTES), size)
                if size:
                    logger.info("The last output of process %s, which ended suddenly:", number.group())
                self._tell(head, skipped, tail)
                self._tell_lines(self._rest + b"\n")
                self._rest = b""
                path.unlink()


def _ends(fd: int, start: int, end: int) -> tuple[bytes, int, bytes]:
    """Return the first bytes between two positions of a file, how many follow, and the last ones."""
    if end - start <= 2 * TICK_BYTES:
        return os.pread(fd, end - start, start), 0, b""
    skipped = end - start - 2 * TICK_BYTES
    return os.pread(fd, TICK_BYTES, start), skipped, os.pread(fd, TICK_BYTES, end - TICK_BYTES)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def stray_output(log_path: Path) -> Iterator[StrayOutput | None]:
    """Keep stray output in the log at `log_path` meanwhile; None where 1 and 2 are not this process's to redirect."""
    if not _owns_descriptors():
        yield None
        return
    output = StrayOutput(log_path)
    try:
        yield output
    finally:
        output.close()


def _owns_descriptors() -> bool:
    """Whether Python's own streams are the descriptors: who replaced them captures the output already."""
    try:
        return (sys.stdout.fileno(), sys.stderr.fileno()) == (1, 2)
    except (OSError, ValueError, AttributeError):
        return False
