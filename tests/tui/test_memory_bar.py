"""The bar tells a forecast without color: patterns, figures, a verdict, and a mark where the card ends."""

from __future__ import annotations

import pytest

from lorasmith.engine.memory.forecast import Forecast, Part, StagePeak
from lorasmith.tui.glyphs import ASCII, BRAILLE
from lorasmith.tui.memory_view import MemoryView, view_of
from lorasmith.tui.widgets.memory_bar import bar_rows

VIEW = MemoryView((("weights", 6.0), ("LoRA", 0.2), ("activations", 1.8)), 16.0, "fits")


def texts(view: MemoryView, width: int = 80, marks: object = BRAILLE) -> list[str]:
    return ["".join(text for text, _ in row) for row in bar_rows(view, width, marks)]  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [40, 58, 80, 100])
def test_the_bar_fills_its_row_and_says_its_figures(width: int) -> None:
    bar, *legend = texts(VIEW, width)
    assert all(len(row) <= width for row in (bar, *(row.rstrip() for row in legend)))
    assert "8.0 of 16.0 GiB free FITS" in bar
    words = " ".join(legend)
    assert all(name in words for name in ("weights 6.0", "LoRA 0.2", "activations 1.8"))


def test_segments_are_as_long_as_their_share_and_none_is_lost() -> None:
    bar, legend = texts(VIEW)
    weights, lora, activations = (bar.count(pattern) for pattern in "█▓▒")
    assert lora == 1
    assert weights == pytest.approx(activations * 6.0 / 1.8, abs=2)
    assert bar.count(BRAILLE.bar_empty) == pytest.approx(weights + lora + activations, abs=1)
    assert [legend.index(f"{mark} ") for mark in "█▓▒"] == sorted(legend.index(f"{mark} ") for mark in "█▓▒")


def test_what_does_not_fit_is_marked_where_the_card_ends() -> None:
    bar, _ = texts(MemoryView((("weights", 22.0), ("activations", 2.0)), 12.0, "no"))
    assert "24.0 of 12.0 GiB free DOES NOT FIT" in bar
    drawn = bar.removeprefix("VRAM ").split(" 24.0")[0]
    assert drawn.index(BRAILLE.vertical) == pytest.approx(len(drawn) / 2, abs=1)


def test_without_blocks_letters_tell_the_segments_apart() -> None:
    bar, legend = texts(VIEW, marks=ASCII)
    assert "WWW" in bar
    assert "O" in bar
    assert bar.isascii()
    assert legend.isascii()


def test_without_a_forecast_its_reason_is_shown() -> None:
    assert texts(MemoryView(note="No GPU: training runs in the machine's memory.")) == [
        "VRAM No GPU: training runs in the machine's memory."
    ]


def test_a_preview_that_needs_more_than_a_step_has_a_segment_of_its_own() -> None:
    step = StagePeak("step", (Part("context", 0.5), Part("weights", 6.0), Part("adapter", 0.3), Part("slack", 0.5)))
    preview = StagePeak("preview", (Part("weights", 6.0), Part("drawing", 3.0)))
    view = view_of(Forecast(stages=(step, preview), ram=(), disk=(), basis="derived"), 12.0, "fits")
    assert view.segments == (
        ("weights", 6.0),
        ("LoRA", 0.3),
        ("reserve", 1.0),
        ("more for preview", pytest.approx(9.0 - 7.3)),
    )
    assert view.peak_gib == pytest.approx(9.0)
