"""A step's estimated time: arithmetic by hand, data sheets that agree with each other, and published steps in range."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

import lorasmith.presets
from lorasmith.engine.config import RunConfig
from lorasmith.engine.families import families
from lorasmith.engine.memory import BlockGroup, Law, ModelMemory, PartMemory
from lorasmith.engine.memory.forecast import Subject
from lorasmith.engine.step_time import CardSpeed, card_speed, step_seconds, usual_parts
from tests.memory_sample import big_transformer

CARDS = tomllib.loads((Path(next(iter(lorasmith.presets.__path__))) / "cards.toml").read_text(encoding="utf-8"))
ROWS = [(series["name"], row) for series in CARDS["series"] for row in series["cards"]]
PLAIN = CardSpeed("Plain", 100.0, 50.0, 400.0, 200.0, 1000.0, 24.0, 25.0, 300.0, (8, 9))
"""Round figures: half of the peak is 50 TFLOP a second."""


def model(**changes: Any) -> ModelMemory:
    """A transformer of ten blocks, 10 TFLOP a megapixel one way, whose kernels take no time to launch."""
    plain = dataclasses.replace(
        big_transformer(),
        denoiser=PartMemory(packed=1_000_000_000, plain=0, layer=40_000_000),
        blocks=(BlockGroup("Block", 10, 100_000_000, 0),),
        inputs=Law(0.0, 0.0, 1000.0),
        tflop=(0.0, 10.0, 0.0),
        kernels=(0, 0),
    )
    return dataclasses.replace(plain, **changes)


def subject(base: ModelMemory | None = None, /, **sections: Any) -> Subject:
    config = RunConfig.model_validate(sections)
    spec = families()["flux1"].SPEC
    return Subject(config, spec, base or model(), 1.0, num_parameters=0)


def usual(base: ModelMemory | None = None, card: CardSpeed = PLAIN, /, **sections: Any) -> float:
    # The optimizer's hundredth of a second is left out.
    return step_seconds(subject(base, **sections), card).seconds - 0.01


class TestArithmetic:
    def test_frozen_weights_cost_the_way_there_and_the_gradient_of_the_input(self) -> None:
        assert usual() == pytest.approx(2 * 10 / 50)

    def test_checkpointing_computes_its_share_again(self) -> None:
        on = {"train": {"gradient_checkpointing": True}}
        assert usual(**on) == pytest.approx(3 * 10 / 50)
        assert usual(**on, memory={"checkpoint_share": 0.5}) == pytest.approx(2.5 * 10 / 50)

    def test_attention_costs_two_and_a_half_times_as_much_on_the_way_back(self) -> None:
        assert usual(model(tflop=(0.0, 0.0, 10.0))) == pytest.approx(3.5 * 10 / 50)

    def test_flux_needs_the_operations_that_were_counted(self) -> None:
        # performance.md: 172 TFLOP without and 246 with checkpointing at 1024 px; 4608 tokens, 57 blocks of 3072.
        attention = 4 * 4608**2 * 3072 * 57 / 1e12
        flux = model(tflop=(0.0, 74.0 - attention, attention))
        fast = dataclasses.replace(PLAIN, tflops=200.0)
        assert usual(flux, fast) == pytest.approx(172 / 100, rel=0.02)
        assert usual(flux, fast, train={"gradient_checkpointing": True}) == pytest.approx(246 / 100, rel=0.02)

    def test_accumulated_batches_and_preservation_multiply(self) -> None:
        assert usual(train={"gradient_accumulation": 4}) == pytest.approx(4 * 0.4)
        assert usual(train={"batch_size": 3}) == pytest.approx(3 * 0.4)
        assert usual(objective={"preserve": "blank"}) == pytest.approx(2.5 * 0.4)

    def test_the_processor_decides_where_kernels_are_many(self) -> None:
        assert usual(model(kernels=(20_000, 30_000))) == pytest.approx(20_000 * 49e-6)
        base = {"lora_precision": "base"}
        assert usual(model(kernels=(20_000, 30_000)), memory=base) == pytest.approx(0.98 * 20_000 * 49e-6)

    def test_fp32_is_as_slow_as_the_card_says(self) -> None:
        assert usual(train={"precision": "fp32"}) == pytest.approx(2 * 10 / 25)


class TestSavers:
    def test_packed_weights_are_widened_each_time(self) -> None:
        # 2.6 bytes for each of a billion weights, there and back, at 1000 GB/s.
        assert usual(memory={"quantize": "nf4"}) == pytest.approx(0.4 + 2 * 2.6e9 / 1e12)

    def test_products_in_8_bits_are_faster_on_a_card_that_has_them(self) -> None:
        in_8_bits = {"quantize": "int8", "quantized_matmul": True}
        assert usual(memory=in_8_bits) < usual()
        without = dataclasses.replace(PLAIN, int8=0.0)
        assert usual(None, without, memory=in_8_bits) > usual(None, without)

    def test_swapped_blocks_cost_what_computing_does_not_hide(self) -> None:
        # Blocks of 0.2 GB, each copied twice at 20 GB/s; the first is waited for.
        parts = usual_parts(subject(), PLAIN)
        assert parts.copy_block == pytest.approx(0.2 / 20)
        assert parts.seconds(0.0, 5) - 0.01 == pytest.approx(2.5 * 10 / 50 + 0.01)
        slow = dataclasses.replace(PLAIN, pcie_gb=1.25)
        assert usual(None, slow, memory={"swapped_blocks": 5}) == pytest.approx(2 * 5 * 0.2 + 0.2)

    def test_inputs_in_main_memory_are_copied_back_once(self) -> None:
        slow = dataclasses.replace(PLAIN, pcie_gb=1.25)
        away = {"train": {"gradient_checkpointing": True}, "memory": {"offload_activations": True}}
        assert usual(None, slow, **away) == pytest.approx(1000 * 2**20 / 1e9)

    def test_a_plan_compared_by_its_parts_takes_what_its_settings_take(self) -> None:
        memory = {"swapped_blocks": 7, "checkpoint_share": 0.5, "quantize": "int8"}
        whole = subject(model(kernels=(3000, 4000)), train={"gradient_checkpointing": True})
        config = whole.config.model_copy(update={"memory": whole.config.memory.model_copy(update=memory)})
        told = dataclasses.replace(whole, config=config)
        assert step_seconds(told, PLAIN).seconds == usual_parts(told, PLAIN).seconds(0.5, 7)


class TestCards:
    @pytest.mark.parametrize(("series", "row"), ROWS, ids=[row["names"][0] for _, row in ROWS])
    def test_every_card_is_found_by_the_name_that_nvml_gives(self, series: str, row: dict[str, Any]) -> None:
        for name in row["names"]:
            card = card_speed(f"NVIDIA {name}")
            assert card is not None
            assert (card.name, card.exact) == (name, True)

    def test_figures_are_dense_ones_in_16_bits(self) -> None:
        """Tensor cores do 8 bits at twice or four times the speed of 16, and four or two times that of fp32."""
        for series, row in ROWS:
            if "without tensor cores" in series or row["capability"] < [7, 5] or row["names"] == ["A10G"]:
                continue
            assert row["int8"] / row["tflops"] == pytest.approx(4 if "GeForce" in row["names"][0] else 2, rel=0.02)
            if row["fp8"]:
                assert row["fp8"] / row["tflops"] == pytest.approx(2, rel=0.02)
            assert 1.95 < row["tflops"] / row["fp32"] < 31

    def test_the_floors_of_the_design_follow_from_the_data_sheets(self) -> None:
        # performance.md: SDXL at 1024 px, 14.6 TFLOP at 80 % of the dense peak, in ms.
        floors = {
            "GeForce RTX 3060": 715,
            "GeForce RTX 3090": 257,
            "GeForce RTX 4090": 110,
            "H100 80GB HBM3": 18,
            "H200": 18,
        }
        for name, milliseconds in floors.items():
            card = card_speed(name)
            assert card is not None
            assert 14.6 / (0.8 * card.tflops) == pytest.approx(milliseconds / 1000, rel=0.03)

    def test_an_unknown_card_is_taken_for_one_of_its_kind(self) -> None:
        card = card_speed("NVIDIA GeForce RTX 5070 Ti SUPER", (12, 0))
        assert card is not None
        assert not card.exact
        assert card.capability == (12, 0)
        known = dataclasses.replace(card, exact=True)
        guess, sure = step_seconds(subject(), card), step_seconds(subject(), known)
        assert guess.high / guess.low > sure.high / sure.low
        assert "same kind" in guess.basis

    def test_a_card_of_an_unknown_kind_and_a_slice_of_one_are_not_known(self) -> None:
        assert card_speed("Some Accelerator") is None
        assert card_speed("NVIDIA A100-SXM4-40GB MIG 1g.5gb", (8, 0)) is None

    def test_a_newer_generation_is_taken_for_the_newest_of_its_kind(self) -> None:
        card = card_speed("NVIDIA RTX 9999", (12, 1))
        assert card is not None
        assert card.capability[0] == 12


class TestRange:
    def test_an_estimate_tells_its_range_and_what_it_rests_on(self) -> None:
        time = step_seconds(subject(), PLAIN)
        assert time.low < time.seconds < time.high
        assert "estimate" in time.basis

    def test_no_card_gives_a_guess(self) -> None:
        time = step_seconds(subject(), None)
        assert "guess" in time.basis
        assert time.high / time.low > 9

    def test_a_measurement_replaces_the_estimate(self) -> None:
        estimate, measured = step_seconds(subject(), PLAIN), step_seconds(subject(), PLAIN, calibration=0.7)
        assert measured.seconds == pytest.approx(0.7 * estimate.seconds)
        assert measured.high / measured.low < estimate.high / estimate.low
        assert measured.basis == "measured on this card"
