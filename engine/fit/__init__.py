"""The fit solver: the fastest way to train a base model on a card, and what each step of it costs. Torch-free.

Quality comes first: the base model is kept in fewer bits only where that is needed or clearly faster, and the
resolution is lowered last, never where the user set it. `levers` are what can be done, `search` finds the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lorasmith.engine.advisor import Advice
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.fit.levers import choices, levers_of, with_levers
from lorasmith.engine.fit.search import Candidate, Limits, Problem, fastest, smallest
from lorasmith.engine.fit.words import Switch as Switch
from lorasmith.engine.fit.words import gib, nearest_change, reason_words, switches_of
from lorasmith.engine.step_time import CardSpeed, StepTime, step_seconds

if TYPE_CHECKING:
    from lorasmith.engine.memory.forecast import Forecast, Subject

Verdict = Literal["fits", "tight", "no"]
MARGIN_SHARE, MARGIN_GIB = 0.05, 0.25
"""What a plan that fits leaves of the card's free memory, the larger of the two, for what other programs take
meanwhile: a run over 95 % is called tight. What the allocator takes is the forecast's own slack."""
_SOURCE = "lorasmith's forecast for this card"


@dataclass(frozen=True)
class Room:
    """What is free on this machine in GiB, the card's data sheet, and how far measurements were from forecasts here.

    `unusable` are choices that do not work on this machine, as (key, value). `fast_products` are the formats in which
    `memory.quantized_matmul` was measured to be faster here than widening the weights (`engine.doctor`).
    """

    vram_gib: float
    ram_gib: float
    disk_gib: float
    card: CardSpeed | None
    memory_calibration: float = 1.0
    seconds_calibration: float = 1.0
    unusable: frozenset[tuple[str, Any]] = frozenset()
    fast_products: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Fit:
    """The plan: which settings change, what each switch costs, what it all takes, and in words why.

    With the verdict `no`, `settings` are those that come closest, and `nearest` is the change that would fit.
    """

    verdict: Verdict
    settings: Mapping[str, Any]
    switches: tuple[Switch, ...]
    forecast: Forecast
    time: StepTime
    reason: str
    nearest: str


def margin_gib(free_gib: float) -> float:
    """Return what a plan that fits leaves of so much free memory."""
    return max(MARGIN_SHARE * free_gib, MARGIN_GIB)


def judge(found: Forecast, room: Room) -> Verdict:
    """Return whether a run as forecast fits into `room`: with its margin, without it, or not at all."""
    full = Limits(room.vram_gib, room.ram_gib, room.disk_gib)
    if not replace(full, margin_gib=margin_gib(room.vram_gib)).lacking(found):
        return "fits"
    return "no" if full.lacking(found) else "tight"


def solve(subject: Subject, room: Room, fixed: frozenset[str] = frozenset()) -> Fit:
    """Return the fastest plan that fits into `room` in every stage; `fixed` keys keep their values.

    Raises ConfigError where the memory of this model and these settings is not known.
    """
    from lorasmith.engine.memory.forecast import can_forecast, forecast

    if room.memory_calibration != 1.0:
        subject = replace(subject, calibration=room.memory_calibration)
    unknown = can_forecast(subject)
    if unknown:
        raise ConfigError("There is no memory forecast for this run.", why=unknown, fix="Choose the settings yourself.")
    problem = Problem(
        subject, room.card, choices(subject, room.card, fixed, room.unusable, room.fast_products), forecast
    )
    full = Limits(room.vram_gib, room.ram_gib, room.disk_gib)
    roomy = replace(full, margin_gib=margin_gib(room.vram_gib))
    found = fastest(problem, roomy)
    if found is not None:
        return _fit("fits", problem, room, found, full, fixed)
    found = fastest(problem, full)
    if found is not None:
        return _fit("tight", problem, room, found, full, fixed)
    return _lower(problem, room, roomy) or _fit("no", problem, room, smallest(problem), full, fixed)


def _lower(problem: Problem, room: Room, roomy: Limits) -> Fit | None:
    """Return the plan with the highest lower resolution that fits, where the resolution may be lowered."""
    for side in problem.choices.resolutions:
        start = replace(problem.choices.start, resolution=side)
        lower = problem.starting_from(replace(problem.choices, start=start))
        found = fastest(lower, roomy)
        if found is not None:
            return _fit("fits", lower, room, found, roomy, frozenset())
    return None


def _fit(
    verdict: Verdict, problem: Problem, room: Room, found: Candidate, limits: Limits, fixed: frozenset[str]
) -> Fit:
    now = levers_of(problem.subject.config).key_values()
    wanted = {key: value for key, value in found.levers.key_values().items() if value != now.get(key)}
    chosen = with_levers(problem.subject, found.levers)
    nearest = ""
    if verdict != "fits":
        nearest = nearest_change(problem, found, limits, margin_gib(room.vram_gib), fixed)
    return Fit(
        verdict=verdict,
        settings=wanted,
        switches=switches_of(problem, found),
        forecast=found.forecast,
        time=step_seconds(chosen, room.card, room.seconds_calibration),
        reason=reason_words(verdict, found.forecast, limits),
        nearest=nearest,
    )


def fit_advice(fit: Fit) -> list[Advice]:
    """Return the settings of a plan as advice, each with its reason in GiB and time."""
    by_key = {switch.key: switch for switch in fit.switches}
    peak = fit.forecast.peak
    room = f"There is room without it: the most that a stage takes is {gib(peak.total)} ({peak.stage})."
    advice = []
    for key, value in fit.settings.items():
        switch = by_key.get(key)
        why = f"{switch.words[0].upper()}{switch.words[1:]}." if switch is not None else room
        advice.append(Advice(key, value, why, _SOURCE, "fit"))
    return advice
