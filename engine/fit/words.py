"""What a plan's switches cost, and why something does not fit, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasmith.engine.fit.levers import FIELDS, Levers, choices
from lorasmith.engine.fit.search import Candidate, Limits, Problem, smallest

if TYPE_CHECKING:
    from lorasmith.engine.memory.forecast import Forecast

_FREED_BY_LEVERS = ("memory.quantize", "memory.swapped_blocks", "train.gradient_checkpointing", "train.batch_size")
_SMALLEST_SIDE = 256
_NOTHING_GIB = 0.05


@dataclass(frozen=True)
class Switch:
    """One lever of a plan: what the plan would take more without it, and how much faster it would be.

    `saves_gib` is the difference in a step, or where that is none in the stage where it is largest; `slower` 0.09 means
    9 % more time.
    """

    key: str
    value: Any
    saves_gib: float
    slower: float
    words: str


def gib(size: float) -> str:
    """Return a size as `9.1 GiB`."""
    return f"{size:.1f} GiB"


def switches_of(problem: Problem, found: Candidate) -> tuple[Switch, ...]:
    """Return every lever that is pulled in the plan, with its own cost by leaving it out; the largest saving first."""
    switches = []
    for key, without, label in _pulled(found.levers, problem):
        other = problem.forecast(without)
        seconds = problem.seconds(without)
        saved = _saving(found.forecast, other)
        # What multiplying in few bits gains is a switch of its own.
        own = found.levers if key != FIELDS["quantize"] else replace(found.levers, matmul=False)
        slower = problem.seconds(own) / seconds - 1
        value = found.levers.key_values()[key]
        switches.append(Switch(key, value, saved, slower, f"{label}: {_saved(saved)}, {_slower(slower)}"))
    return tuple(sorted(switches, key=lambda switch: -switch.saves_gib))


def _saving(plan: Forecast, without: Forecast) -> float:
    before = {stage.stage: stage.total for stage in without.stages}
    saved = {stage.stage: before.get(stage.stage, 0.0) - stage.total for stage in plan.stages}
    return saved["step"] if saved["step"] > _NOTHING_GIB else max(saved.values())


def _pulled(plan: Levers, problem: Problem) -> Iterator[tuple[str, Levers, str]]:
    """Yield each lever that is pulled: its key, the plan without it, and its name."""
    start, blocks = problem.choices.start, problem.subject.model.num_blocks
    wanted = problem.subject.config.dataset.resolution
    if plan.checkpointed:
        part = "" if plan.checkpointed == 1 else f" of {plan.checkpointed:.0%} of the blocks"
        without = replace(plan, checkpointed=0.0, offload=False)
        yield "train.gradient_checkpointing", without, f"gradient checkpointing{part}"
    if plan.quantize != "none":
        yield FIELDS["quantize"], replace(plan, quantize="none", matmul=False), f"base model in {plan.quantize}"
    if plan.matmul:
        yield FIELDS["matmul"], replace(plan, matmul=False), f"multiplying in {plan.quantize}"
    if plan.swapped:
        # Swapped blocks are checkpointed: that is another lever's saving.
        share = max(plan.checkpointed, min(1.0, plan.swapped / blocks))
        yield FIELDS["swapped"], replace(plan, swapped=0, checkpointed=share), f"block swap {plan.swapped}"
    if plan.offload:
        yield FIELDS["offload"], replace(plan, offload=False), "activations in main memory"
    if plan.lora == "base":
        yield FIELDS["lora"], replace(plan, lora="fp32"), "LoRA in the base's 16 bits"
    if plan.apart:
        yield FIELDS["apart"], replace(plan, apart=False), "one part on the card at a time"
    if plan.tiles:
        yield FIELDS["tiles"], replace(plan, tiles=False), "pictures in tiles"
    if plan.quantize_text != "none":
        yield FIELDS["quantize_text"], replace(plan, quantize_text="none"), f"text encoders in {plan.quantize_text}"
    if plan.optimizer != start.optimizer:
        yield FIELDS["optimizer"], replace(plan, optimizer=start.optimizer), f"optimizer {plan.optimizer}"
    if plan.resolution != wanted:
        yield FIELDS["resolution"], replace(plan, resolution=wanted), f"{plan.resolution} instead of {wanted} pixels"
    if plan.batch != start.batch:
        whole = replace(plan, batch=start.batch, accumulation=start.accumulation)
        yield FIELDS["batch"], whole, f"batch {start.batch} as {plan.accumulation} × {plan.batch}"


def _saved(amount: float) -> str:
    return "no memory" if abs(amount) < _NOTHING_GIB else f"{-amount:+.1f} GiB".replace("-", "−")


def _slower(share: float) -> str:
    if abs(share) < 0.005:
        return "no time"
    return f"{100 * share:+.0f} % time".replace("-", "−")


def reason_words(verdict: str, forecast: Forecast, limits: Limits) -> str:
    """Return in a sentence what a plan takes of what is free, and where it does not fit why."""
    peak = forecast.peak
    takes = f"needs {gib(peak.total)} of the {gib(limits.vram_gib)} that are free (most: {peak.stage})"
    if verdict == "fits":
        return takes
    if verdict == "tight":
        return f"{takes}: another program that takes some can end the run"
    lacking = limits.lacking(forecast)
    if lacking == "ram":
        return f"needs {gib(forecast.ram_gib)} of main memory, {gib(limits.ram_gib)} are free"
    if lacking == "disk":
        return f"needs {gib(forecast.disk_gib)} of disk, {gib(limits.disk_gib)} are free"
    return f"needs at least {gib(peak.total)} ({peak.stage}), {gib(limits.vram_gib)} are free"


def nearest_change(problem: Problem, found: Candidate, limits: Limits, margin: float, fixed: frozenset[str]) -> str:
    """Return the nearest changes that would fit, joined by "or"; where none of this machine would, a larger card."""
    needed = found.forecast.peak.total
    ways = []
    card = problem.card
    if card is not None and card.exact and limits.vram_gib < needed + margin <= card.vram_gb:
        ways.append(f"close other programs on the card until {gib(needed + margin)} are free")
    side = _fitting_side(problem, replace(limits, margin_gib=margin))
    if side:
        ways.append(f"{side} pixels would fit")
    ways += _unfixed(problem, limits, fixed)
    lacking = limits.lacking(found.forecast)
    if lacking == "ram":
        ways.append(f"{gib(found.forecast.ram_gib)} of free main memory would do")
    if lacking == "disk":
        ways.append(f"free {gib(found.forecast.disk_gib - limits.disk_gib)} on the disk")
    if not ways:
        ways.append(f"a card with {gib(needed + margin)} free would do")
    return ", or ".join(ways)


def _fitting_side(problem: Problem, limits: Limits) -> int:
    """Return the largest lower resolution, in pixels, at which the plan that takes least fits; 0 where none does."""
    start = problem.choices.start
    for side in range((start.resolution - 1) // 64 * 64, _SMALLEST_SIDE - 1, -64):
        lower = problem.starting_from(replace(problem.choices, start=replace(start, resolution=side)))
        if not limits.lacking(smallest(lower).forecast):
            return side
    return 0


def _unfixed(problem: Problem, limits: Limits, fixed: frozenset[str]) -> list[str]:
    """Return the settings that the user fixed and with which it would fit if they could change, one at a time."""
    found = []
    for key in _FREED_BY_LEVERS:
        if key not in fixed:
            continue
        freed = choices(problem.subject, problem.card, fixed - {key}, frozenset())
        plan = smallest(problem.starting_from(freed))
        if not limits.lacking(plan.forecast):
            value = plan.levers.key_values()[key]
            found.append(f"{key} = {str(value).lower() if isinstance(value, bool) else value} would fit")
    return found
