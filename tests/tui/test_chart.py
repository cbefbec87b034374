"""The loss chart as text: what is drawn where, and that nothing is lost on the way."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
import pytest

from lorasmith.engine.events import Validated
from lorasmith.tui.glyphs import ASCII, BLOCK, BRAILLE, GlyphSet, detect_glyphs
from lorasmith.tui.state import Curve
from lorasmith.tui.widgets.levels import level_rows, level_title
from lorasmith.tui.widgets.plot import (
    Marks,
    PlotView,
    Row,
    Smoother,
    draw_plot,
    log_ticks,
    nice_ticks,
    short_number,
    step_number,
)


def text_of(rows: list[Row]) -> list[str]:
    return ["".join(text for text, _ in row) for row in rows]


def draw(values: list[float], width: int = 60, height: int = 12, view: PlotView | None = None) -> list[str]:
    view = view or PlotView(smoothing=0.0)
    curve = Curve(values)
    return text_of(draw_plot(curve, Smoother().smooth(curve, view.smoothing), width, height, view))


def inside(lines: list[str], glyphs: GlyphSet = BRAILLE) -> list[str]:
    """The plot without its axes."""
    return [line[line.index(glyphs.vertical) + 1 :] for line in lines[:-2]]


@pytest.mark.parametrize("glyphs", [BRAILLE, BLOCK, ASCII], ids=lambda glyphs: glyphs.name)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 300, 20_000])
@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(("width", "height"), [(10, 2), (30, 5), (126, 18)])
def test_every_row_has_the_asked_width_at_any_size(
    glyphs: GlyphSet, count: int, log_y: bool, width: int, height: int
) -> None:
    values = [0.1 + 1 / (i + 1) for i in range(count)]
    lines = draw(values, width, height, PlotView(log_y=log_y, glyphs=glyphs))
    assert [len(line) for line in lines] == [width] * height
    assert glyphs is not ASCII or all(line.isascii() for line in lines)


def test_a_falling_curve_goes_from_the_upper_left_to_the_lower_right() -> None:
    rows = inside(draw([float(10 - i) for i in range(11)]))
    columns = [min(x for x, mark in enumerate(row) if mark != " ") for row in rows]
    assert columns == sorted(columns)
    assert rows[0][0] != " "
    assert rows[-1][-1] != " "
    # Joined: no column of cells is empty.
    assert all(any(row[x] != " " for row in rows) for x in range(len(rows[0])))


def test_one_spike_among_thousands_of_steps_is_drawn_to_the_top() -> None:
    values = [0.1] * 10_000
    values[5_000] = 0.9
    rows = inside(draw(values))
    assert rows[0].strip()
    spike = next(x for x, mark in enumerate(rows[0]) if mark != " ")
    assert abs(spike / len(rows[0]) - 0.5) < 0.03


def test_losses_that_are_not_finite_are_gaps() -> None:
    values = [0.5] * 40 + [math.nan] * 10 + [math.inf] * 10 + [0.5] * 40
    drawn = "".join(map(max, zip(*inside(draw(values)), strict=True)))
    gap = drawn[int(len(drawn) * 0.42) : int(len(drawn) * 0.58)]
    assert not gap.strip()
    assert drawn.replace(" ", "") != ""
    assert drawn[0] != " "
    assert drawn[-1] != " "


def test_nothing_but_nan_draws_nothing_and_does_not_fail() -> None:
    assert not "".join(draw([math.nan] * 5)).strip()


def test_a_log_axis_leaves_out_zero_and_labels_powers() -> None:
    lines = draw([10.0 ** (-i / 10) for i in range(40)] + [0.0], height=20, view=PlotView(log_y=True, smoothing=0.0))
    labels = [line.split("│")[0].strip() for line in lines[:-2]]
    assert {"1", "0.1", "0.01", "0.001"} <= set(labels)
    assert not inside(lines)[0][-1].strip()


def test_the_average_takes_the_whole_cell_over_the_raw_curve() -> None:
    rng = np.random.default_rng(0)
    curve = Curve(rng.uniform(0, 1, 2000))
    view = PlotView(smoothing=0.99)
    rows = draw_plot(curve, Smoother().smooth(curve, 0.99), 60, 14, view)
    layers = [layer for row in rows for text, layer in row if text.strip()]
    assert "raw" in layers
    smooth = "".join(text for row in rows for text, layer in row if layer == "smooth")
    assert " " not in smooth
    assert len(smooth) >= 55


def test_only_the_last_steps_are_shown_in_a_window_and_the_axis_says_which() -> None:
    lines = draw([5.0] * 900 + [0.1, 0.2] * 50, view=PlotView(window=100, smoothing=0.0))
    assert "5" not in {line.split("│")[0].strip() for line in lines[:-2]}
    assert lines[-1].split()[-1] == "1k"
    assert all(900 < float(label.replace("1k", "1000")) <= 1000 for label in lines[-1].split())


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (0.0, 1.0, 6, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.031, 0.249, 5, [0.05, 0.10, 0.15, 0.20]),
        (0.0, 4000.0, 5, [0.0, 1000.0, 2000.0, 3000.0, 4000.0]),
        (1.0, 1.0, 5, []),
        (math.nan, 1.0, 5, []),
    ],
)
def test_ticks_are_one_two_or_five_times_a_power_of_ten_apart(
    low: float, high: float, most: int, ticks: list[float]
) -> None:
    assert nice_ticks(low, high, most) == pytest.approx(ticks)


def test_log_ticks_stay_within_their_number() -> None:
    assert log_ticks(0.01, 1.0, 8) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    assert log_ticks(0.01, 1.0, 3) == pytest.approx([0.01, 0.1, 1.0])
    assert len(log_ticks(1e-9, 1e9, 4)) <= 4


def test_numbers_are_short() -> None:
    assert [step_number(n) for n in (5, 950, 1000, 1500, 20_000, 1_200_000)] == [
        "5", "950", "1k", "1500", "20k", "1.2M",
    ]  # fmt: skip
    assert short_number(0.1, 0.05) == "0.10"
    assert short_number(0.08123) == "0.0812"
    assert short_number(2e-7) == "2e-7"
    assert short_number(math.nan) == "-"


def test_the_average_is_corrected_for_its_short_past_and_passes_over_gaps() -> None:
    curve = Curve([2.0, 2.0, math.nan, 2.0, 6.0])
    smoothed = Smoother().smooth(curve, 0.5)
    np.testing.assert_allclose(smoothed[[0, 1, 3]], 2.0)
    assert math.isnan(smoothed[2])
    assert 2.0 < smoothed[4] < 6.0
    # By hand: the values 2, 2, 2, 6 weigh 1/16, 1/8, 1/4, 1/2, which add up to 15/16.
    assert smoothed[4] == pytest.approx((2 / 16 + 2 / 8 + 2 / 4 + 6 / 2) / (1 - 1 / 16))


def test_smoothing_step_by_step_equals_smoothing_at_once_also_after_a_resume() -> None:
    values = np.random.default_rng(0).uniform(0, 1, 700).tolist()
    smoother, curve = Smoother(), Curve()
    for step in range(0, 700, 7):
        curve = curve.put(step + 7, values[step : step + 7])
        smoother.smooth(curve, 0.9)
    np.testing.assert_array_equal(smoother.smooth(curve, 0.9), Smoother().smooth(curve, 0.9))
    resumed = curve.cut(100).put(107, [9.0] * 7)
    np.testing.assert_array_equal(smoother.smooth(resumed, 0.9), Smoother().smooth(resumed, 0.9))
    np.testing.assert_array_equal(smoother.smooth(resumed, 0.5), Smoother().smooth(resumed, 0.5))


def test_drawing_a_long_run_costs_milliseconds() -> None:
    curve, smoother, view = Curve(np.random.default_rng(0).uniform(0, 1, 50_000)), Smoother(), PlotView()
    draw_plot(curve, smoother.smooth(curve, 0.9), 126, 18, view)
    begun = time.thread_time()
    for _ in range(5):
        draw_plot(curve, smoother.smooth(curve, 0.9), 126, 18, view)
    # Some 3 ms on an idle machine; the bound only catches a return to per-point Python.
    assert (time.thread_time() - begun) / 5 < 0.05


@pytest.mark.parametrize(
    ("environ", "encoding", "name"),
    [
        ({"TERM": "xterm-256color"}, "UTF-8", "braille"),
        ({"TERM": "tmux-256color"}, "utf8", "braille"),
        ({"TERM": "linux"}, "UTF-8", "block"),
        ({"TERM": "xterm"}, "ISO-8859-1", "ascii"),
        ({"TERM": "xterm", "LORASMITH_ASCII": "1"}, "UTF-8", "ascii"),
        ({"TERM": "xterm", "LORASMITH_ASCII": "0"}, "UTF-8", "braille"),
    ],
)
def test_the_glyphs_are_those_that_the_terminal_has(environ: dict[str, str], encoding: str, name: str) -> None:
    assert detect_glyphs(environ, encoding).name == name


@pytest.mark.parametrize("glyphs", [BRAILLE, BLOCK, ASCII], ids=lambda glyphs: glyphs.name)
def test_steps_that_were_not_finite_are_crossed_on_the_axis_where_they_are(glyphs: GlyphSet) -> None:
    curve, view = Curve([1.0] * 100), PlotView(smoothing=0.0, glyphs=glyphs)
    plain = text_of(draw_plot(curve, curve.values, 60, 12, view))
    rows = draw_plot(curve, curve.values, 60, 12, view, Marks([1, 100, 50, 50, 300]))
    axis = text_of(rows)[-2]
    first = plain[-2].index(glyphs.corner) + 1
    middle = first + round(49 / 99 * (59 - first))
    assert [at for at, mark in enumerate(axis) if mark == glyphs.cross] == [first, middle, 59]
    assert [text for text, layer in rows[-2] if layer == "mark"] == [glyphs.cross] * 3
    assert text_of(rows)[:-2] == plain[:-2]
    assert len(axis) == 60


def test_only_crosses_in_the_window_are_drawn() -> None:
    curve, view = Curve([1.0] * 1000), PlotView(window=100)
    rows = draw_plot(curve, curve.values, 60, 12, view, Marks([5, 900, 950]))
    assert text_of(rows)[-2].count("×") == 1


@pytest.mark.parametrize("glyphs", [BRAILLE, BLOCK, ASCII], ids=lambda glyphs: glyphs.name)
def test_points_lie_over_the_curve_at_their_step_and_height_and_are_never_cut_off(glyphs: GlyphSet) -> None:
    curve, view = Curve([1.0] * 100), PlotView(smoothing=0.0, glyphs=glyphs)
    points = [(0, 5.0), (1, 3.0), (100, 1.0), (200, 9.0)]
    rows = draw_plot(curve, curve.values, 60, 12, view, Marks(points=points))
    assert [len(line) for line in text_of(rows)] == [60] * 12
    plot = inside(text_of(rows), glyphs)
    found = [(y, x) for y, line in enumerate(plot) for x, mark in enumerate(line) if mark == glyphs.diamond]
    # The first and the last step; step 0 and one that is not trained yet have no place.
    assert found == [(0, 0), (len(plot) - 1, len(plot[0]) - 1)]
    assert sum(layer == "point" for row in rows for _, layer in row) == 2
    last = draw_plot(curve, curve.values, 60, 12, dataclasses.replace(view, window=50), Marks(points=points))
    assert "".join(text_of(last)).count(glyphs.diamond) == 1


def validated(step: int, losses: list[float]) -> Validated:
    levels = [(index + 0.5) / len(losses) for index in range(len(losses))]
    return Validated(step=step, levels=levels, losses=losses, pictures=4)


def rows_of(validations: list[Validated], width: int = 46, height: int = 8, glyphs: GlyphSet = BRAILLE) -> list[str]:
    rows = ["".join(text for text, _ in row) for row in level_rows(validations, width, height, glyphs)]
    assert len(rows) <= height
    return rows


def test_each_noise_level_has_a_bar_a_number_and_its_change_since_the_first() -> None:
    rows = rows_of([validated(0, [0.2, 0.1]), validated(50, [0.1, 0.11])])
    assert [len(row) for row in rows] == [46] * 3
    assert rows[0].split()[0] == "25%"
    assert rows[0].split()[-2:] == ["0.1", "-50%"]
    assert rows[1].split()[-2:] == ["0.11", "+10%"]
    assert rows[2].split()[0] == "mean"
    assert rows[2].split()[-2:] == ["0.105", "-30%"]
    assert rows[0].count("━") == pytest.approx(rows[0].count("─"), abs=1)


def test_levels_that_find_no_room_are_counted() -> None:
    rows = rows_of([validated(0, [0.1] * 20)], height=6)
    assert rows[-2].endswith("and 16 more levels")
    assert rows[-1].split() == ["mean", *rows[-1].split()[1:-1], "0.1"]
    assert all(row.isascii() for row in rows_of([validated(0, [0.1] * 20)], height=6, glyphs=ASCII))
    for height in (1, 2, 3):
        rows_of([validated(0, [0.1, math.nan, 0.0])], width=20, height=height)


def test_losses_that_are_no_numbers_and_other_levels_have_no_change() -> None:
    rows = rows_of([validated(0, [0.1]), validated(5, [math.nan, 0.1])])
    assert rows[0].split()[-1] == "-"
    assert "%" not in rows[1].split()[-1]


def test_before_the_first_validation_it_is_said_what_to_set() -> None:
    assert "validation.every" in rows_of([], width=78)[0]
    assert len(level_title([])) == 1
