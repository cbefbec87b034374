"""What the machine's card can do with a run: forecast, time and money as the pages show them. Torch-free, pure."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import ConfigError
from lorasmith.tui.memory_view import MemoryView, view_of

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.fit import Fit, Room
    from lorasmith.engine.hardware import Gpu, HardwareSnapshot
    from lorasmith.engine.memory.forecast import Subject
    from lorasmith.engine.memory.of_run import Known
    from lorasmith.tui.findings import FoundBase

COUNTING_SECONDS = 600
"""What counting a step may take at most; without it there is no forecast."""
NO_GPU = "no NVIDIA GPU: it trains on the processor"
NOT_READ = "not known: the memory of this card cannot be read"


@dataclass(frozen=True)
class Estimate:
    """A run on this card: the bar, and time and money in words, what matters most first."""

    view: MemoryView
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """The card that would train, and what is free on the machine."""

    gpu: Gpu
    room: Room


@dataclass(frozen=True)
class CardQuestion:
    """What is to be fitted: the settings before anything is done to fit, the base model, and the card.

    Keys in `fixed` are the user's own.
    """

    config: RunConfig
    base: FoundBase
    card: Card
    number_of_pictures: int
    fixed: frozenset[str]


def find_fit(question: CardQuestion, tell: Any) -> Fit | None:
    """Return the plan that fits the card best; None where the memory of the base model is not known."""
    from lorasmith.engine.fit import solve

    subject, _ = subject_of(question.config, question.base, question.number_of_pictures)
    if subject is None:
        _count_step(question, tell)
        subject, _ = subject_of(question.config, question.base, question.number_of_pictures)
    if subject is None:
        return None
    try:
        return solve(subject, question.card.room, question.fixed)
    except ConfigError:
        return None


def _count_step(question: CardQuestion, tell: Any) -> None:
    """Have the model or a step with this adapter counted once, where that is all that lacks; in a process of its own.

    It takes up to some minutes of Python, which would hold up the screen.
    """
    import subprocess

    from lorasmith.engine.memory.of_run import lacks_only_counting

    if not lacks_only_counting(question.config, _known(question.config, question.base, question.number_of_pictures)):
        return
    tell("counting the memory of one step, once for such a model and adapter", 0, 0)
    command = [sys.executable, "-m", "lorasmith.engine.simulation.on_the_fly"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(  # noqa: S603
            command,
            input=question.config.model_dump_json().encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=COUNTING_SECONDS,
            check=False,
        )


def card_of(
    snapshot: HardwareSnapshot, device: str, family: str, unusable: Mapping[tuple[str, Any], str]
) -> Card | None:
    """Return the card that `train.device` means, with what is free; None without a GPU that tells its memory."""
    from lorasmith.engine.fit.machine import room_of
    from lorasmith.engine.hardware import gpu_for

    gpu = gpu_for(snapshot.gpus, device)
    room = None if gpu is None else room_of(snapshot, gpu, family, frozenset(unusable))
    return None if gpu is None or room is None else Card(gpu, room)


def subject_of(config: RunConfig, base: FoundBase, number_of_pictures: int) -> tuple[Subject | None, str]:
    """Return what is to be forecast, or None and the reason why nothing can be."""
    from lorasmith.engine.memory.of_run import subject_of

    return subject_of(config, _known(config, base, number_of_pictures))


def _known(config: RunConfig, base: FoundBase, number_of_pictures: int) -> Known:
    from lorasmith.engine.memory.of_run import Known

    side = max([config.dataset.resolution, *config.dataset.more_resolutions])
    return Known(base.family.SPEC, base.files, side**2, number_of_pictures=number_of_pictures, stored=base.stored)


def estimate(
    config: RunConfig, base: FoundBase, number_of_pictures: int, machine: HardwareSnapshot, card: Card | None
) -> Estimate:
    """Return memory, time and money of a run as it is set; takes a few milliseconds."""
    from lorasmith.engine.costs import run_costs
    from lorasmith.engine.fit import judge
    from lorasmith.engine.memory.forecast import forecast
    from lorasmith.engine.step_time import step_seconds

    if card is None:
        on_processor = config.train.device == "cpu" or not machine.gpus
        return Estimate(MemoryView(note=NO_GPU if on_processor else NOT_READ))
    subject, reason = subject_of(config, base, number_of_pictures)
    if subject is None:
        return Estimate(MemoryView(note=reason))
    room = card.room
    subject = replace(subject, calibration=room.memory_calibration)
    found = forecast(subject)
    seconds = step_seconds(subject, room.card, room.seconds_calibration)
    costs = run_costs(config, subject.spec.name, seconds, room.card, subject)
    return Estimate(view_of(found, room.vram_gib, judge(found, room)), costs.words)
