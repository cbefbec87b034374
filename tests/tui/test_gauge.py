"""Gauges say value, unit, total, percent and a word; color only repeats the word."""

from __future__ import annotations

import pytest

from lorasmith.engine.events import HardwareSampled
from lorasmith.tui.glyphs import ASCII, BRAILLE
from lorasmith.tui.widgets.gauge import gauge_parts, hardware_readings
from lorasmith.tui.widgets.line import Part


def sample(**changes: float | str | None) -> HardwareSampled:
    values: dict[str, float | str | None] = {
        "vram_used_gib": 8.1, "vram_total_gib": 24.0, "gpu_utilization_percent": 97.0, "temperature_c": 71.0,
        "power_w": 300.0, "ram_used_gib": 5.0, "ram_total_gib": 8.0, "process_ram_gib": 1.0,
    } | changes  # fmt: skip
    return HardwareSampled(**values)  # type: ignore[arg-type]


def text_of(parts: list[Part]) -> str:
    return "".join(text for text, _ in parts)


def rows(width: int = 60, **changes: float | str | None) -> dict[str, str]:
    readings = hardware_readings(sample(**changes))
    return {reading.name: text_of(gauge_parts(reading, width, BRAILLE)) for reading in readings}


def test_memory_shows_value_total_unit_percent_and_a_word() -> None:
    shown = rows()
    assert "8.1/24.0 GiB" in shown["VRAM"]
    assert "34 % OK" in shown["VRAM"]
    assert "5.0/8.0 GiB" in shown["RAM"]
    assert "97 %" in shown["GPU"]
    assert "71 °C" in shown["Temp"]
    assert shown["Temp"].endswith("OK")


@pytest.mark.parametrize(("used", "word"), [(21.5, "OK"), (21.7, "HIGH"), (23.5, "CRITICAL"), (24.0, "CRITICAL")])
def test_vram_near_its_end_is_said_in_words(used: float, word: str) -> None:
    assert rows(vram_used_gib=used)["VRAM"].endswith(f"% {word}")


@pytest.mark.parametrize(("degrees", "word"), [(79.0, "OK"), (80.0, "HIGH"), (90.0, "CRITICAL")])
def test_a_hot_gpu_is_said_in_words(degrees: float, word: str) -> None:
    assert rows(temperature_c=degrees)["Temp"].endswith(word)


def test_a_busy_gpu_is_no_warning() -> None:
    assert "CRITICAL" not in rows(gpu_utilization_percent=100.0)["GPU"]


def test_the_bar_is_as_long_as_the_share() -> None:
    bars = {used: rows(vram_used_gib=used)["VRAM"].count(BRAILLE.bar_full) for used in (0.0, 12.0, 24.0)}
    assert bars[0.0] == 0
    assert bars[24.0] > 10
    assert bars[12.0] == pytest.approx(bars[24.0] / 2, abs=1)


def test_what_cannot_be_had_is_said_in_the_words_of_the_sampler() -> None:
    shown = rows(
        vram_used_gib=None,
        vram_total_gib=None,
        gpu_utilization_percent=None,
        temperature_c=None,
        note="no NVIDIA driver",
    )
    assert shown["VRAM"] == "VRAM no NVIDIA driver"
    assert shown["GPU"] == "GPU  -"
    assert "5.0/8.0 GiB" in shown["RAM"]


def test_before_the_first_sample_the_gauges_say_so() -> None:
    assert all("not measured yet" in text_of(gauge_parts(r, 40, BRAILLE)) for r in hardware_readings(None))


@pytest.mark.parametrize("width", [28, 37, 38, 60, 80])
def test_the_word_is_never_cut_off(width: int) -> None:
    for reading in hardware_readings(sample(vram_used_gib=139.0, vram_total_gib=139.8, temperature_c=95.0)):
        shown = text_of(gauge_parts(reading, width, ASCII))
        assert len(shown) <= width
        assert shown.isascii() or "°" in shown
    assert text_of(gauge_parts(hardware_readings(sample(vram_used_gib=23.9))[0], width, ASCII)).endswith("CRITICAL")
