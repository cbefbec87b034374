"""Trying a run's stages once, in a process of its own: the card is empty again when it ends, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

from lorasmith.engine.errors import HardwareError
from lorasmith.engine.run_log import plain_text

LAST_WORDS = 6
"""Lines of a failed rehearsal that are shown."""


class Measuring:
    """One rehearsal of a run file; `stop` ends it from any thread."""

    def __init__(self, run_file: str) -> None:
        """Prepare to try the run of this file."""
        self._command = [sys.executable, "-m", "lorasmith.engine.cli", "plan", "--measure", run_file]
        self._process: subprocess.Popen[str] | None = None
        self.stopped = False

    def measure(self, tell: Callable[[str, int, int], None]) -> list[str]:
        """Return what each stage took, a line each; raises HardwareError with what the rehearsal said last."""
        with subprocess.Popen(  # noqa: S603
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            self._process = process
            if self.stopped:
                self.stop()
            lines = []
            for line in process.stdout or ():
                lines.append(plain_text(line))
                if words := " ".join(lines[-1].split()):
                    tell(words, 0, 0)
        if self.stopped:
            raise HardwareError("The rehearsal was stopped; nothing of it is kept.")
        if process.returncode != 0:
            raise HardwareError("The rehearsal ended early.", why=" ".join(" ".join(lines[-LAST_WORDS:]).split()))
        return report_of(lines)

    def stop(self) -> None:
        """End it: it removes what it has written."""
        self.stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)


def report_of(lines: list[str]) -> list[str]:
    """Return the report that follows the progress lines and an empty one."""
    stripped = [line.rstrip() for line in lines]
    begin = stripped.index("") + 1 if "" in stripped else 0
    return [line for line in stripped[begin:] if line]
