"""What a rehearsal measured, beside what was forecast. Torch-free, so that the wizard can show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasmith.engine.disk_plan import plan_disk
from lorasmith.engine.memory.forecast import Forecast, Stage

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.dataset.buckets import BucketPlan


@dataclass(frozen=True)
class StageMeasure:
    """One stage as it went: its peak in GiB beside the forecast (0: none), its seconds, and what was amiss in words."""

    stage: Stage
    gib: float
    seconds: float
    forecast_gib: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class RehearsalProgress:
    """A line to show while a rehearsal runs: the stage that works, or with `measured` the one that is done."""

    stage: Stage
    message: str
    measured: StageMeasure | None = None


@dataclass(frozen=True)
class Rehearsal:
    """What each stage of a run took when it was tried once.

    `device` is where, `size` the largest pictures, e.g. "1024x1024"; `measured_by` says what the figures are;
    `seconds_per_step` is that of the largest pictures, and `total_seconds` what the whole run takes at that pace.
    `calibrated` tells that later forecasts on this card are corrected by it.
    """

    device: str
    size: str
    measured_by: str
    stages: tuple[StageMeasure, ...]
    forecast: Forecast | None
    forecast_note: str
    seconds_per_step: float
    total_seconds: float
    calibrated: bool

    @property
    def peak(self) -> StageMeasure:
        """The stage that took most."""
        return max(self.stages, key=lambda stage: stage.gib)

    def to_json(self) -> dict[str, Any]:
        """Return the rehearsal as JSON-ready values."""
        return {
            "device": self.device,
            "size": self.size,
            "measured_by": self.measured_by,
            "stages": {
                stage.stage: {
                    "gib": round(stage.gib, 3),
                    "forecast_gib": round(stage.forecast_gib, 3) if stage.forecast_gib else None,
                    "seconds": round(stage.seconds, 3),
                    "note": stage.note,
                }
                for stage in self.stages
            },
            "forecast": None if self.forecast is None else self.forecast.to_json(),
            "forecast_note": self.forecast_note,
            "seconds_per_step": round(self.seconds_per_step, 4),
            "total_seconds": round(self.total_seconds, 1),
            "calibrated": self.calibrated,
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return the rehearsal as (label, words)."""
        rows: list[tuple[str, str]] = [(stage.stage, measure_words(stage)) for stage in self.stages]
        pace = f"{self.seconds_per_step:.3g} s a step with the largest pictures ({self.size})"
        rows += [
            ("peak", f"{self.peak.gib:.2f} GiB in the stage “{self.peak.stage}”, on {self.device}: {self.measured_by}"),
            ("time", f"at most about {time_words(self.total_seconds)} for the whole run: {pace}"),
        ]
        if self.forecast is None:
            rows.append(("forecast", self.forecast_note))
        if self.calibrated:
            rows.append(("from now on", "forecasts for this card are corrected by what was measured"))
        return rows


def measure_words(measure: StageMeasure) -> str:
    """Return one stage in words, such as "6.12 GiB (forecast 6.0), 4.1 s"."""
    told = f" (forecast {measure.forecast_gib:.1f})" if measure.forecast_gib else ""
    note = f"; {measure.note}" if measure.note else ""
    return f"{measure.gib:.2f} GiB{told}, {measure.seconds:.3g} s{note}"


def time_words(seconds: float) -> str:
    """Return a length of time for people, such as "1 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def estimate_total(config: RunConfig, plan: BucketPlan, seconds: Mapping[str, float], loading: float) -> float:
    """Return the seconds of a run, as if every step were one of the largest pictures.

    `seconds` are those of one `picture` and `prompt` to encode, `step`, `preview` and `save`; what lacks takes none.
    Each picture has one prompt; those that are shuffled anew each time are left out.
    """
    steps, every = config.train.steps, config.checkpoints.every
    saves = (steps // every if every else 0) + 1
    previews = plan_disk(config, 0).num_previews
    counts = {
        "picture": len(plan.samples),
        "prompt": len(plan.views),
        "step": steps,
        "preview": previews,
        "save": saves,
    }
    return loading + sum(seconds.get(name, 0.0) * count for name, count in counts.items())
