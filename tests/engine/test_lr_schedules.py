from __future__ import annotations

import math

import pytest

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
