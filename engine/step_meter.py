"""Losses, gradient norms and step times: kept on the device, and read many at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorasmith.engine.dataset.buckets import BucketPlan
from lorasmith.engine.dataset.epochs import Epochs
from lorasmith.engine.errors import TrainingError
from lorasmith.engine.events import Event, NotFinite, StepsDone
from lorasmith.engine.learner import Learner
from lorasmith.engine.running_clock import running_seconds
from lorasmith.engine.step_guard import WINDOW


class NotFiniteError(TrainingError):
    """Too many steps were no numbers, or the weights are none: the attempt is over.

    `events` are the steps that count; `good_step` is the last step that changed something, `step` the present one.
    `weights` is true where the weights themselves are no numbers, so that nothing in memory can be kept.
    """

    def __init__(self, events: list[NotFinite], good_step: int, step: int, *, weights: bool = False) -> None:
        self.events, self.good_step, self.step, self.weights = events, good_step, step, weights
        super().__init__(f"Steps up to {step} are no numbers.", why="Their weights are not saved.")


@dataclass
class _Known:
    """What was read from the device and not yet told: one value for each step that ends at the last one read."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


class StepMeter:
    """Losses and gradient norms on the device, the time of the steps that made them, and which were no numbers."""

    def __init__(self, learner: Learner, plan: BucketPlan, emit: Callable[[Event], None]) -> None:
        self._learner = learner
        self._plan = plan
        self._emit = emit
        self._epochs = Epochs(plan, learner.config)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._known = _Known()
        self._since = running_seconds()
        self._good_step = 0
        self.bad_steps: list[NotFinite] = []
        """Left-out steps that count: none is `WINDOW` steps older than the last one read."""
        self.seconds_per_step = 0.0
        """The pace at the last reading; 0 before."""

    def resume(self, step: int, bad_steps: list[tuple[int, str]]) -> None:
        """Go on after `step` steps, of which (number, "loss" or "gradient") were left out."""
        self._good_step = step
        self.bad_steps = [self._not_finite(number, what == "loss") for number, what in bad_steps]
        self._learner.guard.resume(step, [event.step for event in self.bad_steps])

    def start(self) -> None:
        """Begin to count time; what happened since `stop` is left out."""
        self._since = running_seconds()

    @property
    def record(self) -> list[tuple[int, str]]:
        """The left-out steps that still count, as `resume` takes them."""
        return [(event.step, event.what) for event in self.bad_steps]

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Keep the results of one step without looking at them."""
        self._pending.append((loss, norm))

    @property
    def is_due(self) -> bool:
        """Whether so many steps were not looked at that a bad one should no longer stay unnoticed."""
        return len(self._pending) >= WINDOW

    def look(self, step: int) -> None:
        """Read all steps since the last look, `step` the last of them, and emit NotFinite. Waits for the device.

        Raises NotFiniteError where the attempt is over, after StepsDone.
        """
        if not self._pending:
            return
        values = torch.stack([torch.stack(pair) for pair in self._pending])
        rows: list[list[float]] = torch.cat([values, values.sum(1, keepdim=True)], 1).tolist()
        before = step - len(rows)
        self._pending.clear()
        self._known.losses += [row[0] for row in rows]
        self._known.norms += [row[1] for row in rows]
        scaled = self._learner.scaler is not None
        # As `StepGuard` judged them on the device: a scaler meets infinite gradients on purpose.
        good = [math.isfinite(row[0] if scaled else row[2]) for row in rows]
        if not all(good) or self._scaler_gave_up():
            self._judge(before, good)
        else:
            self._good_step = step

    def read(self, step: int) -> None:
        """Look, and emit StepsDone for all steps since the last reading; `step` is the last of them.

        Raises NotFiniteError, after emitting, where the attempt is over.
        """
        self.look(step)
        self._tell(step)

    def require_finite_weights(self, step: int) -> None:
        """Raise NotFiniteError where a weight is no number after `step` steps; waits for the device."""
        if not self._learner.all_finite():
            raise NotFiniteError(self.bad_steps, self._good_step, step, weights=True)

    def _tell(self, step: int) -> None:
        known = self._known
        if not known.losses:
            return
        self.seconds_per_step = (running_seconds() - self._since) / len(known.losses)
        epoch = self._learner.loader.epoch_of((step * self._learner.config.train.gradient_accumulation) - 1) + 1
        self._known = _Known()
        self._emit(
            StepsDone(
                step=step,
                epoch=epoch,
                losses=known.losses,
                learning_rate=self._learner.learning_rate(),
                grad_norm=known.norms[-1],
                seconds_per_step=self.seconds_per_step,
            )
        )
        self.start()

    def _judge(self, before: int, good: list[bool]) -> None:
        """Emit NotFinite for each bad step, up to the one that ends the attempt; raise NotFiniteError then."""
        last = before + len(good)
        over = self._scaler_gave_up()
        for number, is_good in enumerate(good, before + 1):
            if is_good:
                self._good_step = number
                continue
            loss = self._known.losses[number - last - 1]
            event = self._not_finite(number, not math.isfinite(loss))
            self._emit(event)
            self.bad_steps = [*(old for old in self.bad_steps if old.step > number - WINDOW), event]
            if len(self.bad_steps) >= self._learner.guard.limit:
                over = True
                break
        weights = not self._learner.all_finite()
        if over or weights:
            self._tell(last)
            raise NotFiniteError(self.bad_steps, self._good_step, last, weights=weights)

    def _scaler_gave_up(self) -> bool:
        scaler = self._learner.scaler
        return scaler is not None and scaler.get_scale() < 1.0

    def _not_finite(self, number: int, is_loss: bool) -> NotFinite:
        return NotFinite(step=number, what="loss" if is_loss else "gradient", files=self.pictures(number))

    def pictures(self, number: int) -> list[str]:
        """Return the names of the pictures in the batches of step `number`, counted from 1, without repeats."""
        num_micro = self._learner.config.train.gradient_accumulation
        indices = [
            index
            for micro in range((number - 1) * num_micro, number * num_micro)
            for index in self._epochs.micro_batch(micro).indices
        ]
        return list(dict.fromkeys(self._plan.samples[index].item.relative for index in indices))
