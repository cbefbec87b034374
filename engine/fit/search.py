"""The fastest plan that fits: which levers are tried in which order, and how most of them are never looked at.

A plan's cost is its time, multiplied by what it gives up in quality (`_WORTH`). Shares of checkpointed blocks and
swapped blocks of one combination are tried by rising time; what did not fit rules out everything that saves less.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorasmith.engine.combinations import contradictions
from lorasmith.engine.fit.levers import Choices, Levers, with_levers
from lorasmith.engine.step_time import CardSpeed, usual_seconds

if TYPE_CHECKING:
    from lorasmith.engine.memory.forecast import Forecast, Subject

_WORTH = {"none": 1.0, "int8": 1.15, "fp8": 1.15, "nf4": 1.35}
"""How much slower a plan may be before the base is kept in fewer bits instead, since every bit less moves the base
away from the model that the LoRA is used on: a judgement, and the order of sacrifice."""
_MATMUL_WORTH = 1.1
_LORA_WORTH = 1.1
"""The same for rounding the products too, and for a LoRA that computes in the base's 16 bits, as most trainers do."""


@dataclass(frozen=True)
class Limits:
    """What a plan may take, in GiB, and how much of the card's memory stays free."""

    vram_gib: float
    ram_gib: float
    disk_gib: float
    margin_gib: float = 0.0

    def lacking(self, forecast: Forecast) -> str:
        """Return what the plan takes too much of: `vram`, `ram` or `disk`; "" where it fits."""
        if forecast.peak.total > self.vram_gib - self.margin_gib:
            return "vram"
        if forecast.ram_gib > self.ram_gib:
            return "ram"
        return "disk" if forecast.disk_gib > self.disk_gib else ""


@dataclass(frozen=True)
class Candidate:
    """A plan that was looked at: `cost` is its time weighted by quality, in seconds."""

    levers: Levers
    forecast: Forecast
    seconds: float
    cost: float


@dataclass
class Problem:
    """One run on one card, and what is known of its plans so far; a plan is forecast once."""

    subject: Subject
    card: CardSpeed | None
    choices: Choices
    ask: Callable[[Subject], Forecast]
    _known: dict[Levers, Forecast] = field(default_factory=dict)

    def forecast(self, levers: Levers) -> Forecast:
        """Return what a plan takes."""
        known = self._known.get(levers)
        if known is None:
            known = self._known[levers] = self.ask(with_levers(self.subject, levers))
        return known

    def seconds(self, levers: Levers) -> float:
        """Return the estimated seconds of a step, not calibrated."""
        return usual_seconds(with_levers(self.subject, levers), self.card)

    def candidate(self, levers: Levers) -> Candidate:
        """Return a plan with its forecast and time."""
        seconds = self.seconds(levers)
        return Candidate(levers, self.forecast(levers), seconds, seconds * _worth(levers))

    def contradicts(self, levers: Levers) -> bool:
        """Tell whether the plan breaks a rule that the settings as they are do not break."""
        before = contradictions(self.subject.config)
        return any(problem not in before for problem in contradictions(with_levers(self.subject, levers).config))


def fastest(problem: Problem, limits: Limits) -> Candidate | None:
    """Return the plan of the least cost that fits, with no lever pulled that is not needed; None where none fits.

    First without keeping activations in main memory and with the optimizer as it is, then with an 8-bit one, then with
    activations in main memory too.
    """
    choices = problem.choices
    for optimizer, offload in itertools.product(choices.optimizer, choices.offload):
        for apart in reversed(choices.apart):
            base = replace(
                choices.start,
                optimizer=optimizer,
                offload=offload,
                apart=apart,
                tiles=choices.tiles[-1],
                quantize_text=choices.quantize_text[-1],
            )
            found = _search(problem, limits, base)
            if found is not None:
                return _relaxed(problem, limits, found)
    return None


def smallest(problem: Problem) -> Candidate:
    """Return the plan that takes the least of the card's memory."""
    choices = problem.choices
    corners = []
    for (quantize, matmul), apart in itertools.product(choices.quantize[-2:], choices.apart):
        batch, accumulation = choices.batches[-1]
        levers = Levers(
            checkpointed=choices.checkpointed[-1],
            quantize=quantize,
            quantize_text=choices.quantize_text[-1],
            matmul=matmul,
            swapped=choices.swapped[-1],
            offload=choices.offload[-1],
            lora=choices.lora[-1],
            apart=apart,
            tiles=choices.tiles[-1],
            optimizer=choices.optimizer[-1],
            batch=batch,
            accumulation=accumulation,
            resolution=choices.start.resolution,
        )
        corners.append(problem.candidate(levers))
    return min(corners, key=lambda candidate: candidate.forecast.peak.total)


def _search(problem: Problem, limits: Limits, base: Levers) -> Candidate | None:
    best: Candidate | None = None
    for bound, levers in sorted(_combinations(problem, base), key=lambda pair: pair[0]):
        if best is not None and bound >= best.cost:
            break
        found = _staircase(problem, limits, levers, best)
        best = found or best
    return best


def _combinations(problem: Problem, base: Levers) -> Iterator[tuple[float, Levers]]:
    """Yield each format of base and LoRA and each split of the batch, with the least that it can cost."""
    choices = problem.choices
    checkpointed, swapped = choices.checkpointed[0], choices.swapped[0]
    for (quantize, matmul), lora, (batch, accumulation) in itertools.product(
        choices.quantize, choices.lora, choices.batches
    ):
        levers = replace(
            base,
            quantize=quantize,
            matmul=matmul,
            lora=lora,
            batch=batch,
            accumulation=accumulation,
            checkpointed=checkpointed,
            swapped=swapped,
        )
        if not problem.contradicts(levers):
            yield problem.seconds(levers) * _worth(levers), levers


def _staircase(problem: Problem, limits: Limits, levers: Levers, best: Candidate | None) -> Candidate | None:
    """Return the fastest share of checkpointed and number of swapped blocks that fits and is cheaper than `best`."""
    choices = problem.choices
    most = replace(levers, checkpointed=choices.checkpointed[-1], swapped=choices.swapped[-1])
    if limits.lacking(problem.forecast(most)) == "vram":
        return None
    worth = _worth(levers)
    pairs = [
        replace(levers, checkpointed=share, swapped=swapped)
        for share, swapped in itertools.product(choices.checkpointed, choices.swapped)
        if share or not levers.offload
    ]
    timed = [(problem.seconds(plan) * worth, plan.changes(choices.start), index) for index, plan in enumerate(pairs)]
    too_little: list[Levers] = []
    for cost, _, index in sorted(timed):
        plan = pairs[index]
        if best is not None and cost >= best.cost:
            return None
        if any(plan.checkpointed <= old.checkpointed and plan.swapped <= old.swapped for old in too_little):
            continue
        lacking = limits.lacking(problem.forecast(plan))
        if not lacking:
            return problem.candidate(plan)
        if lacking == "vram":
            too_little.append(plan)
    return None


def _relaxed(problem: Problem, limits: Limits, found: Candidate) -> Candidate:
    """Return the plan without the levers that cost no time while training and are not needed, the dearest first."""
    choices = problem.choices
    tries = (
        ("quantize_text", choices.quantize_text),
        ("tiles", choices.tiles),
        ("apart", choices.apart),
    )
    for name, values in tries:
        for value in values:
            plan = replace(found.levers, **{name: value})
            if not limits.lacking(problem.forecast(plan)):
                found = problem.candidate(plan)
                break
    return found


def _worth(levers: Levers) -> float:
    worth = _WORTH[levers.quantize]
    worth *= _MATMUL_WORTH if levers.matmul else 1.0
    return worth * (_LORA_WORTH if levers.lora == "base" else 1.0)
