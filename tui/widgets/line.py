"""A one-row widget for text that changes often: it repaints only when its text changed, and never asks for a layout.

`Static.update` lays out the whole screen by default (6 ms); this costs 1.6 ms, which training would otherwise pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

from lorasmith.tui.glyphs import GlyphSet, detect_glyphs
from lorasmith.tui.text import safe_str

Part = tuple[str, str]
"""Text and its role: "" or one of ROLES."""
ROLES = ("dim", "strong", "good", "high", "critical", "bar")


@lru_cache(maxsize=1)
def glyphs() -> GlyphSet:
    """Return the characters that this process's terminal can draw."""
    return detect_glyphs()


class Painted(Widget):
    """A widget that draws styled parts by the line API; a part's text is made harmless before it is drawn."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {f"painted--{role}" for role in ROLES}
    DEFAULT_CSS = """
    Painted {
        & > .painted--dim { color: $foreground 60%; }
        & > .painted--strong { text-style: bold; }
        & > .painted--good { color: $text-success; }
        & > .painted--high { color: $text-warning; text-style: bold; }
        & > .painted--critical { color: $text-error; text-style: bold; }
        & > .painted--bar { color: $primary; }
    }
    """

    def role_style(self, role: str) -> Style:
        """Return the style of `role` in the present theme; looking one up costs 0.1 ms, so they are remembered."""
        if not role:
            return self.rich_style
        remembered: dict[tuple[str, str], Style] = self.__dict__.setdefault("_role_styles", {})
        key = (self.app.theme, role)
        if key not in remembered:
            remembered[key] = self.get_component_rich_style(f"painted--{role}")
        return remembered[key]

    def paint(self, parts: Sequence[Part], width: int) -> Strip:
        """Return `parts` as one row of exactly `width` cells, with an ellipsis where they do not fit."""
        plain = self.rich_style
        strip = Strip(
            [Segment(safe_str(text), self.role_style(role) if role else plain) for text, role in parts if text]
        )
        if strip.cell_length > width > 0:
            strip = Strip([*strip.crop(0, width - 1), Segment(glyphs().ellipsis, plain)])
        return strip.adjust_cell_length(width, plain)


class Drawn(Painted):
    """A painted widget that draws all of its rows at once, and keeps them until `draw_anew` or another theme."""

    _strips: list[Strip] | None = None

    def draw(self) -> list[Strip]:
        """Return the rows; those that are missing at the end are blank."""
        raise NotImplementedError

    def draw_anew(self) -> None:
        """Draw again, since something changed."""
        self._strips = None
        self.refresh()

    def notify_style_update(self) -> None:
        """Draw anew in the new theme."""
        super().notify_style_update()
        self._strips = None

    def render_line(self, y: int) -> Strip:
        """Return row `y`, drawn once for all rows."""
        if self._strips is None:
            self._strips = self.draw()
        return self._strips[y] if y < len(self._strips) else Strip.blank(self.size.width, self.rich_style)


class Line(Painted):
    """One row of text parts; `show` replaces it, right-aligned parts come after a gap that fills the row."""

    DEFAULT_CSS = "Line { height: 1; width: 1fr; }"

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        """Start empty."""
        super().__init__(id=id, classes=classes)
        self._left: tuple[Part, ...] = ()
        self._right: tuple[Part, ...] = ()

    def show(self, left: Sequence[Part], right: Sequence[Part] = ()) -> None:
        """Show these parts; nothing is repainted where they are what is shown."""
        if (tuple(left), tuple(right)) == (self._left, self._right):
            return
        self._left, self._right = tuple(left), tuple(right)
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """Return the row."""
        width = self.size.width
        if y > 0:
            return Strip.blank(width, self.rich_style)
        right = sum(len(safe_str(text)) for text, _ in self._right)
        if not right or right + 1 >= width:
            return self.paint(self._left, width)
        left = self.paint(self._left, width - right - 1)
        return Strip.join([left, Strip.blank(1, self.rich_style), self.paint(self._right, right)])
