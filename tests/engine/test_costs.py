"""Hours, energy and money of a run, by hand; dated prices."""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Any

import pytest

import lorasmith.presets
from lorasmith.engine.config import RunConfig
from lorasmith.engine.costs import hours_words, run_costs
from lorasmith.engine.families import families
from lorasmith.engine.memory.forecast import Subject
from lorasmith.engine.step_time import StepTime, card_speed, step_seconds
from tests.memory_sample import big_transformer

PRICES = tomllib.loads((Path(next(iter(lorasmith.presets.__path__))) / "prices.toml").read_text(encoding="utf-8"))
SECOND = StepTime(1.0, 0.5, 2.0, "an estimate")


def config(steps: int = 3600) -> RunConfig:
    return RunConfig.model_validate({"train": {"steps": steps}})


def test_hours_energy_and_its_price() -> None:
    card = card_speed("GeForce RTX 4090")
    costs = run_costs(config(), "sdxl", SECOND, card)
    assert (costs.hours, costs.hours_low, costs.hours_high) == (1.0, 0.5, 2.0)
    # 450 W at 80 % for an hour.
    assert costs.kwh == pytest.approx(0.36)
    assert costs.energy == pytest.approx((0.036, 0.144))
    assert costs.fal is None
    assert costs.rented == ()
    assert "0.36 kWh" in costs.words[1]
    assert "60 min of training (30 min to 2.0 h; 1 s a step)" in costs.words[0]


def test_without_a_card_there_is_no_energy() -> None:
    costs = run_costs(config(), "sdxl", SECOND, None)
    assert costs.kwh is None
    assert costs.energy is None
    assert len(costs.words) == 1


def test_fal_charges_each_step_and_a_least_number_of_them() -> None:
    assert run_costs(config(1500), "flux1", SECOND, None).fal == pytest.approx(3.0)
    assert run_costs(config(1500), "krea2", SECOND, None).fal == pytest.approx(4.2)
    assert run_costs(config(10), "qwen_image", SECOND, None).fal == pytest.approx(500 * 0.002)
    told = run_costs(config(1500), "flux1", SECOND, None).words[-1]
    assert told == "at fal.ai 1500 steps cost $3.00 (flux-lora-fast-training, 2026-11-26)"


def test_a_trainer_of_another_size_of_the_family_is_not_taken() -> None:
    assert run_costs(config(), "flux2", SECOND, None).fal is None


def test_rented_cards_are_told_with_their_own_time() -> None:
    settings = config(1000)
    subject = Subject(settings, families()["flux1"].SPEC, big_transformer(), 1.0)
    costs = run_costs(settings, "flux1", SECOND, None, subject)
    assert len(costs.rented) == 3
    assert list(costs.rented) == sorted(costs.rented, key=lambda price: price.dollars)
    for price in costs.rented:
        card = card_speed(price.card)
        hours = step_seconds(subject, card).seconds * 1000 / 3600
        hourly = min(entry["hour"] for entry in PRICES["rented"] if entry["card"] == price.card)
        assert price.hours == pytest.approx(hours)
        assert price.dollars == pytest.approx(hours * hourly)
        assert any(price.read in words and price.provider in words for words in costs.words)


@pytest.mark.parametrize(
    "entry", [PRICES["energy"], *PRICES["hosted"], *PRICES["rented"]], ids=lambda e: e["source"][:40]
)
def test_every_price_has_a_date_and_a_source(entry: dict[str, Any]) -> None:
    assert datetime.date.fromisoformat(entry["read"]) >= datetime.date(2026, 1, 1)
    assert entry["source"]
    if "card" in entry:
        card = card_speed(entry["card"])
        assert card is not None
        assert card.exact
    if "family" in entry:
        assert entry["family"] in families()


@pytest.mark.parametrize(("seconds", "words"), [(45, "45 s"), (2400, "40 min"), (5400, "1.5 h"), (200_000, "2.3 days")])
def test_times_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert hours_words(seconds) == words
