from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.engine.config import ScheduleSettings
from lorasmith.engine.lr_schedules import lr_factor


def factors(total: int, **settings: object) -> list[float]:
    schedule = ScheduleSettings(**settings)  # type: ignore[arg-type]
    return [lr_factor(schedule, step, total) for step in range(total)]


def test_constant_stays_at_one() -> None:
    assert factors(5, name="constant") == [1.0] * 5


def test_warm_up_rises_in_equal_parts_and_its_last_step_has_the_full_rate() -> None:
    assert factors(6, name="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_in_equal_parts_and_would_reach_zero_after_the_last_step() -> None:
    assert factors(6, name="linear", warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_is_at_one_half_in_the_middle() -> None:
    values = factors(100, name="cosine")
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.5)
    assert values[75] == pytest.approx(0.5 * (1 + math.cos(0.75 * math.pi)))
    assert values == sorted(values, reverse=True)


def test_cosine_with_restarts_begins_each_period_at_the_full_rate() -> None:
    values = factors(90, name="cosine_restarts", restarts=3)
    assert [step for step, value in enumerate(values) if value == 1.0] == [0, 30, 60]
    assert values[:30] == pytest.approx(values[30:60])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_restarts"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_every_step_learns_something_and_none_more_than_the_full_rate(name: str, warmup: int) -> None:
    assert all(0.0 < value <= 1.0 for value in factors(40, name=name, warmup_steps=warmup))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_restarts"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_schedule_that_starts_later_is_the_same_shape_on_the_steps_that_are_left(name: str, warmup: int) -> None:
    later = factors(30, name=name, warmup_steps=warmup, start_step=10)
    assert later == [1.0] * 10 + factors(20, name=name, warmup_steps=warmup)


NAMES = get_args(ScheduleSettings.model_fields["name"].annotation)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    total = draw(st.integers(2, 400))
    settings = {
        "name": draw(st.sampled_from(NAMES)),
        "warmup_steps": draw(st.integers(0, total - 1)),
        "restarts": draw(st.integers(1, 5)),
        "power": draw(st.floats(0.1, 5.0)),
        "decay_share": draw(st.floats(0.01, 1.0)),
    }
    return settings, total


@given(schedules())
def test_any_schedule_learns_in_each_step_and_never_above_the_full_rate(drawn: tuple[dict[str, Any], int]) -> None:
    settings, total = drawn
    values = factors(total, **settings)
    assert all(0.0 < value <= 1.0 for value in values)
    warmup = settings["warmup_steps"]
    assert values[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    assert values[warmup] == 1.0
    if settings["name"] != "cosine_restarts":
        assert values[warmup:] == sorted(values[warmup:], reverse=True)


@given(schedules(), st.integers(1, 50))
def test_any_schedule_that_starts_later_has_the_same_shape(drawn: tuple[dict[str, Any], int], start: int) -> None:
    settings, total = drawn
    assert factors(total + start, start_step=start, **settings) == [1.0] * start + factors(total, **settings)


def test_the_polynomial_of_power_one_is_the_straight_line() -> None:
    assert factors(50, name="polynomial", power=1.0) == pytest.approx(factors(50, name="linear"))
    assert factors(4, name="polynomial", power=2.0) == pytest.approx([1.0, 9 / 16, 1 / 4, 1 / 16])


def test_rex_stays_above_the_straight_line_and_has_two_thirds_in_the_middle() -> None:
    rex, line = factors(100, name="rex"), factors(100, name="linear")
    assert all(above > below for above, below in zip(rex[1:], line[1:], strict=True))
    assert rex[50] == pytest.approx(2 / 3)


def test_warm_up_stable_decay_stays_at_the_top_until_its_last_part() -> None:
    values = factors(100, name="wsd", warmup_steps=10, decay_share=0.2)
    assert values[9:83] == [1.0] * 74
    assert values[91] == pytest.approx(1 - math.sqrt(0.5), abs=1e-6)
    assert values[-1] < 0.04


def test_the_inverse_square_root_halves_within_four_warm_ups() -> None:
    values = factors(1000, name="inverse_sqrt", warmup_steps=100)
    assert values[399] == pytest.approx(0.5, abs=1e-3)
    assert factors(1000, name="inverse_sqrt")[300] == pytest.approx(0.5)
