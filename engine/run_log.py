"""What libraries and Python itself have to say goes to the run's log file, never to the screen.

A line on stderr would be drawn over the wizard, and a pipe that nobody reads would stop the training. A log is bounded:
a library that warns at every step must not fill the disk over days.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import logging.handlers
import os
import re
import sys
import threading
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from types import FrameType

LIBRARIES = ("transformers", "diffusers", "bitsandbytes", "accelerate", "peft", "huggingface_hub")
QUIET_ENVIRONMENT: Mapping[str, str] = {
    "TRANSFORMERS_VERBOSITY": "warning",
    "DIFFUSERS_VERBOSITY": "warning",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=[Bb]earer )\S+")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

LOG_BYTES = 8 << 20

logger = logging.getLogger("lorasmith")
_opening = threading.Lock()


def quiet_libraries() -> None:
    """Keep the Python libraries' messages and progress bars off the screen; call it before they are imported.

    Messages still reach the log of a run (`RunLog`). Calling it again does no harm.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in LIBRARIES:
        library = logging.getLogger(name)
        for handler in [handler for handler in library.handlers if _writes_to_screen(handler)]:
            library.removeHandler(handler)
        library.__class__ = _LogFileOnly
        library.__dict__["propagate"] = True
    logging.captureWarnings(True)
    root = logging.getLogger()
    if not root.handlers:
        # With no handler at all, Python prints warnings to stderr.
        root.addHandler(logging.NullHandler())


class _LogFileOnly(logging.Logger):
    """A library's logger that the library cannot point at the screen.

    transformers and diffusers add a stderr handler to their logger and cut it off from the root logger, both at import.
    """

    def addHandler(self, hdlr: logging.Handler) -> None:  # noqa: N802  (overrides logging's own name)
        if not _writes_to_screen(hdlr):
            super().addHandler(hdlr)

    def __setattr__(self, name: str, value: object) -> None:
        if name != "propagate":
            super().__setattr__(name, value)


class RunLog:
    """Appends log records of every thread to a file (mode 0600) until closed: warnings, and lorasmith's own notes.

    At LOG_BYTES the file becomes PATH.1, which replaces the one before it. Several on one path share one file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        with _opening:
            handler = _open_logs.get(self._path) or _BoundedHandler(self._path)
            handler.users += 1
            if handler.users == 1:
                _open_logs[self._path] = handler
                logging.getLogger().addHandler(handler)
                handler.catch_crashes()
        logger.setLevel(logging.INFO)
        self._handler: _BoundedHandler | None = handler

    def close(self) -> None:
        """Stop logging to the file; again does nothing."""
        handler, self._handler = self._handler, None
        if handler is None:
            return
        with _opening:
            handler.users -= 1
            if handler.users == 0:
                del _open_logs[self._path]
                logging.getLogger().removeHandler(handler)
                handler.ignore_crashes()
                handler.close()


class _BoundedHandler(logging.handlers.RotatingFileHandler):
    def __init__(self, path: Path) -> None:
        self.users = 0
        super().__init__(path, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(_PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.addFilter(_worth_keeping)

    def _open(self) -> TextIOWrapper:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_CLOEXEC, 0o600)

        return open(self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors, opener=private)  # type: ignore[return-value]

    def catch_crashes(self) -> None:
        """Let a crash of the whole process, such as a segmentation fault, leave every thread's stack in the file."""
        self._was_enabled = faulthandler.is_enabled()
        # Of its own: the other one is closed where the file is full and another begins.
        self._crash_fd = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        faulthandler.enable(file=self._crash_fd, all_threads=True)

    def ignore_crashes(self) -> None:
        """Put back what was before `catch_crashes`."""
        faulthandler.disable()
        if self._was_enabled and sys.__stderr__ is not None and not sys.__stderr__.closed:
            faulthandler.enable(file=sys.__stderr__, all_threads=True)
        os.close(self._crash_fd)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (overrides logging's own name)
        # A full disk must neither end the training nor print a traceback over the screen.
        return


_open_logs: dict[Path, _BoundedHandler] = {}


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain_text(super().format(record))


def write_stacks(number: int, frame: FrameType | None) -> None:
    """Handle a signal: write the stacks of all threads to the descriptor 2, behind which is the log.

    Not by `faulthandler.register`, which follows the stacks of running threads without the interpreter lock: a hundred
    signals in a row crashed every training that they were tried on.
    """
    with contextlib.suppress(OSError, ValueError):
        faulthandler.dump_traceback(file=2, all_threads=True)


def plain_text(text: str) -> str:
    r"""Return `text` without access tokens, and with control characters, bidi marks and surrogates made visible.

    Newlines and tabs stay; ESC becomes the four characters `\x1b`.
    """
    redacted = TOKEN.sub("[token]", text)
    return CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), redacted)


def _worth_keeping(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] == "lorasmith"


def _writes_to_screen(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
