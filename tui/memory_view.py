"""A memory forecast as what a bar shows: a few segments, what is free, and a verdict. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorasmith.engine.memory.forecast import Forecast

_SEGMENTS = ("weights", "LoRA", "optimizer", "activations", "reserve")
_GROUPS = {
    "weights": "weights",
    "dequantizing": "weights",
    "encoders": "weights",
    "autoencoder": "weights",
    "adapter": "LoRA",
    "gradients": "LoRA",
    "average": "LoRA",
    "optimizer": "optimizer",
    "activations": "activations",
    "updating": "activations",
}
"""Which segment a part of the forecast belongs to; all others are the reserve: context and slack."""
_LEAST_GIB = 0.05


@dataclass(frozen=True)
class MemoryView:
    """What the bar shows: named parts in GiB, the card's free GiB, a verdict of `VERDICT_WORDS`, and a note in words.

    Without parts only the note is shown.
    """

    segments: tuple[tuple[str, float], ...] = ()
    free_gib: float | None = None
    verdict: str = ""
    note: str = ""

    @property
    def peak_gib(self) -> float:
        """What the largest stage takes."""
        return sum(gib for _, gib in self.segments)


def view_of(forecast: Forecast, free_gib: float | None, verdict: str) -> MemoryView:
    """Return a forecast as a bar: the parts of a step, and what the stage that needs most takes beyond that."""
    sizes = dict.fromkeys(_SEGMENTS, 0.0)
    for part in forecast.step.parts:
        sizes[_GROUPS.get(part.name, "reserve")] += part.gib
    segments = [(name, gib) for name, gib in sizes.items() if gib >= _LEAST_GIB]
    beyond = forecast.peak.total - forecast.step.total
    if beyond >= _LEAST_GIB:
        segments.append((f"more for {forecast.peak.stage}", beyond))
    return MemoryView(tuple(segments), free_gib, verdict)
