"""Copying text where the user can paste it: through tmux where there is one, else by the terminal's own OSC 52."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

from lorasmith.tui.text import safe_str


def copy_text(app: Any, text: str, file: str) -> str:
    """Copy `text` and return a sentence for the user that names the file where it also is.

    Inside tmux a bare OSC 52 does nothing with the default settings, `load-buffer -w` always works.
    """
    tmux = shutil.which("tmux") if os.environ.get("TMUX") else None
    if tmux is not None:
        try:
            subprocess.run(  # noqa: S603
                [tmux, "load-buffer", "-w", "-"], input=text.encode(), check=True, timeout=2, capture_output=True
            )
            return safe_str(f"Copied through tmux. The run file: {file}")
        except (OSError, subprocess.SubprocessError):
            pass
    app.copy_to_clipboard(text)
    return safe_str(f"Copied, if your terminal allows it. The run file: {file}")
