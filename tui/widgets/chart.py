"""The live loss chart: the raw curve dim, its average bright, drawn in braille, half blocks or ASCII."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from rich.segment import Segment
from textual.strip import Strip

from lorasmith.engine.events import Validated
from lorasmith.tui.state import Curve
from lorasmith.tui.widgets.levels import level_rows, level_title
from lorasmith.tui.widgets.line import Painted, Part, glyphs
from lorasmith.tui.widgets.plot import LAYERS, SMOOTHINGS, WINDOWS, Marks, PlotView, Smoother, draw_plot, short_number


class LossChart(Painted, can_focus=True):
    """One curve over the steps; `show` gives it the newest, and it repaints only if that or the view changed.

    The mean losses of held-out pictures are diamonds over it; `toggle_levels` shows them by noise level instead.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "chart--axis",
        "chart--raw",
        "chart--smooth",
        "chart--mark",
        "chart--point",
        "painted--smooth",
        "painted--point",
    }
    DEFAULT_CSS = """
    LossChart {
        height: 1fr; width: 1fr;
        & > .chart--axis { color: $foreground 60%; }
        & > .chart--raw { color: $foreground 45%; }
        & > .chart--mark { color: $text-error; text-style: bold; }
        & > .chart--smooth, & > .painted--smooth { color: $accent; text-style: bold; }
        & > .chart--point, & > .painted--point { color: $text-success; text-style: bold; }
    }
    """

    def __init__(self, *, id: str | None = None) -> None:
        """Start without a curve."""
        super().__init__(id=id)
        self.view = PlotView(glyphs=glyphs())
        self.waiting = "The loss appears here after the first steps."
        self._curve = Curve()
        self._marked: tuple[int, ...] = ()
        self._validations: tuple[Validated, ...] = ()
        self.by_level = False
        self._smoother = Smoother()
        self._strips: list[Strip] | None = None

    def show(self, curve: Curve, marked: tuple[int, ...] = (), validations: tuple[Validated, ...] = ()) -> None:
        """Show `curve`, with a mark on the axis at each of the `marked` steps: those that were not finite."""
        if curve is not self._curve or marked != self._marked or validations is not self._validations:
            self._curve, self._marked, self._validations = curve, marked, validations
            self._repaint()

    def toggle_levels(self) -> None:
        """Show the held-out losses by noise level, or the curve again."""
        self.by_level = not self.by_level
        self._repaint()

    def change_view(self, **changes: object) -> None:
        """Show the same curve in another way: fields of PlotView."""
        self.view = dataclasses.replace(self.view, **changes)  # type: ignore[arg-type]
        self._repaint()

    def toggle_log(self) -> None:
        """Switch between a linear and a logarithmic y axis."""
        self.change_view(log_y=not self.view.log_y)

    def smooth_more(self, direction: int) -> None:
        """Go up or down the list of smoothings."""
        at = SMOOTHINGS.index(self.view.smoothing) + direction
        self.change_view(smoothing=SMOOTHINGS[max(0, min(at, len(SMOOTHINGS) - 1))])

    def next_window(self) -> None:
        """Show the whole run, then its last steps, fewer each time, then the whole again."""
        self.change_view(window=WINDOWS[(WINDOWS.index(self.view.window) + 1) % len(WINDOWS)])

    def title(self) -> list[Part]:
        """Return the row above the plot: what the two curves are and how they are shown."""
        view = self.view
        parts: list[Part] = [("Loss", "strong")]
        if self._validations:
            parts.append((f"  {view.glyphs.diamond} held out {short_number(self._validations[-1].mean)}", "point"))
        parts.append(("  raw", "dim"))
        if view.smoothing:
            parts.append((f"  smoothed {view.smoothing:g}", "smooth"))
        scale = "log y" if view.log_y else "linear y"
        parts.append((f"  {scale}  " + (f"last {view.window}" if view.window else "all steps"), "dim"))
        if self._marked:
            parts.append((f"  {view.glyphs.cross} not finite", "critical"))
        return parts

    def notify_style_update(self) -> None:
        """Draw anew in the new theme."""
        super().notify_style_update()
        self._strips = None

    def on_resize(self) -> None:
        """Draw anew in the new size."""
        self._repaint()

    def _repaint(self) -> None:
        self._strips = None
        self.refresh()

    def _draw_levels(self, width: int, height: int) -> list[Strip]:
        rows = level_rows(self._validations, width, height - 1, self.view.glyphs)
        return [self.paint(row, width) for row in (level_title(self._validations), *rows)]

    def _draw(self, width: int, height: int) -> list[Strip]:
        if self.by_level:
            return self._draw_levels(width, height)
        strips = [self.paint(self.title(), width)]
        if not len(self._curve):
            blank = Strip.blank(width, self.rich_style)
            middle = self.paint([(f"{self.waiting:^{width}}", "dim")], width)
            return strips + [middle if y == height // 2 else blank for y in range(1, height)]
        smoothed = self._smoother.smooth(self._curve, self.view.smoothing)
        marks = Marks(self._marked, [(item.step, item.mean) for item in self._validations])
        rows = draw_plot(self._curve, smoothed, width, height - 1, self.view, marks)
        styles = {layer: self.get_component_rich_style(f"chart--{layer}") for layer in LAYERS}
        return strips + [Strip([Segment(text, styles[layer]) for text, layer in row], width) for row in rows]

    def render_line(self, y: int) -> Strip:
        """Return row `y`, drawn once for all rows."""
        width, height = self.size
        if self._strips is None:
            self._strips = self._draw(width, height)
        return self._strips[y] if y < len(self._strips) else Strip.blank(width, self.rich_style)

    def smoothed_loss(self) -> str:
        """Return the newest average in three digits, "-" where there is none."""
        smoothed = self._smoother.smooth(self._curve, self.view.smoothing)
        return short_number(float(smoothed[-1])) if len(smoothed) else "-"
