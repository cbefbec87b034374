"""What fits on which size of card: every size of every family, with its preset, on a usual machine of each tier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasmith.engine.advisor import as_layers, goals, recommend
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.families import families
from lorasmith.engine.fit import Fit, Room, solve
from lorasmith.engine.memory import ModelMemory, model_memories
from lorasmith.engine.run_file import resolve_config
from lorasmith.engine.step_time import card_speed

if TYPE_CHECKING:
    from lorasmith.engine.families import FamilySpec

_TAKEN_GIB = 0.6
"""What a desktop and the driver usually take of a card's memory."""
_SYSTEM_GIB = 4.0
_PICTURES = 20
_DISK_GIB = 100.0


@dataclass(frozen=True)
class Tier:
    """A size of graphics memory in GB, a usual card of that size, and the main memory of a usual machine around it."""

    vram_gb: int
    card: str
    ram_gb: int


TIERS = (
    Tier(6, "GeForce RTX 2060", 32),
    Tier(8, "GeForce RTX 4060", 32),
    Tier(10, "GeForce RTX 3080", 32),
    Tier(12, "GeForce RTX 3060", 32),
    Tier(16, "GeForce RTX 5070 Ti", 32),
    Tier(20, "RTX 4000 Ada Generation", 64),
    Tier(24, "GeForce RTX 4090", 64),
    Tier(32, "GeForce RTX 5090", 64),
    Tier(48, "L40S", 128),
    Tier(80, "H100 80GB HBM3", 128),
)


@dataclass(frozen=True)
class TierPlan:
    """What became of one size of a family on one tier: its plan, or the reason why there is none."""

    family: str
    label: str
    tier: Tier
    goal: str
    fit: Fit | None
    resolution: int
    reason: str
    hub: str = ""
    steps: int = 0
    parameters: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values, sizes in GiB and times in seconds a step."""
        found: dict[str, Any] = {
            "family": self.family,
            "model": self.label,
            "vram_gb": self.tier.vram_gb,
            "card": self.tier.card,
            "goal": self.goal,
            "resolution": self.resolution,
            "reason": self.reason,
        }
        if self.fit is None:
            return found | {"verdict": "unknown"}
        fit, peak = self.fit, self.fit.forecast.peak
        return found | {
            "verdict": fit.verdict,
            "settings": dict(fit.settings),
            "switches": [switch.words for switch in fit.switches],
            "peak": {"stage": peak.stage, "gib": round(peak.total, 2)},
            "seconds": {"usual": fit.time.seconds, "low": fit.time.low, "high": fit.time.high},
            "nearest": fit.nearest,
        }


def tier_plans(family: str = "", tiers: Sequence[Tier] = TIERS, goal: str = "") -> list[TierPlan]:
    """Return the plan of every derived size of `family` (all families: "") on each tier, for a goal of its preset.

    Raises ConfigError for a family or goal that there is not.
    """
    return [
        _plan(spec, model, tier, room_of(tier), wanted)
        for spec, model, wanted in _models(family, goal)
        for tier in tiers
    ]


def plans_for(room: Room, vram_gb: int) -> list[TierPlan]:
    """Return the plan of every derived size of every family in `room`, on a card of `vram_gb`; smallest first."""
    plans = [_plan(spec, model, tier_of(vram_gb), room, goal) for spec, model, goal in _models("", "")]
    return sorted(plans, key=lambda plan: plan.parameters)


def _models(family: str, goal: str) -> Iterator[tuple[FamilySpec, ModelMemory, str]]:
    known = families()
    if family and family not in known:
        raise ConfigError(f"Unknown family {family}.", fix=f"Known families: {', '.join(sorted(known))}.")
    for name in [family] if family else known:
        wanted = goal or goals(name)[0]
        for model in model_memories(name):
            yield known[name].SPEC, model, wanted


def tier_of(vram_gb: int) -> Tier:
    """Return the tier of a card with so much memory: the next smaller one's machine, with this memory."""
    below = [tier for tier in TIERS if tier.vram_gb <= vram_gb] or [TIERS[0]]
    return Tier(vram_gb, below[-1].card, below[-1].ram_gb)


def room_of(tier: Tier) -> Room:
    """Return what is free on the tier's usual machine."""
    return Room(tier.vram_gb - _TAKEN_GIB, tier.ram_gb - _SYSTEM_GIB, _DISK_GIB, card_speed(tier.card))


def _plan(spec: FamilySpec, model: ModelMemory, tier: Tier, room: Room, goal: str) -> TierPlan:
    from lorasmith.engine.memory.forecast import Subject

    advice = recommend(spec.name, goal, _PICTURES, spec.default_resolution, float(tier.vram_gb))
    config = resolve_config(as_layers(advice)).config
    resolution = config.dataset.resolution
    subject = Subject(config, spec, model, resolution**2 / 1e6, number_of_pictures=_PICTURES)
    found = TierPlan(
        spec.name, model.label, tier, goal, None, resolution, "", model.hub, config.train.steps, model.parameters
    )
    try:
        fit = solve(subject, room)
    except ConfigError as error:
        return replace(found, reason=error.why or error.what)
    resolution = fit.settings.get("dataset.resolution", resolution)
    reason = fit.reason if fit.verdict != "no" or not fit.nearest else f"{fit.reason}: {fit.nearest}"
    return replace(found, fit=fit, resolution=resolution, reason=reason)
