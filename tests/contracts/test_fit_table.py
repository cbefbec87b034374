"""Every size of every family has a plan on every tier, or a reason; and the page shows what the solver says."""

from __future__ import annotations

import pytest

from lorasmith.engine.families import families
from lorasmith.engine.fit import margin_gib
from lorasmith.engine.fit.tiers import TIERS, TierPlan, room_of, tier_of
from lorasmith.engine.memory import model_memories
from lorasmith.engine.run_file import check_setting
from lorasmith.engine.step_time import card_speed
from tests.contracts.fit_table import README, cell, plans, readme_table, with_table

ORDER = {"no": 0, "tight": 1, "fits": 2}


def of(label: str) -> list[TierPlan]:
    return [plan for plan in plans() if plan.label == label]


LABELS = sorted({plan.label for plan in plans()})


def test_every_family_has_a_derived_size() -> None:
    assert {plan.family for plan in plans()} == set(families())
    assert len(plans()) == len(TIERS) * sum(len(model_memories(name)) for name in families())


@pytest.mark.parametrize("label", LABELS)
def test_each_tier_gives_a_plan_or_a_reason(label: str) -> None:
    for plan in of(label):
        assert plan.fit is not None, plan.reason
        fit, room = plan.fit, room_of(plan.tier)
        assert plan.reason.startswith("needs")
        for key, value in fit.settings.items():
            assert check_setting(key, value) == ""
        if fit.verdict == "no":
            assert fit.nearest, f"{plan.tier.vram_gb} GB: {fit.reason}, and no nearest change"
        else:
            margin = margin_gib(room.vram_gib) if fit.verdict == "fits" else 0.0
            assert fit.forecast.peak.total <= room.vram_gib - margin
            assert fit.forecast.ram_gib <= room.ram_gib


@pytest.mark.parametrize("label", LABELS)
def test_a_larger_card_never_fits_worse(label: str) -> None:
    verdicts = [ORDER[plan.fit.verdict] for plan in of(label) if plan.fit is not None]
    assert verdicts == sorted(verdicts)


def test_every_tier_of_the_mission_has_a_card_of_its_size() -> None:
    assert [tier.vram_gb for tier in TIERS] == [6, 8, 10, 12, 16, 20, 24, 32, 48, 80]
    for tier in TIERS:
        card = card_speed(tier.card)
        assert card is not None
        assert card.exact
        assert card.vram_gb == tier.vram_gb


def test_a_card_between_tiers_is_taken_with_its_own_memory() -> None:
    assert tier_of(11).card == "GeForce RTX 3080"
    assert tier_of(11).vram_gb == 11
    assert tier_of(2).vram_gb == 2


def test_the_readme_has_the_present_table() -> None:
    page = README.read_text(encoding="utf-8")
    assert with_table(page) == page, "run: python -m tests.contracts.fit_table"


def test_the_table_has_each_size_once() -> None:
    rows = readme_table().splitlines()[2 : 2 + len(LABELS)]
    assert sorted(row.split(" | ")[0].removeprefix("| ") for row in rows) == LABELS
    assert all(cell(plan) in readme_table() for plan in plans())
