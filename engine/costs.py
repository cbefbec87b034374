"""What a run costs: hours, energy, and money at dated prices. Torch-free.

Training steps alone: loading, encoding and previews come on top. Prices are those of `presets/prices.toml`, each with
its date and source.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.step_time import CardSpeed, StepTime, card_speed, step_seconds

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.memory.forecast import Subject

_UTILIZATION = 0.8
"""Share of its board power that a card draws over a run: all of it while it computes, a third while it waits for the
processor. A judgement; NVML's measured power replaces it during the run."""
_SHOWN_RENTALS = 3


@dataclass(frozen=True)
class Price:
    """What the run costs on a rented card, in dollars, in so many hours; prices as of `read`."""

    provider: str
    card: str
    dollars: float
    hours: float
    read: str


@dataclass(frozen=True)
class Costs:
    """A run's time and money; None where it cannot be known. `words` say all of it, a sentence each.

    `kwh` is what the card takes, `energy` the least and the most that this costs, `fal` dollars at fal.ai.
    """

    hours: float
    hours_low: float
    hours_high: float
    kwh: float | None
    energy: tuple[float, float] | None
    fal: float | None
    rented: tuple[Price, ...]
    words: tuple[str, ...]


def run_costs(
    config: RunConfig, family: str, seconds: StepTime, card: CardSpeed | None, subject: Subject | None = None
) -> Costs:
    """Return what `config.train.steps` steps of `seconds` each take and cost.

    With `subject` the rented cards are told with their own time and fal.ai's trainer is chosen by the model's name;
    without it no rented card is told.
    """
    run = seconds.times(config.train.steps)
    hours = run.seconds / 3600
    kwh = None if card is None else card.watts * _UTILIZATION * hours / 1000
    prices = _prices()
    energy = None if kwh is None else (kwh * prices["energy"]["low"], kwh * prices["energy"]["high"])
    hosted = _hosted(family, "" if subject is None else f"{subject.model.name} {subject.model.label}")
    fal = None if hosted is None else hosted["step"] * max(hosted["minimum"], config.train.steps)
    rented = () if subject is None else _rented(subject, config.train.steps)
    words = [_hours_words(run, seconds)]
    if kwh is not None and energy is not None:
        unit = prices["energy"]["unit"]
        words.append(f"about {kwh:.2g} kWh at the card, {_money(energy[0])} to {_money(energy[1])} {unit}")
    if hosted is not None and fal is not None:
        words.append(
            f"at fal.ai {config.train.steps} steps cost ${_money(fal)} ({hosted['trainer']}, {hosted['read']})"
        )
    words += [_rented_words(price) for price in rented]
    return Costs(hours, run.low / 3600, run.high / 3600, kwh, energy, fal, rented, tuple(words))


def hours_words(seconds: float) -> str:
    """Return a length of time as a person says it: `40 min`, `1.5 h`, `2.3 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def _hours_words(run: StepTime, step: StepTime) -> str:
    span = f"{hours_words(run.low)} to {hours_words(run.high)}"
    return f"about {hours_words(run.seconds)} of training ({span}; {step.seconds:.2g} s a step), {step.basis}"


def _hosted(family: str, model: str) -> Mapping[str, Any] | None:
    entries = [entry for entry in _prices()["hosted"] if entry["family"] == family]
    return next((entry for entry in entries if entry.get("match", "") in model.casefold()), None)


def _rented(subject: Subject, steps: int) -> tuple[Price, ...]:
    """Return the cheapest rentals of different cards, by what the whole run costs there with the same settings."""
    found: dict[str, Price] = {}
    for entry in _prices()["rented"]:
        card = card_speed(entry["card"])
        assert card is not None, f"presets/prices.toml names {entry['card']}, which presets/cards.toml lacks"
        hours = step_seconds(subject, card).seconds * steps / 3600
        price = Price(entry["provider"], entry["card"], hours * entry["hour"], hours, entry["read"])
        known = found.get(entry["card"])
        if known is None or price.dollars < known.dollars:
            found[entry["card"]] = price
    return tuple(sorted(found.values(), key=lambda price: price.dollars)[:_SHOWN_RENTALS])


def _rented_words(price: Price) -> str:
    card = price.card.removeprefix("GeForce ")
    hours = hours_words(price.hours * 3600)
    return f"rented, an {card} at {price.provider}: about ${_money(price.dollars)} for {hours} ({price.read})"


def _money(amount: float) -> str:
    return f"{amount:.2f}" if amount < 10 else f"{amount:.0f}"


@cache
def _prices() -> dict[str, Any]:
    import lorasmith.presets

    path = Path(next(iter(lorasmith.presets.__path__))) / "prices.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))
