"""Turns a loss curve into rows of characters: plain numbers in, plain strings out, no textual.

Every dot column shows the smallest to the largest value of the steps that fall on it, so that a spike is never lost,
and neighbours are joined. Losses that are not finite are gaps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from lorasmith.tui.glyphs import BRAILLE, Dots, GlyphSet
from lorasmith.tui.state import Curve, Floats

Layer = Literal["axis", "raw", "smooth", "mark", "point"]
LAYERS: tuple[Layer, ...] = get_args(Layer)
Row = list[tuple[str, Layer]]

SMOOTHINGS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
WINDOWS = (0, 2000, 500, 100)


@dataclass(frozen=True)
class PlotView:
    """How the user wants to see the curve: `window` is the number of last steps, 0 for all."""

    log_y: bool = False
    smoothing: float = 0.9
    window: int = 0
    glyphs: GlyphSet = BRAILLE


class Smoother:
    """Exponential moving average that only computes what is new: the first values are corrected for their small count.

    A gap keeps the average as it is and stays a gap.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._weight = -1.0
        self._source: Floats = np.empty(0)
        self._means = Curve()
        self._mean = 0.0
        self._share = 1.0

    def smooth(self, curve: Curve, weight: float) -> Floats:
        """Return the average for each value of `curve`; `weight` 0 is the curve itself."""
        values = curve.values
        if weight <= 0.0:
            return values
        known = len(self._means)
        if weight != self._weight or known > len(values) or not _same(self._source, values[:known]):
            self._weight, self._means, self._mean, self._share, known = weight, Curve(), 0.0, 1.0, 0
        if known < len(values):
            self._means = self._means.put(len(values), [self._next(value) for value in values[known:].tolist()])
        self._source = values
        return self._means.values

    def _next(self, value: float) -> float:
        if not math.isfinite(value):
            return math.nan
        self._mean = self._weight * self._mean + (1.0 - self._weight) * value
        self._share *= self._weight
        return self._mean / (1.0 - self._share)


def _same(known: Floats, now: Floats) -> bool:
    if len(known) != len(now):
        return False
    # Curves grow by sharing their buffer, so the address nearly always answers; a moved buffer is compared.
    return bool(len(now) == 0 or known.ctypes.data == now.ctypes.data or np.array_equal(known, now, equal_nan=True))


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low or most < 1:
        return []
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [number * step for number in range(first, last + 1)]
    return []


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` numbers 1, 2, 5 times powers of ten between `low` and `high`, both above zero."""
    if not (0 < low < high < math.inf) or most < 1:
        return []
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(ticks) <= most:
            return ticks
    return ticks[:: -(-len(ticks) // most)]


def short_number(value: float, step: float = 0.0) -> str:
    """Return `value` with as many decimals as a tick distance of `step` needs, or three digits where `step` is 0."""
    if not math.isfinite(value):
        return "-"
    if value and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if step <= 0:
        return f"{value:.3g}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def step_number(value: float) -> str:
    """Return a step count in few characters: 950, 1.5k, 20k, 1.2M."""
    for unit, size in (("M", 1e6), ("k", 1e4 if value < 1e5 and value % 1000 else 1e3)):
        if value >= size:
            return f"{value / (1e6 if unit == 'M' else 1e3):g}{unit}"
    return f"{value:g}"


@dataclass(frozen=True)
class Marks:
    """What is drawn beside the curve: a cross on the axis at each of the `steps`, a diamond at each (step, value)."""

    steps: Sequence[int] = ()
    points: Sequence[tuple[int, float]] = ()


NO_MARKS = Marks()


def draw_plot(
    curve: Curve, smoothed: Floats, width: int, height: int, view: PlotView, marks: Marks = NO_MARKS
) -> list[Row]:
    """Return `height` rows of `width` cells: the curve, its average over it, the y axis left, the steps below.

    Over both are those of the `marks` that are in sight.
    """
    window = min(view.window or len(curve), len(curve))
    start = len(curve) - window
    raw, average = _scaled(curve.values[start:], view.log_y), _scaled(smoothed[start:], view.log_y)
    points = [(step - start - 1, value) for step, value in marks.points if start < step <= len(curve)]
    heights = _scaled(np.array([value for _, value in points]), view.log_y)
    bounds = _bounds(np.append(raw if view.smoothing < 1 else average, heights))
    inner_height = height - 2
    if bounds is None or inner_height < 1 or width < 16:
        return [[(" " * width, "axis")] for _ in range(height)]
    ticks = _y_ticks(bounds, inner_height, view.log_y)
    margin = max((len(label) for label in ticks.values()), default=1)
    columns = width - margin - 1
    drawn = [_raster(series, columns, inner_height, bounds, view.glyphs) for series in (raw, average)]
    over = _point_cells([at for at, _ in points], heights, window, (columns, inner_height), bounds)
    rows: list[Row] = []
    for y in range(inner_height):
        label = ticks.get(y, "")
        edge = view.glyphs.vertical
        cells = _with_points(_merge(drawn[0][y], drawn[1][y]), over.get(y, set()), view.glyphs)
        rows.append([(f"{label:>{margin}}{edge}", "axis"), *cells])
    axis, labels = _x_axis(start + 1, window, margin, columns, view.glyphs)
    return [*rows, _marked_axis(axis, [step - start - 1 for step in marks.steps], window, margin, view.glyphs), labels]


def _point_cells(
    positions: Sequence[int], heights: Floats, count: int, size: tuple[int, int], bounds: tuple[float, float]
) -> dict[int, set[int]]:
    """Return the columns of each row that a point falls on; `size` is (columns, rows)."""
    (columns, rows), (low, high) = size, bounds
    cells: dict[int, set[int]] = {}
    for position, value in zip(positions, heights.tolist(), strict=True):
        if math.isfinite(value):
            row = min(rows - 1, int((high - value) / (high - low) * rows))
            cells.setdefault(row, set()).add(round(position / max(1, count - 1) * (columns - 1)))
    return cells


def _with_points(row: Row, columns: set[int], glyphs: GlyphSet) -> Row:
    """Lay a diamond over these columns of a row."""
    if not columns:
        return row
    cells = [(mark, layer) for text, layer in row for mark in text]
    for column in columns:
        cells[column] = (glyphs.diamond, "point")
    return [("".join(m for m, _ in run), layer) for layer, run in itertools.groupby(cells, key=lambda cell: cell[1])]


def _marked_axis(axis: Row, positions: Sequence[int], count: int, margin: int, glyphs: GlyphSet) -> Row:
    """Return the axis with crosses at these positions of `count`, in runs of one layer."""
    text = axis[0][0]
    columns = len(text) - margin - 1
    at = sorted({margin + 1 + round(p / max(1, count - 1) * (columns - 1)) for p in positions if 0 <= p < count})
    row: Row = []
    begin = 0
    for column in at:
        row += [(text[begin:column], "axis"), (glyphs.cross, "mark")]
        begin = column + 1
    return [*row, (text[begin:], "axis")]


def _scaled(values: Floats, log_y: bool) -> Floats:
    """Return the values as they are drawn, NaN where they cannot be."""
    finite = np.isfinite(values) & ((values > 0) if log_y else True)
    clean = np.where(finite, values, np.nan)
    return np.log10(clean) if log_y else clean


def _bounds(values: Floats) -> tuple[float, float] | None:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = float(finite.min()), float(finite.max())
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _y_ticks(bounds: tuple[float, float], height: int, log_y: bool) -> dict[int, str]:
    """Return {row: label}."""
    low, high = bounds
    most = max(2, height // 3)
    if log_y:
        ticks = log_ticks(10.0**low, 10.0**high, most)
        labels = {math.log10(tick): short_number(tick) for tick in ticks}
    else:
        ticks = [tick for tick in nice_ticks(low, high, most) if tick > -1e-12 or low < -1e-3]
        step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.0
        labels = {tick: short_number(tick, step) for tick in ticks}
    return {min(height - 1, int((high - at) / (high - low) * height)): label for at, label in labels.items()}


def _raster(values: Floats, columns: int, rows: int, bounds: tuple[float, float], glyphs: GlyphSet) -> list[str]:
    wide, high = columns * glyphs.dots_wide, rows * glyphs.dots_high
    low, top = _column_ranges(values, wide)
    known = np.isfinite(low)
    scale = (high - 1) / (bounds[1] - bounds[0])
    # Row 0 is the top of the picture.
    upper = np.rint((bounds[1] - np.where(known, top, bounds[0])) * scale)
    lower = np.rint((bounds[1] - np.where(known, low, bounds[0])) * scale)
    y = np.arange(high)[:, None]
    dots: Dots = (y >= upper) & (y <= lower) & known
    return glyphs.draw(dots)


def _column_ranges(values: Floats, columns: int) -> tuple[Floats, Floats]:
    """Return the smallest and the largest value on each dot column, joined to its neighbours; NaN where none is."""
    count = len(values)
    if count == 1:
        values, count = np.repeat(values, 2), 2
    position = np.arange(count) * ((columns - 1) / (count - 1))
    edges = np.interp(np.arange(columns + 1) - 0.5, position, values, left=np.nan, right=np.nan)
    low, high = np.fmin(edges[:-1], edges[1:]), np.fmax(edges[:-1], edges[1:])
    column = np.rint(position).astype(np.intp)
    occupied, first = np.unique(column, return_index=True)
    low[occupied] = np.fmin(low[occupied], np.fmin.reduceat(values, first))
    high[occupied] = np.fmax(high[occupied], np.fmax.reduceat(values, first))
    return low, high


def _merge(raw: str, smooth: str) -> Row:
    """Lay the average over the raw curve: where it has dots, it takes the whole cell and so stays readable."""
    row: Row = []
    begin = 0
    over = [mark != " " for mark in smooth]
    for at in range(1, len(over) + 1):
        if at == len(over) or over[at] != over[begin]:
            row.append((smooth[begin:at], "smooth") if over[begin] else (raw[begin:at], "raw"))
            begin = at
    return row


def _x_axis(first_step: int, count: int, margin: int, columns: int, glyphs: GlyphSet) -> list[Row]:
    line = [glyphs.horizontal] * columns
    labels = [" "] * columns
    free = 0
    last_step = first_step + count - 1
    ticks = [tick for tick in nice_ticks(first_step - 1, last_step, max(1, columns // 10)) if tick >= first_step]
    for tick in ticks:
        at = round((tick - first_step) / max(1, count - 1) * (columns - 1))
        text = step_number(tick)
        begin = min(max(0, at - len(text) // 2), columns - len(text))
        if begin < free:
            continue
        line[at] = glyphs.tick
        labels[begin : begin + len(text)] = text
        free = begin + len(text) + 1
    return [
        [(" " * margin + glyphs.corner + "".join(line), "axis")],
        [(" " * (margin + 1) + "".join(labels), "axis")],
    ]
