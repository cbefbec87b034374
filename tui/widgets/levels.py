"""The held-out loss by noise level as rows of bars: plain numbers in, plain strings out, no textual."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorasmith.engine.events import Validated
from lorasmith.tui.glyphs import GlyphSet
from lorasmith.tui.widgets.line import Part
from lorasmith.tui.widgets.plot import short_number

WAITING = "Held-out losses appear here once the run validates (validation.every)."
_LABEL = 6
_NUMBER = 9
_CHANGE = 7


def level_title(validations: Sequence[Validated]) -> list[Part]:
    """Return the row above the bars: of which step they are, and since which step the change counts."""
    title: list[Part] = [("Held-out loss by noise", "strong")]
    if validations:
        since = f", change since step {validations[0].step}" if len(validations) > 1 else ""
        title.append((f"  step {validations[-1].step}{since}", "dim"))
    return title


def level_rows(validations: Sequence[Validated], width: int, height: int, glyphs: GlyphSet) -> list[list[Part]]:
    """Return at most `height` rows: the newest validation, a bar, number and change for each level, the mean last.

    Where there is no room for all levels, the last row but one says how many are left out.
    """
    if not validations:
        return [[(f"{WAITING:^{width}}", "dim")]]
    first, last = validations[0], validations[-1]
    # A resumed run of other settings may have other levels.
    before = first.losses if first.levels == last.levels and len(validations) > 1 else [math.nan] * len(last.losses)
    top = max((loss for loss in (*last.losses, *before) if math.isfinite(loss)), default=0.0)
    rows = [
        _row(f"{level:.0%}", loss, old, top, width, glyphs)
        for level, loss, old in zip(last.levels, last.losses, before, strict=True)
    ]
    room = max(0, height - 1)
    if len(rows) > room:
        rows, hidden = rows[: max(0, room - 1)], len(rows) - max(0, room - 1)
        rows.append([(f"{glyphs.ellipsis} and {hidden} more levels", "dim")])
    return [*rows, _row("mean", last.mean, sum(before) / len(before), top, width, glyphs)][:height]


def _row(label: str, loss: float, old: float, top: float, width: int, glyphs: GlyphSet) -> list[Part]:
    room = max(0, width - _LABEL - _NUMBER - _CHANGE)
    full = round(room * loss / top) if top > 0 and math.isfinite(loss) else 0
    full = min(room, full)
    change = f"{(loss / old - 1):+.0%}" if old > 0 and math.isfinite(loss) else ""
    return [
        (f"{label:>{_LABEL - 1}} ", "dim"),
        (glyphs.bar_full * full, "bar"),
        (glyphs.bar_empty * (room - full), "dim"),
        (f"{short_number(loss):>{_NUMBER}}", "strong"),
        (f"{change:>{_CHANGE}}", ""),
    ]
