"""The fastest plan that fits: which levers are tried in which order, and how most of them are never looked at.

A plan's cost is its time, multiplied by what it gives up in quality (`_WORTH`). Shares of checkpointed blocks and
swapped blocks of one combination are tried by rising time; what did not fit rules out everything that saves less.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from lorasmith.engine.combinations import contradictions
from lorasmith.engine.fit.levers import Choices, Levers, with_levers
from lorasmith.engine.step_time import CardSpeed, StepParts, usual_parts

if TYPE_CHECKING:
    from lorasmith.engine.memory.forecast import Forecast, Subject

_WORTH = {"none": 1.0, "int8": 1.15, "fp8": 1.15, "nf4": 1.35}
"""How much slower a plan may be before the base is kept in fewer bits instead, since every bit less moves the base
away from the model that the LoRA is used on: a judgement, and the order of sacrifice."""
_MATMUL_WORTH = 1.15
_LORA_WORTH = 1.1
_OPTIMIZER_WORTH = 1.05
_OFFLOAD_WORTH = 1.05
"""The same for rounding the products too, for a LoRA that computes in the base's 16 bits, as in most trainers, for an
optimizer in 8 bits, and for main memory that other programs could use."""


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
    lacked_ram: bool = False
    _known: dict[Levers, Forecast] = field(default_factory=dict)
    _parts: dict[Levers, StepParts] = field(default_factory=dict)
    _swapped: dict[tuple[str, bool, bool, int], int] = field(default_factory=dict)

    def starting_from(self, choices: Choices) -> Problem:
        """Return the same run with other choices; nothing is known of its plans yet."""
        return Problem(self.subject, self.card, choices, self.ask)

    def forecast(self, levers: Levers) -> Forecast:
        """Return what a plan takes."""
        known = self._known.get(levers)
        if known is None:
            known = self._known[levers] = self.ask(with_levers(self.subject, levers))
        return known

    def seconds(self, levers: Levers) -> float:
        """Return the estimated seconds of a step, not calibrated."""
        return self.parts(levers).seconds(levers.checkpointed, levers.swapped)

    def parts(self, levers: Levers) -> StepParts:
        """Return the time of a step as a function of checkpointed and swapped blocks."""
        plain = replace(levers, checkpointed=0.0, swapped=0)
        known = self._parts.get(plain)
        if known is None:
            known = self._parts[plain] = usual_parts(with_levers(self.subject, plain), self.card)
        return known

    def candidate(self, levers: Levers) -> Candidate:
        """Return a plan with its forecast and time."""
        seconds = self.seconds(levers)
        return Candidate(levers, self.forecast(levers), seconds, seconds * worth(levers, self.choices.start))

    def most_swapped(self, levers: Levers, limits: Limits) -> int:
        """Return for how many swapped blocks there is main memory, all else as in `levers`; -1: for none at all."""
        key = (levers.quantize, levers.apart, levers.offload, levers.batch)
        if key not in self._swapped:
            low, high = -1, len(self.choices.swapped) - 1
            while low < high:
                middle = (low + high + 1) // 2
                plan = replace(levers, checkpointed=self.choices.checkpointed[-1], swapped=self.choices.swapped[middle])
                low, high = (middle, high) if self.forecast(plan).ram_gib <= limits.ram_gib else (low, middle - 1)
            self._swapped[key] = self.choices.swapped[low] if low >= 0 else -1
        return self._swapped[key]

    def contradicts(self, levers: Levers) -> bool:
        """Tell whether the plan breaks a rule that the settings as they are do not break."""
        before = contradictions(self.subject.config)
        return any(problem not in before for problem in contradictions(with_levers(self.subject, levers).config))


def fastest(problem: Problem, limits: Limits) -> Candidate | None:
    """Return the plan of the least cost that fits, with no lever pulled that is not needed; None where none fits."""
    choices = problem.choices
    found = None
    if _impossible(problem, limits):
        return None
    # What lies apart waits in main memory: the other way can only be better where that is what lacks.
    for apart in choices.apart[-1:] + choices.apart[:-1]:
        if apart != choices.apart[-1] and not problem.lacked_ram:
            break
        base = replace(choices.start, apart=apart, tiles=choices.tiles[-1], quantize_text=choices.quantize_text[-1])
        found = _search(problem, limits, base, found) or found
    return None if found is None else _relaxed(problem, limits, _multiplying(problem, limits, found))


def _impossible(problem: Problem, limits: Limits) -> bool:
    """Tell whether even the plans that take least of the card and of main memory do not fit."""
    choices, least = problem.choices, smallest(problem)
    if limits.lacking(least.forecast) in ("vram", "disk"):
        return True
    light = replace(least.levers, swapped=choices.swapped[0], offload=choices.offload[0], apart=choices.apart[0])
    return problem.forecast(light).ram_gib > limits.ram_gib


def smallest(problem: Problem) -> Candidate:
    """Return the plan that takes the least of the card's memory."""
    choices = problem.choices
    corners = []
    for apart in choices.apart:
        batch, accumulation = choices.batches[-1]
        levers = Levers(
            checkpointed=choices.checkpointed[-1],
            quantize=choices.quantize[-1],
            quantize_text=choices.quantize_text[-1],
            matmul=choices.matmul[choices.quantize[-1]][0],
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


def _search(problem: Problem, limits: Limits, base: Levers, best: Candidate | None) -> Candidate | None:
    """Return the cheapest plan that is cheaper than `best`."""
    for bound, levers in sorted(_combinations(problem, base), key=lambda pair: pair[0]):
        if best is not None and bound >= best.cost:
            break
        best = _staircase(problem, limits, levers, best) or best
    return best


def _combinations(problem: Problem, base: Levers) -> Iterator[tuple[float, Levers]]:
    """Yield each choice of everything but checkpointed and swapped blocks, with the least that it can cost."""
    choices = problem.choices
    for quantize, lora, batch, optimizer, offload in itertools.product(
        choices.quantize, choices.lora, choices.batches, choices.optimizer, choices.offload
    ):
        levers = replace(
            base,
            quantize=quantize,
            matmul=choices.matmul[quantize][0],
            lora=lora,
            batch=batch[0],
            accumulation=batch[1],
            optimizer=optimizer,
            offload=offload,
            checkpointed=choices.checkpointed[0],
            swapped=choices.swapped[0],
        )
        yield problem.seconds(levers) * worth(levers, choices.start), levers


def _staircase(problem: Problem, limits: Limits, levers: Levers, best: Candidate | None) -> Candidate | None:
    """Return the fastest share of checkpointed and number of swapped blocks that fits and is cheaper than `best`.

    The pairs are ordered by cost, then by swapped blocks, which lean on the rest of the machine. If nothing up to some
    place fits, nothing before it does, so the first that fits is found by halving; and whether something up to a place
    fits, those tell that save most.
    """

    def lacking(pair: _Pair) -> str:
        plan = replace(levers, checkpointed=pair.share, swapped=pair.swapped)
        return limits.lacking(problem.forecast(plan))

    def any_fits(some: Sequence[_Pair]) -> bool:
        return any(not lacking(pair) for pair in _saving_most(some))

    pairs = _pairs(problem, levers, math.inf if best is None else best.cost)
    if any(lacking(pair) == "ram" for pair in _saving_most(pairs)):
        problem.lacked_ram = True
        most = problem.most_swapped(levers, limits)
        pairs = [pair for pair in pairs if pair.swapped <= most]
    if not any_fits(pairs):
        return None
    low, high = 0, len(pairs) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if any_fits(pairs[: middle + 1]) else (middle + 1, high)
    plan = replace(levers, checkpointed=pairs[low].share, swapped=pairs[low].swapped)
    return None if problem.contradicts(plan) else problem.candidate(plan)


class _Pair(NamedTuple):
    cost: float
    """In hundredths of the least cost: what differs by less counts as equal."""
    swapped: int
    share: float


def _pairs(problem: Problem, levers: Levers, below: float) -> list[_Pair]:
    """Return the pairs of checkpointed share and swapped blocks that cost less than `below`, cheapest first."""
    choices, parts = problem.choices, problem.parts(levers)
    weight = worth(levers, choices.start)
    unit = parts.seconds(0.0, 0) * weight / 100
    found = []
    for swapped in choices.swapped:
        covered = swapped / max(1, parts.blocks)
        for share in choices.checkpointed:
            # Swapped blocks are checkpointed anyway: a share that covers no more says nothing.
            if (0 < share <= covered and 0.0 in choices.checkpointed) or (levers.offload and not share):
                continue
            cost = parts.seconds(share, swapped) * weight
            if cost < below:
                found.append(_Pair(round(cost / unit), swapped, share))
    return sorted(found)


def _saving_most(pairs: Sequence[_Pair]) -> list[_Pair]:
    """Return the pairs that no other one exceeds in both the share and the number of swapped blocks."""
    largest: list[_Pair] = []
    for pair in sorted(pairs, key=lambda pair: (-pair.share, -pair.swapped)):
        if not largest or pair.swapped > largest[-1].swapped:
            largest.append(pair)
    return largest


def _multiplying(problem: Problem, limits: Limits, found: Candidate) -> Candidate:
    """Return the plan with products in 8 bits, where the base is kept in 8 bits anyway and that is clearly faster."""
    if True not in problem.choices.matmul[found.levers.quantize]:
        return found
    plan = replace(found.levers, matmul=True)
    if problem.seconds(plan) * _MATMUL_WORTH > found.seconds or limits.lacking(problem.forecast(plan)):
        return found
    return problem.candidate(plan)


def _relaxed(problem: Problem, limits: Limits, found: Candidate) -> Candidate:
    """Return the plan without the levers that cost no time while training and are not needed, the dearest first."""
    choices, levers = problem.choices, found.levers
    plans = (
        replace(levers, quantize_text=text, tiles=tiles, apart=apart)
        for text, tiles, apart in itertools.product(choices.quantize_text, choices.tiles, choices.apart)
    )
    fitting = (plan for plan in plans if not limits.lacking(problem.forecast(plan)))
    return problem.candidate(next(fitting, levers))


def worth(levers: Levers, start: Levers) -> float:
    """Return what a plan's time is multiplied by for what it gives up."""
    weight = _WORTH[levers.quantize]
    weight *= _LORA_WORTH if levers.lora == "base" else 1.0
    weight *= _OFFLOAD_WORTH if levers.offload else 1.0
    return weight * (_OPTIMIZER_WORTH if levers.optimizer != start.optimizer else 1.0)
