"""The fit solver: the fastest plan that fits, never a fixed key, honest verdicts, and what each switch costs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.families import families
from lorasmith.engine.fit import Fit, Room, fit_advice, margin_gib, solve
from lorasmith.engine.fit.levers import FIELDS, Levers, choices, levers_of, with_levers
from lorasmith.engine.fit.search import Limits, Problem, fastest, worth
from lorasmith.engine.memory.forecast import Subject, forecast
from lorasmith.engine.step_time import card_speed
from tests.memory_sample import big_transformer, small_unet

KEYS = (*FIELDS.values(), "train.gradient_checkpointing", "memory.checkpoint_share")
CARDS = ("GeForce RTX 3060", "GeForce RTX 2060", "GeForce RTX 4090", "H100 80GB HBM3")
MODELS = {"flux1": big_transformer(), "sdxl": small_unet()}
FREE_RAM, FREE_DISK = 60.0, 100.0


def subject(family: str = "flux1", side: int = 1024, **sections: Any) -> Subject:
    sections["dataset"] = {"resolution": side}
    config = RunConfig.model_validate(sections)
    return Subject(config, families()[family].SPEC, MODELS[family], side**2 / 1e6)


def room(vram_gib: float, card: str = "GeForce RTX 3060", **changes: Any) -> Room:
    return replace(Room(vram_gib, FREE_RAM, FREE_DISK, card_speed(card)), **changes)


def applied(run: Subject, fit: Fit) -> Subject:
    """The run with the plan's settings, checked as a run file is."""
    values = run.config.model_dump()
    for key, value in fit.settings.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    config = RunConfig.model_validate(values)
    scale = (config.dataset.resolution / run.config.dataset.resolution) ** 2
    return replace(run, config=config, megapixels=run.megapixels * scale)


def cost(run: Subject, fit: Fit) -> float:
    """What plans are compared by: time, weighted by what is given up; products in 8 bits come last and only help."""
    without = replace(levers_of(applied(run, fit).config), matmul=False)
    problem = Problem(run, fit_card(run), choices(run, fit_card(run), frozenset(), frozenset()), forecast)
    return problem.seconds(without) * worth(without, levers_of(run.config))


def fit_card(run: Subject) -> Any:
    return card_speed("GeForce RTX 3060")


RUNS = st.builds(
    subject,
    family=st.sampled_from(sorted(MODELS)),
    side=st.sampled_from([512, 1024]),
    train=st.fixed_dictionaries(
        {
            "batch_size": st.sampled_from([1, 4]),
            "gradient_checkpointing": st.just(True),
            "precision": st.sampled_from(["auto", "fp16"]),
        }
    ),
    memory=st.fixed_dictionaries(
        {
            "quantize": st.just("int8"),
            "quantized_matmul": st.booleans(),
            "swapped_blocks": st.sampled_from([0, 9]),
            "checkpoint_share": st.sampled_from([0.3, 1.0]),
        }
    ),
)
FREE = st.floats(2.0, 100.0)


class TestProperties:
    @settings(max_examples=20, deadline=None)
    @given(RUNS, FREE, st.floats(4.0, 100.0), st.sampled_from(CARDS))
    def test_the_verdict_is_what_the_forecast_of_the_plan_says(
        self, run: Subject, vram: float, ram: float, card: str
    ) -> None:
        place = room(vram, card, ram_gib=ram)
        fit = solve(run, place)
        again = forecast(applied(run, fit))
        assert again.peak.total == pytest.approx(fit.forecast.peak.total)
        assert again.ram_gib == pytest.approx(fit.forecast.ram_gib)
        short = again.peak.total > vram or again.ram_gib > ram or again.disk_gib > FREE_DISK
        roomy = again.peak.total <= vram - margin_gib(vram)
        assert fit.verdict == ("no" if short else "fits" if roomy else "tight")
        assert bool(fit.nearest) <= (fit.verdict != "fits")

    @settings(max_examples=20, deadline=None)
    @given(RUNS, FREE, st.sets(st.sampled_from(KEYS)))
    def test_fixed_keys_never_change(self, run: Subject, vram: float, fixed: set[str]) -> None:
        fit = solve(run, room(vram), frozenset(fixed))
        assert not fixed & set(fit.settings)

    @settings(max_examples=12, deadline=None)
    @given(RUNS, FREE, FREE, st.floats(8.0, 60.0))
    def test_more_memory_never_makes_a_plan_cost_more(self, run: Subject, one: float, other: float, ram: float) -> None:
        less, more = sorted((one, other))
        fixed = frozenset({"dataset.resolution"})
        small, large = (solve(run, room(size, ram_gib=ram), fixed) for size in (less, more))
        order = {"no": 0, "tight": 1, "fits": 2}
        assert order[large.verdict] >= order[small.verdict]
        if small.verdict == large.verdict != "no":
            # Costs that differ by a hundredth count as equal.
            assert cost(run, large) <= cost(run, small) * 1.03

    @settings(max_examples=8, deadline=None)
    @given(RUNS, FREE)
    def test_the_effective_batch_stays(self, run: Subject, vram: float) -> None:
        before, after = run.config.train, applied(run, solve(run, room(vram))).config.train
        pictures = after.batch_size * after.gradient_accumulation
        assert pictures == before.batch_size * before.gradient_accumulation


@pytest.mark.parametrize(("family", "vram", "ram"), [("flux1", 15.0, 60.0), ("flux1", 11.0, 26.0), ("sdxl", 6.0, 30.0)])
def test_the_search_finds_what_trying_everything_finds(family: str, vram: float, ram: float) -> None:
    run, card = subject(family), card_speed("GeForce RTX 3060")
    possible = choices(run, card, frozenset({FIELDS["apart"]}), frozenset())
    problem = Problem(run, card, possible, forecast)
    limits = Limits(vram, ram, FREE_DISK, margin_gib(vram))
    found = fastest(problem, limits)
    best = min(
        (
            problem.seconds(plan) * worth(plan, possible.start)
            for plan in every_plan(problem)
            if fits(problem, plan, limits)
        ),
        default=None,
    )
    assert (found is None) == (best is None)
    assert found is not None
    assert found.cost <= 1.015 * best


def every_plan(problem: Problem) -> list[Levers]:
    possible = problem.choices
    base = replace(possible.start, tiles=True, quantize_text="nf4")
    every = itertools.product(
        *(possible.quantize, possible.lora, possible.optimizer, possible.offload),
        *(possible.checkpointed, possible.swapped[::2]),
    )
    names = ("quantize", "lora", "optimizer", "offload", "checkpointed", "swapped")
    plans = [replace(base, **dict(zip(names, values, strict=True))) for values in every]
    return [plan for plan in plans if plan.checkpointed or not plan.offload]


def fits(problem: Problem, plan: Levers, limits: Limits) -> bool:
    return not limits.lacking(forecast(with_levers(problem.subject, plan)))


class TestQuality:
    def test_a_large_card_gives_up_nothing(self) -> None:
        fit = solve(subject(), room(79.0))
        assert fit.verdict == "fits"
        assert not fit.settings
        assert "The settings" not in fit.reason

    def test_checkpointing_that_is_not_needed_is_switched_off(self) -> None:
        fit = solve(subject("sdxl", train={"gradient_checkpointing": True}), room(79.0))
        assert fit.settings == {"train.gradient_checkpointing": False}
        assert "room without it" in fit_advice(fit)[0].why

    def test_the_base_is_kept_in_fewer_bits_only_where_swapping_does_not_do(self) -> None:
        many, few = room(11.0), room(11.0, ram_gib=12.0)
        assert "memory.quantize" not in solve(subject(), many).settings
        assert solve(subject(), few).settings["memory.quantize"] in ("int8", "nf4")

    def test_resolution_is_lowered_last_and_never_below_what_the_preset_warns_of(self) -> None:
        run, place = subject("sdxl"), room(3.7, ram_gib=10.0)
        fit = solve(run, place)
        assert fit.settings.get("dataset.resolution", 1024) >= 768
        kept = solve(run, place, frozenset({"dataset.resolution"}))
        assert "dataset.resolution" not in kept.settings

    def test_fp16_keeps_the_lora_in_fp32(self) -> None:
        fixed = frozenset({"dataset.resolution"})
        for vram in (4.0, 6.0, 9.0, 20.0, 79.0):
            fit = solve(subject(train={"precision": "fp16"}), room(vram), fixed)
            assert "memory.lora_precision" not in fit.settings
        # What little it saves is asked for where nothing else is left.
        tight = solve(subject(), room(4.0, ram_gib=30.0), fixed)
        assert tight.settings.get("memory.lora_precision") == "base"


class TestMachine:
    def test_choices_that_do_not_work_here_are_not_made(self) -> None:
        few = room(19.0, ram_gib=7.0)
        assert solve(subject(), few).settings["memory.quantize"] == "int8"
        broken = frozenset({("memory.quantize", "int8"), ("memory.swapped_blocks", 1)})
        fit = solve(subject(), replace(few, unusable=broken))
        assert fit.settings["memory.quantize"] in ("fp8", "nf4")
        assert "memory.swapped_blocks" not in fit.settings

    def test_a_measured_ratio_counts(self) -> None:
        run = subject("sdxl", side=512)
        usual, more = solve(run, room(20.0)), solve(run, room(20.0, memory_calibration=1.5, seconds_calibration=2.0))
        assert more.forecast.basis.startswith("calibrated")
        assert more.forecast.peak.total > usual.forecast.peak.total
        assert more.time.basis == "measured on this card"

    def test_a_run_without_derived_memory_is_refused(self) -> None:
        run = subject(adapter={"kind": "lokr"})
        with pytest.raises(ConfigError, match="no memory forecast"):
            solve(run, room(20.0))


class TestWords:
    def test_a_switch_costs_what_leaving_it_out_saves(self) -> None:
        run = subject()
        fit = solve(run, room(15.0))
        swap = next(switch for switch in fit.switches if switch.key == "memory.swapped_blocks")
        problem = Problem(run, card_speed("GeForce RTX 3060"), choices(run, None, frozenset(), frozenset()), forecast)
        plan = levers_of(applied(run, fit).config)
        share = -(-8 * plan.swapped // MODELS["flux1"].num_blocks) / 8
        without = replace(plan, swapped=0, checkpointed=max(plan.checkpointed, share))
        saved = problem.forecast(without).step.total - fit.forecast.step.total
        assert swap.saves_gib == pytest.approx(saved)
        assert swap.slower == pytest.approx(problem.seconds(plan) / problem.seconds(without) - 1)
        assert swap.words.startswith(f"block swap {plan.swapped}: −{saved:.1f} GiB, ")

    def test_no_names_what_is_needed_and_the_nearest_change(self) -> None:
        fixed = frozenset({"memory.quantize", "memory.swapped_blocks", "dataset.resolution"})
        fit = solve(subject(), room(20.0, "GeForce RTX 4090"), fixed)
        assert fit.verdict == "no"
        assert fit.reason == f"needs at least {fit.forecast.peak.total:.1f} GiB (preview), 20.0 GiB are free"
        assert "memory.quantize = nf4 would fit" in fit.nearest
        assert "memory.swapped_blocks = 55 would fit" in fit.nearest
        assert "pixels would fit" not in fit.nearest

    def test_no_tells_when_closing_other_programs_is_enough(self) -> None:
        fixed = frozenset({"memory.quantize", "memory.swapped_blocks", "dataset.resolution"})
        run = subject("sdxl", train={"batch_size": 1})
        fit = solve(run, room(4.0), fixed)
        assert fit.verdict == "no"
        assert "close other programs on the card until" in fit.nearest

    def test_no_main_memory_is_told_as_such(self) -> None:
        fit = solve(subject(), room(79.0, ram_gib=1.0))
        assert fit.verdict == "no"
        assert "of main memory, 1.0 GiB are free" in fit.reason
        assert "of free main memory would do" in fit.nearest

    def test_advice_gives_each_setting_its_reason(self) -> None:
        fit = solve(subject(), room(9.0))
        advice = {item.key: item for item in fit_advice(fit)}
        assert set(advice) == set(fit.settings)
        for item in advice.values():
            assert (item.origin, item.source) == ("fit", "lorasmith's forecast for this card")
            assert item.why[0].isupper()
            assert item.why.endswith(".")


def test_products_in_8_bits_are_had_only_where_they_were_measured_to_be_fast() -> None:
    run = subject("flux1")
    usual = solve(run, room(19.0, ram_gib=7.0))
    measured = solve(run, room(19.0, ram_gib=7.0, fast_products=frozenset({"int8"})))
    assert not usual.settings.get("memory.quantized_matmul")
    assert measured.settings["memory.quantized_matmul"]
    assert measured.settings["memory.quantize"] == "int8"
    assert measured.time.seconds < usual.time.seconds
