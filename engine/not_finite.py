"""What happens where a loss or a gradient is no number: the last good state is kept, and one change is proposed.

A single bad step was left out by `engine.step_guard` and told by `engine.step_meter`; here is the end of an attempt
that met too many of them, or whose weights are no numbers themselves.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import NoReturn

import torch

from lorasmith.engine.checkpoints import Checkpoint, newest_checkpoint
from lorasmith.engine.combinations import ONE_RATE
from lorasmith.engine.compute import has_bf16
from lorasmith.engine.errors import TrainingError
from lorasmith.engine.event_words import some_names
from lorasmith.engine.events import Logged, NotFinite, RolledBack
from lorasmith.engine.resume import is_extended
from lorasmith.engine.saving import Saver
from lorasmith.engine.step_guard import WINDOW
from lorasmith.engine.step_meter import NotFiniteError
from lorasmith.engine.training_parts import TrainingParts

RATE_FACTOR = 0.25
"""How much lower a proposed learning rate or gradient limit is."""


@dataclass(frozen=True)
class Change:
    """The one thing to do differently: in words, and as a setting `KEY=VALUE` where it is one."""

    words: str
    assignment: str = ""


def give_up(parts: TrainingParts, saver: Saver, error: NotFiniteError) -> NoReturn:
    """End the attempt: restore and save the last finite state, and raise TrainingError with the one change to make."""
    step = _restore_checkpoint(parts) if error.weights else max(error.good_step, saver.saved_step, 0)
    unsaved = ""
    if step is not None:
        parts.controls.step = step
        parts.meter.bad_steps = [event for event in parts.meter.bad_steps if event.step <= step]
        parts.emit(RolledBack(step=step, given_up=error.step, reason=_reason(error)))
        if not error.weights:
            unsaved = _save(parts, saver, step)
    raise TrainingError(_what(error), why=_why(error, step, unsaved), fix=_fix(parts, error, step))


def take_over(parts: TrainingParts, checkpoint: Checkpoint) -> None:
    """Put the weights, optimizer and record of bad steps of a checkpoint of this run in place."""
    tensors = {name: checkpoint.tensors(name) for name in parts.learner.group_names()}
    parts.learner.load_state(tensors, checkpoint.state["learner"])
    # An extended run begins with a clean record: it was changed so that it goes better.
    bad_steps = [] if is_extended(checkpoint, parts.config) else checkpoint.state.get("not_finite", [])
    parts.meter.resume(checkpoint.step, [(int(number), str(what)) for number, what in bad_steps])


def propose(parts: TrainingParts, error: NotFiniteError) -> Change:
    """Return the one change that most likely helps, by what is known of the bad steps."""
    config = parts.config
    pictures = [] if error.weights else _suspects(parts, error.events)
    if pictures:
        return Change(f"Leave out {some_names(pictures)}: every bad step has it in its batch, and no good step nearby.")
    if parts.learner.family.dtype == torch.float16:
        precision = "bf16" if has_bf16(parts.learner.family.device) else "fp32"
        words = f"Compute in {precision}, whose numbers reach further than those of fp16."
        return Change(words, f"train.precision={precision}")
    if config.optimizer.name in ONE_RATE:
        # It finds the rate itself, which must stay 1; shorter gradients let it find a lower one.
        limit = (config.optimizer.max_grad_norm or 1.0) * RATE_FACTOR
        return Change("Shorten the gradients.", f"optimizer.max_grad_norm={limit:.3g}")
    rate = config.optimizer.learning_rate * RATE_FACTOR
    return Change("Lower the learning rate to a quarter.", f"optimizer.learning_rate={rate:.3g}")


def _restore_checkpoint(parts: TrainingParts) -> int | None:
    """Load the newest checkpoint, of which every weight is a number, and return its step; None where there is none."""

    def on_damaged(path: object, reason: str) -> None:
        parts.emit(Logged(severity="warning", message=f"The checkpoint {path} is damaged and is not used: {reason}."))

    checkpoint = newest_checkpoint(parts.run.checkpoints, on_damaged)
    if checkpoint is None:
        return None
    take_over(parts, checkpoint)
    return checkpoint.step


def _save(parts: TrainingParts, saver: Saver, step: int) -> str:
    """Save the state of `step`, that of the last good step, unless it is saved; return in words why it is not."""
    if step in (0, saver.saved_step):
        return ""
    parts.learner.set_rates(step - 1)
    refused = saver.save_at_end()
    return f" It could not be saved: {refused}" if refused else ""


def _suspects(parts: TrainingParts, bad: list[NotFinite]) -> list[str]:
    """Return the pictures that are in every bad step and in no good step around; none for a single bad step."""
    if len(bad) < 2:
        return []
    common = set(bad[0].files).intersection(*(event.files for event in bad))
    numbers = {event.step for event in bad}
    for number in range(max(1, min(numbers) - WINDOW), max(numbers)):
        if number not in numbers:
            common -= set(parts.meter.pictures(number))
    return [name for name in bad[0].files if name in common]


def _what(error: NotFiniteError) -> str:
    if error.weights:
        return f"The LoRA's weights stopped being numbers after step {error.good_step}."
    if not error.events:
        return f"Training ended at step {error.step}: every gradient overflows in fp16."
    kinds = {event.what for event in error.events}
    what = "the loss" if kinds == {"loss"} else "the gradient" if kinds == {"gradient"} else "the loss or gradient"
    return f"Training ended at step {error.events[-1].step}: {what} was no number in {_steps(error.events)}."


def _why(error: NotFiniteError, step: int | None, unsaved: str) -> str:
    pictures = "; ".join(f"{event.step}: {some_names(event.files)}" for event in error.events)
    why = f"Pictures of these steps: {pictures}."
    if error.weights or not pictures:
        why = "Loss and gradient were numbers until then; the step itself went too far."
    if step is None:
        return f"{why} No checkpoint had been saved before."
    if error.weights:
        return f"{why} They are not saved; the checkpoint of step {step} is."
    return f"{why} The state of step {step}, the last good one, is kept.{unsaved}"


def _fix(parts: TrainingParts, error: NotFiniteError, step: int | None) -> str:
    change = propose(parts, error)
    folder = shlex.quote(str(parts.run.path))
    again = f"lorasmith train {folder}/run.toml"
    if not change.assignment:
        return f"{change.words} Move it out of the dataset, or exclude it on the dataset page; then: {again}"
    command = f"lorasmith runs extend {folder}" if step else again
    return f"{change.words} To do so: {command} --set {change.assignment}"


def _reason(error: NotFiniteError) -> str:
    return "the weights are no numbers" if error.weights else f"no numbers in {_steps(error.events)}"


def _steps(events: list[NotFinite]) -> str:
    numbers = [str(event.step) for event in events]
    if len(numbers) < 2:
        return f"step {''.join(numbers)}"
    return f"steps {', '.join(numbers[:-1])} and {numbers[-1]}"
