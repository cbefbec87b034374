"""A regular expression tried in another process first: some take years on one caption, and the screen with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from lorasmith.engine.errors import ConfigError

SECONDS = 3.0
"""How long all captions together may take; ten thousand ordinary ones take a tenth of a second."""
_CODE = """
import json, re, sys
old, new, texts = json.load(sys.stdin)
for text in texts:
    re.sub(old, new, text)
"""


def require_quick(old: str, new: str, texts: Sequence[str], seconds: float = SECONDS) -> None:
    """Raise ConfigError where replacing `old` by `new` in the texts takes longer than `seconds`.

    An expression that is wrong passes: whoever uses it then says what is wrong with it. Python's `re` cannot be
    interrupted and holds the interpreter while it searches.
    """
    command = [sys.executable, "-I", "-S", "-c", _CODE]
    data = json.dumps([old, new, list(texts)]).encode()
    try:
        subprocess.run(command, input=data, capture_output=True, timeout=seconds)  # noqa: S603  (fixed command)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"The expression {old} takes too long.",
            why="Repeats inside repeats, as in (a+)+, try endlessly many ways to match.",
            fix="Write it with one repeat less, or replace plain text.",
        ) from None
