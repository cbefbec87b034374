"""A program in a tmux pane of its own server: what a multiplexer makes of it can be read, typed into and resized."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TMUX = shutil.which("tmux")
_SETTINGS = """
set -g default-terminal tmux-256color
set -sg escape-time 0
set -g status off
set -g allow-rename off
"""


class TmuxPane:
    """`lorasmith ARGUMENTS` in a pane; its state, cache and home are folders below `folder`, its working folder."""

    def __init__(self, folder: Path, *arguments: str, columns: int = 80, rows: int = 24) -> None:
        self._socket = f"lorasmith-{secrets.token_hex(6)}"
        settings = folder / "tmux.conf"
        settings.write_text(_SETTINGS)
        program = [sys.executable, "-m", "lorasmith.tui", *arguments]
        self._status = folder / f"{self._socket}.status"
        # The shell keeps the pane for a look at what was printed; tmux itself sometimes misses the status.
        shell = ["sh", "-c", f'"$@"; echo $? > {shlex.quote(str(self._status))}; exec sleep 600', "sh"]
        environment = ["env", *(f"{name}={value}" for name, value in _environment(folder).items())]
        self._tmux(
            "-f", str(settings), "new-session", "-d", "-x", str(columns), "-y", str(rows), "-c", str(folder),
            *shell, *environment, *program,
        )  # fmt: skip
        self._group = int(self._format("#{pane_pid}"))

    def text(self) -> str:
        """What the pane shows."""
        return self._tmux("capture-pane", "-p")

    def wait_for(self, wanted: str | Callable[[str], bool], seconds: float = 40.0) -> str:
        """Wait until the pane shows `wanted` and return its text; fails with the pane's text."""
        end = time.monotonic() + seconds
        while True:
            text = self.text()
            if wanted in text if isinstance(wanted, str) else wanted(text):
                return text
            if time.monotonic() > end:
                raise AssertionError(f"{wanted} was not shown within {seconds:.0f} s:\n{text}")
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Press keys by tmux's names, such as Enter, Tab or C-u."""
        self._tmux("send-keys", *keys)

    def type(self, text: str) -> None:
        """Type text as it is."""
        self._tmux("send-keys", "-l", text)

    def fill(self, text: str) -> None:
        """Put `text` into the focused input in place of what stands there."""
        self.press("End", "C-u")
        self.type(text)

    def resize(self, columns: int, rows: int) -> None:
        """Give the pane another size."""
        self._tmux("resize-window", "-x", str(columns), "-y", str(rows))

    @property
    def title(self) -> str:
        """The title that the program gave the pane, the host's name where it gave none."""
        return self._format("#{pane_title}")

    @property
    def modes(self) -> str:
        """Whether the alternate screen is shown and the mouse is asked for: `0 0` for a shell."""
        return self._format("#{alternate_on} #{mouse_any_flag}")

    def exit_code(self, seconds: float = 40.0) -> int:
        """Wait until the program is over."""
        end = time.monotonic() + seconds
        while not (self._status.exists() and (status := self._status.read_text().strip())):
            if time.monotonic() > end:
                raise AssertionError(f"still running after {seconds:.0f} s:\n{self.text()}")
            time.sleep(0.05)
        return int(status)

    def kill_terminal(self) -> None:
        """End the server and with it the terminal, as a lost connection does; the program gets a hang-up."""
        self._tmux("kill-server")

    def close(self) -> None:
        """End the program and the server, whatever they do; a hang-up alone would leave a training running."""
        with contextlib.suppress(ProcessLookupError, subprocess.CalledProcessError):
            os.killpg(self._group, signal.SIGKILL)
        with contextlib.suppress(subprocess.CalledProcessError):
            self._tmux("kill-server")

    def _format(self, template: str) -> str:
        return self._tmux("display-message", "-p", template).strip()

    def _tmux(self, *arguments: str) -> str:
        assert TMUX is not None
        environment = {name: value for name, value in os.environ.items() if name not in ("TMUX", "TMUX_PANE")}
        command = [TMUX, "-u", "-L", self._socket, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, timeout=20, env=environment)
        return done.stdout.decode("utf-8", "replace")


def _environment(folder: Path) -> Mapping[str, str]:
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return {
        "HOME": str(home),
        "LORASMITH_STATE": str(folder / "state"),
        "LORASMITH_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "LC_ALL": "C.UTF-8",
        "COLORTERM": "truecolor",
        # What a shell exported once says nothing about the pane: it is resized later.
        "COLUMNS": "70",
        "LINES": "20",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
