"""tmux around the wizard: its version, and those of its settings that the wizard is felt to depend on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Final

from lorasmith.engine.doctor.check import Check

OLDEST: Final = (3, 2)
"""From here on a client's true color is known by `terminal-features`, and text is copied by `load-buffer -w`."""
SLOW_ESCAPE_MS: Final = 50
SHOWN: Final = ("escape-time", "default-terminal", "set-clipboard", "extended-keys", "allow-passthrough", "mouse")
ANSWER_SECONDS: Final = 2.0


def check_tmux() -> Check:
    """Inside tmux: no delay of the Escape key, as many colors as the terminal has, and a way to copy."""
    if not os.environ.get("TMUX"):
        if os.environ.get("STY"):
            meaning = "GNU screen shows 256 colors at most and copies nothing to your clipboard; tmux does both."
            return Check("tmux", "warn", "inside GNU screen", "tmux new lorasmith", meaning)
        return Check("tmux", "skip", "not inside tmux")
    tmux = shutil.which("tmux")
    if tmux is None:
        return Check("tmux", "skip", "inside tmux, whose command is not on this machine")
    version = _ask(tmux, "-V").removeprefix("tmux ") or "of unknown version"
    settings = {name: _ask(tmux, "show", "-gqv", name) for name in SHOWN}
    features = _ask(tmux, "display", "-p", "#{client_termfeatures}")
    told = ", ".join(f"{name} {value}" for name, value in settings.items() if value)
    detail = f"{version}: {told}"
    wishes = _wishes(version, settings, features)
    if not wishes:
        return Check("tmux", "pass", detail)
    fix = " \\; ".join(command for command, _ in wishes if command)
    meaning = " ".join(sentence for _, sentence in wishes)
    note = "   # lasts as a line of ~/.tmux.conf"
    return Check("tmux", "warn", detail, f"tmux {fix}{note}" if fix else "Update tmux.", meaning)


def _wishes(version: str, settings: dict[str, str], features: str) -> list[tuple[str, str]]:
    """Return for each setting that hurts the command after `tmux` and the sentence that says what it does."""
    found = []
    number = re.search(r"(\d+)\.(\d+)", version)
    if number and (int(number[1]), int(number[2])) < OLDEST:
        found.append(("", "This tmux is old: copying and true color may not work."))
    delay = settings["escape-time"]
    if delay.isdigit() and int(delay) > SLOW_ESCAPE_MS:
        found.append(("set -s escape-time 10", f"Escape is felt after {delay} ms."))
    terminal = settings["default-terminal"]
    if terminal and "256color" not in terminal and "direct" not in terminal:
        found.append(("set -g default-terminal tmux-256color", "New windows show few colors."))
    # Empty also where nobody is attached, who could not see colors either.
    if features and "RGB" not in features.split(","):
        found.append(("set -as terminal-features ',*:RGB'", "Colors are approximated by 256 of them."))
    if settings["set-clipboard"] == "off":
        found.append(("set -s set-clipboard external", "What is copied stays in tmux."))
    return found


def _ask(tmux: str, *arguments: str) -> str:
    """Return what tmux says to a command; "" where it fails, does not know the setting or does not answer."""
    try:
        done = subprocess.run(  # noqa: S603
            [tmux, *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
