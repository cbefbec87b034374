"""A memory forecast in words, for the plan and the command line."""

from __future__ import annotations

from collections.abc import Sequence

from lorasmith.engine.memory.forecast import Forecast, Part, StagePeak

_SMALLEST_GIB = 0.05
"""Parts that would round to nothing are told together."""


def memory_rows(forecast: Forecast | None, note: str) -> list[tuple[str, str]]:
    """Return rows of (label, words): the peak with its parts, every stage's total, main memory; or only the note."""
    if forecast is None:
        return [("GPU memory", note)]
    peak = forecast.peak
    stages = ", ".join(f"{stage.stage} {stage.total:.1f}" for stage in forecast.stages)
    return [
        ("GPU memory", f"about {peak.total:.1f} GiB, most in the stage “{peak.stage}”: {parts_words(peak.parts)}"),
        ("by stage", f"{stages} GiB ({note})"),
        ("main memory", f"about {forecast.ram_gib:.1f} GiB: {parts_words(forecast.ram)}"),
    ]


def parts_words(parts: Sequence[Part]) -> str:
    """Return the parts with their GiB, the largest first, such as "weights 22.2, activations 2.4, rest 0.1"."""
    known = sorted((part for part in parts if abs(part.gib) >= _SMALLEST_GIB), key=lambda part: -part.gib)
    rest = sum(part.gib for part in parts) - sum(part.gib for part in known)
    words = [f"{part.name} {part.gib:.1f}" for part in known]
    return ", ".join(words + [f"rest {rest:.1f}"] * (rest >= _SMALLEST_GIB))


def stage_words(stage: StagePeak) -> str:
    """Return one stage's total with its parts."""
    return f"{stage.total:.1f} GiB: {parts_words(stage.parts)}"
