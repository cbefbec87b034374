"""One measured value as a row: name, bar, value and unit of a total, percent, and a word for how it stands."""

from __future__ import annotations

from dataclasses import dataclass

from textual.strip import Strip

from lorasmith.engine.events import HardwareSampled
from lorasmith.tui.glyphs import GlyphSet
from lorasmith.tui.widgets.line import Painted, Part, glyphs

LONGEST_WORD = len("CRITICAL")


@dataclass(frozen=True)
class Reading:
    """What a gauge shows: `value` None is "not known", with `note` saying why; `word` is OK, HIGH, CRITICAL or ""."""

    name: str
    value: float | None
    total: float | None
    unit: str
    high: float
    critical: float
    note: str = ""
    decimals: int = 1
    limits_are_percent: bool = True

    @property
    def percent(self) -> float | None:
        """Share of the total in percent, where both are known."""
        if self.value is None or not self.total:
            return None
        return 100.0 * self.value / self.total

    @property
    def word(self) -> str:
        """How the value stands to its limits."""
        judged = self.percent if self.limits_are_percent else self.value
        if judged is None:
            return ""
        return "CRITICAL" if judged >= self.critical else "HIGH" if judged >= self.high else "OK"


def hardware_readings(sample: HardwareSampled | None) -> list[Reading]:
    """Return the four gauges of the monitor: VRAM, RAM, GPU load and GPU temperature."""
    never = float("inf")
    if sample is None:
        note = "not measured yet"
        return [
            Reading("VRAM", None, None, "GiB", 90, 97, note),
            Reading("RAM", None, None, "GiB", 85, 95, note),
            Reading("GPU", None, None, "%", never, never, note),
            Reading("Temp", None, None, "°C", 80, 90, note),
        ]
    # Without a GPU one gauge says why; the reason's details, in brackets, are on the hardware page.
    missing = sample.note.split(" (")[0] or "not reported"
    also = "-" if sample.note and sample.vram_used_gib is None else missing
    load, heat = sample.gpu_utilization_percent, sample.temperature_c
    return [
        Reading("VRAM", sample.vram_used_gib, sample.vram_total_gib, "GiB", 90, 97, missing),
        Reading("RAM", sample.ram_used_gib, sample.ram_total_gib, "GiB", 85, 95, missing),
        Reading("GPU", load, 100.0, "%", never, never, also, decimals=0),
        Reading("Temp", heat, 100.0, "°C", 80, 90, also, decimals=0, limits_are_percent=False),
    ]


def gauge_parts(reading: Reading, width: int, marks: GlyphSet) -> list[Part]:
    """Return the row of `reading`, made for `width` cells: the bar takes what the words leave, and goes first."""
    name = f"{reading.name:<5}"
    if reading.value is None:
        return [(name, "strong"), (reading.note, "dim")]
    value, percent = _words(reading, reading.value)
    word = reading.word if reading.high != float("inf") else ""
    words = f"{value:<13}{percent:>6} " if width >= 34 else f"{value:<13} "
    room = min(30, width - len(name) - len(words) - 1 - LONGEST_WORD)
    parts: list[Part] = [(name, "strong")]
    if room >= 4:
        full = round(room * min(100.0, reading.percent or 0.0) / 100.0)
        parts += [(marks.bar_full * full, "bar"), (marks.bar_empty * (room - full), "dim"), (" ", "")]
    role = {"HIGH": "high", "CRITICAL": "critical"}.get(word, "good")
    return [*parts, (words, ""), (word, role)]


def _words(reading: Reading, value: float) -> tuple[str, str]:
    """Return value, unit and total, and the percent of the total."""
    if reading.percent is None or not reading.limits_are_percent:
        return f"{value:.{reading.decimals}f} {reading.unit}", ""
    if reading.unit == "%":
        return "load", f"{value:.0f} %"
    decimals = 0 if reading.total and reading.total >= 100 else reading.decimals
    return f"{value:.{decimals}f}/{reading.total:.{decimals}f} {reading.unit}", f"{reading.percent:.0f} %"


class Gauge(Painted):
    """A one-row gauge that repaints only when its reading changed."""

    DEFAULT_CSS = "Gauge { height: 1; width: 1fr; }"

    def __init__(self, reading: Reading, *, id: str | None = None) -> None:
        """Start with `reading`."""
        super().__init__(id=id)
        self._reading = reading

    def show(self, reading: Reading) -> None:
        """Show `reading`."""
        if reading != self._reading:
            self._reading = reading
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """Return the row."""
        if y > 0:
            return Strip.blank(self.size.width, self.rich_style)
        return self.paint(gauge_parts(self._reading, self.size.width, glyphs()), self.size.width)
