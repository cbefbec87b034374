"""What a run does when it has ended: the user's command, and the bell and the message of the terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Protocol

from lorasmith.engine.errors import ConfigError
from lorasmith.engine.events import RunEnded
from lorasmith.engine.run_log import plain_text

COMMAND_SECONDS = 60.0
OUTPUT_BYTES = 1 << 16
MESSAGE_CHARACTERS = 200

logger = logging.getLogger("lorasmith.on_finish")


class EndedRun(Protocol):
    """The part of `run_folder.RunFolder` that is told to the command."""

    @property
    def path(self) -> Path:
        """The run's own folder."""

    @property
    def export(self) -> Path:
        """Folder of the finished LoRA."""


def run_on_finish(command: str, ended: RunEnded, run: EndedRun) -> str:
    """Run the user's command for the end of a run, at most 60 seconds; return "" or what went wrong, in words.

    No shell; what it prints goes to the log. It finds out about the run by the environment variables that the setting
    `run.on_finish` names; LORASMITH_LORA is empty where no LoRA was written.
    """
    try:
        arguments = split_command(command)
    except ConfigError as error:
        return str(error)
    if not arguments:
        return ""
    # A file, no pipe: whatever the command leaves running must not hold this up by keeping a pipe open.
    with tempfile.TemporaryFile() as output:
        problem = _run(arguments, os.environ | _facts(ended, run), output)
        _log_output(output)
    return problem


def split_command(command: str) -> list[str]:
    """Return a command line as its words; raises ConfigError where a quote is not closed."""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(
            f"run.on_finish is no command line: {plain_text(command)}",
            why=f"{error}.",
            fix="Close every quote, as in on_finish = 'notify-send \"LoRA ready\"'.",
        ) from None


def missing_program(command: str) -> str:
    """Return the program of a command line that is not on this machine, or ""."""
    arguments = split_command(command)
    return arguments[0] if arguments and shutil.which(arguments[0]) is None else ""


def terminal_notice(ended: RunEnded, name: str, environ: Mapping[str, str], *, passthrough: bool = False) -> str:
    """Return what makes a terminal ring and show that the run `name` ended; "" for a terminal that is only a printer.

    The message is OSC 9, which terminals that do not know it leave out. tmux swallows it unless `passthrough` says that
    it is allowed; screen and the Linux console get the bell alone.
    """
    terminal = environ.get("TERM", "dumb")
    if terminal in ("", "dumb", "unknown"):
        return ""
    # The name of the program first: a message that began with `4;` would set a progress bar in some terminals.
    text = plain_text(f"lorasmith: {name} {ended.outcome}. {ended.message}").replace("\n", " ").replace("\t", " ")
    message = f"\x1b]9;{text[:MESSAGE_CHARACTERS]}\x1b\\"
    if environ.get("STY") or terminal == "linux":
        return "\a"
    if environ.get("TMUX"):
        return "\a" + ("\x1bPtmux;" + message.replace("\x1b", "\x1b\x1b") + "\x1b\\" if passthrough else "")
    return "\a" + message


def tmux_passes_through(environ: Mapping[str, str]) -> bool:
    """Ask tmux whether a program in it may talk to the terminal outside; False without tmux. Takes up to a second."""
    tmux = shutil.which("tmux")
    if not environ.get("TMUX") or tmux is None:
        return False
    try:
        asked = subprocess.run(  # noqa: S603  (a fixed command)
            [tmux, "show-options", "-Apqv", "allow-passthrough"],
            capture_output=True, stdin=subprocess.DEVNULL, timeout=1.0, check=False, env=dict(environ),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return False
    return asked.stdout.strip() in (b"on", b"all")


def _facts(ended: RunEnded, run: EndedRun) -> dict[str, str]:
    lora = max(run.export.glob("*.safetensors"), default=None) if ended.outcome == "finished" else None
    facts = {
        "LORASMITH_OUTCOME": ended.outcome,
        "LORASMITH_RUN": str(run.path),
        "LORASMITH_STEP": str(ended.step),
        "LORASMITH_MESSAGE": plain_text(ended.message),
        "LORASMITH_LORA": str(lora or ""),
    }
    return {name: value.replace("\0", "") for name, value in facts.items()}


def _run(arguments: list[str], environ: Mapping[str, str], output: IO[bytes]) -> str:
    try:
        # A session of its own: Ctrl-C on the terminal is meant for the training, and a timeout ends all it started.
        process = subprocess.Popen(  # noqa: S603  (the user's own command, without a shell)
            arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, start_new_session=True
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return f"run.on_finish could not be started: {plain_text(arguments[0])}: {reason}."
    try:
        code = process.wait(COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"run.on_finish did not end within {COMMAND_SECONDS:.0f} s and was ended: {plain_text(arguments[0])}."
    if code:
        how = f"ended with code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
        return f"run.on_finish {how}: {plain_text(arguments[0])}."
    return ""


def _log_output(output: IO[bytes]) -> None:
    size = output.seek(0, os.SEEK_END)
    output.seek(0)
    text = output.read(OUTPUT_BYTES).decode("utf-8", "backslashreplace").strip()
    if text:
        logger.info("run.on_finish printed:\n%s", text)
    if size > OUTPUT_BYTES:
        logger.info("[%d more bytes were left out]", size - OUTPUT_BYTES)
