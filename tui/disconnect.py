"""What becomes of a training when the connection drops, said before it starts; and starting anew inside tmux."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

CONTINUE = "LORASMITH_CONTINUE"
"""Set for a wizard that another wizard started: it goes on with the draft without asking."""
KEPT = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "COLORTERM", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")
"""What a tmux server that is older than this shell does not know; no tokens, since others see a command line."""
ASK_SECONDS = 1.0
_LOGIND = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")

Ask = Callable[[list[str]], str]


def is_unprotected(environ: Mapping[str, str]) -> bool:
    """Whether this terminal is a remote one that nothing keeps when the connection drops."""
    remote = environ.get("SSH_CONNECTION") or environ.get("SSH_TTY")
    return bool(remote) and not (environ.get("TMUX") or environ.get("STY"))


def ask_command(command: list[str]) -> str:
    """Return what a command prints, "" where it fails or takes longer than a second."""
    try:
        done = subprocess.run(  # noqa: S603  (fixed commands)
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=ASK_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def ends_at_logout(ask: Ask = ask_command) -> bool | None:
    """Whether systemd ends all processes of this user at the logout; None where it cannot be found out."""
    kills = ask(["busctl", "get-property", *_LOGIND, "KillUserProcesses"])
    if kills != "b true":
        return False if kills == "b false" else None
    return ask(["loginctl", "show-user", getpass.getuser(), "--property", "Linger", "--value"]) != "yes"


def disconnect_words(ends: bool | None, has_tmux: bool) -> str:
    """Return what happens when the connection drops, and what to do about it."""
    if ends:
        words = (
            "When the connection drops, this machine ends all your programs, the training too: its settings say so "
            "(KillUserProcesses). `loginctl enable-linger` allows them to go on."
        )
    else:
        words = "When the connection drops, training goes on without its screen, and `lorasmith attach` brings it back."
    if ends is None:
        words += " Where systemd is set to KillUserProcesses=yes it would be ended."
    if has_tmux:
        return f"{words} Inside tmux nothing is lost, not even the screen: x starts the wizard again there."
    return f"{words} tmux or screen would keep the screen as well, for example: sudo apt install tmux."


def tmux_command(environ: Mapping[str, str], tmux: str) -> list[str]:
    """Return the command that runs the wizard in a new session of tmux; a shell with its last words stays after it."""
    kept = {name: value for name, value in environ.items() if name in KEPT or name.startswith(("LORASMITH_", "LC_"))}
    assignments = [part for name, value in {**kept, CONTINUE: "1"}.items() for part in ("-e", f"{name}={value}")]
    shell = ["sh", "-c", '"$@"; unset LORASMITH_CONTINUE; exec "${SHELL:-/bin/sh}"', "sh"]
    return [
        tmux, "new-session", "-n", "lorasmith", "-c", os.getcwd(), *assignments,
        *shell, sys.executable, "-m", "lorasmith.tui",
    ]  # fmt: skip


def find_tmux() -> str:
    """Return the path of tmux, "" where it is not installed."""
    return shutil.which("tmux") or ""


def go_to_tmux() -> NoReturn:
    """Become tmux with the wizard in it; the terminal must be as a shell has it. Raises OSError where that fails."""
    # Python ignores it, and programs inherit that; a shell in the new session would miss it.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    tmux = find_tmux()
    os.execv(tmux, tmux_command(os.environ, tmux))  # noqa: S606  (a fixed program, without a shell)
