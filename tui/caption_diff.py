"""What an edit changes in a caption, as two lines that fit a row: before and after, words that differ marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from lorasmith.tui.text import safe_str
from lorasmith.tui.widgets.line import Part, glyphs

KEPT_BEFORE = 18
"""Characters of the unchanged beginning that are shown before the first difference where a row is too short."""


def diff_parts(before: str, after: str, width: int) -> tuple[list[Part], list[Part]]:
    """Return both captions as parts for rows of `width` cells, moved so that the first difference can be seen."""
    old, new = _words(safe_str(before)), _words(safe_str(after))
    removed: list[Part] = []
    added: list[Part] = []
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        same = kind == "equal"
        removed.append(("".join(old[a:b]), "" if same else "critical"))
        added.append(("".join(new[c:d]), "" if same else "good"))
    begin = len(removed[0][0]) if removed and not removed[0][1] else 0
    return _window(removed, begin, width), _window(added, begin, width)


def _words(text: str) -> list[str]:
    return re.findall(r"\s+|,|[^\s,]+", text)


def _window(parts: Sequence[Part], begin: int, width: int) -> list[Part]:
    length = sum(len(text) for text, _ in parts)
    cut = begin - KEPT_BEFORE
    if length <= width or cut <= 0 or not parts:
        return list(parts)
    text, role = parts[0]
    return [(glyphs().ellipsis, "dim"), (text[cut:], role), *parts[1:]]
