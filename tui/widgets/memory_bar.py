"""The forecast of a run's GPU memory as a segmented bar with its legend and a verdict; each segment has its pattern."""

from __future__ import annotations

from collections.abc import Sequence

from textual.strip import Strip

from lorasmith.tui.glyphs import GlyphSet
from lorasmith.tui.memory_view import MemoryView
from lorasmith.tui.widgets.line import Drawn, Part, glyphs

VERDICT_WORDS = {"fits": "FITS", "tight": "TIGHT", "no": "DOES NOT FIT"}
_VERDICT_ROLES = {"fits": "good", "tight": "high", "no": "critical"}
_ROLES = ("bar", "good", "high", "strong", "dim", "bar")
_SHADES = "█▓▒░·×"
_LETTERS = "WLOArx"
_INDENT = " " * len("VRAM ")


def bar_rows(view: MemoryView, width: int, marks: GlyphSet) -> list[list[Part]]:
    """Return the bar with its figures, and the legend in as many rows as it needs, made for `width` cells."""
    if not view.segments:
        return [[("VRAM ", "strong"), (view.note, "dim")]]
    patterns = _SHADES if marks.half_blocks else _LETTERS
    words = f" {view.peak_gib:.1f}"
    words += f" of {view.free_gib:.1f} GiB free " if view.free_gib is not None else " GiB "
    verdict = VERDICT_WORDS.get(view.verdict, "")
    room = max(8, width - len("VRAM ") - len(words) - len(verdict) - 1)
    bar = _bar(view, room, patterns, marks)
    first = [("VRAM ", "strong"), *bar, (words, ""), (verdict, _VERDICT_ROLES.get(view.verdict, ""))]
    return [first, *_legend(view, width, patterns)]


def _legend(view: MemoryView, width: int, patterns: str) -> list[list[Part]]:
    rows: list[list[Part]] = []
    room = 0
    for index, (name, gib) in enumerate(view.segments):
        words = f" {name} {gib:.1f}  "
        if not rows or len(words) + 1 > room:
            rows.append([(_INDENT, "")])
            room = width - len(_INDENT)
        rows[-1] += [(patterns[index], _ROLES[index]), (words, "")]
        room -= len(words) + 1
    return rows


def _bar(view: MemoryView, room: int, patterns: str, marks: GlyphSet) -> list[Part]:
    """Return the cells: every segment at least one, what is free after them, and a mark where the card ends."""
    total = max(view.peak_gib, view.free_gib or 0.0)
    parts: list[Part] = []
    used, at = 0.0, 0
    for index, (_, gib) in enumerate(view.segments):
        used += gib
        end = min(room, max(at + 1, round(room * used / total)))
        parts.append((patterns[index] * (end - at), _ROLES[index]))
        at = end
    parts.append((marks.bar_empty * (room - at), "dim"))
    if view.free_gib is None or view.peak_gib <= view.free_gib:
        return parts
    return _marked(parts, min(room - 1, round(room * view.free_gib / total)), marks.vertical)


def _marked(parts: Sequence[Part], place: int, mark: str) -> list[Part]:
    """Put `mark` over the cell at `place`."""
    marked: list[Part] = []
    at = 0
    for text, role in parts:
        inside = place - at
        if 0 <= inside < len(text):
            marked += [(text[:inside], role), (mark, "critical"), (text[inside + 1 :], role)]
        else:
            marked.append((text, role))
        at += len(text)
    return marked


class MemoryBar(Drawn):
    """The bar and its legend, drawn again only when the forecast or the width changed."""

    DEFAULT_CSS = "MemoryBar { height: 2; width: 1fr; }"

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        """Start without a forecast."""
        super().__init__(id=id, classes=classes)
        self._view = MemoryView()

    def show(self, view: MemoryView) -> None:
        """Show `view`."""
        if view != self._view:
            self._view = view
            self._fit_rows()

    def on_resize(self) -> None:
        """Draw for the new width."""
        self._fit_rows()

    def _fit_rows(self) -> None:
        self.styles.height = len(bar_rows(self._view, self.size.width or 80, glyphs()))
        self.draw_anew()

    def draw(self) -> list[Strip]:
        """Return the rows."""
        width = self.size.width
        return [self.paint(row, width) for row in bar_rows(self._view, width, glyphs())]
