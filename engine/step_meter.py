"""Losses, gradient norms and step times: kept on the device, and read many at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lorasmith.engine.errors import TrainingError
from lorasmith.engine.events import Event, StepsDone
from lorasmith.engine.learner import Learner


class StepMeter:
    """Losses and gradient norms on the device, and the time of the steps that made them."""

    def __init__(self, learner: Learner, emit: Callable[[Event], None]) -> None:
        self._learner = learner
        self._emit = emit
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._since = time.perf_counter()

    def start(self) -> None:
        """Begin to count time; what happened since `stop` is left out."""
        self._since = time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Keep the results of one step without looking at them."""
        self._pending.append((loss, norm))

    def read(self, step: int) -> None:
        """Emit StepsDone for all steps since the last reading; `step` is the last of them. Waits for the device.

        Raises TrainingError, after emitting, where a loss or gradient norm is not finite.
        """
        if not self._pending:
            return
        values = torch.stack([torch.stack(pair) for pair in self._pending]).tolist()
        losses, norms = [value[0] for value in values], [value[1] for value in values]
        seconds = time.perf_counter() - self._since
        num = len(losses)
        epoch = self._learner.loader.epoch_of((step * self._learner.config.train.gradient_accumulation) - 1) + 1
        self._pending.clear()
        self._emit(
            StepsDone(
                step=step,
                epoch=epoch,
                losses=losses,
                learning_rate=self._learner.learning_rate(),
                grad_norm=norms[-1],
                seconds_per_step=seconds / num,
            )
        )
        self._require_finite(step - num, losses, norms)
        self.start()

    def _require_finite(self, before: int, losses: list[float], norms: list[float]) -> None:
        scaler = self._learner.scaler
        # A scaler meets infinite gradients on purpose and leaves out their steps; only giving up is an error.
        bad = [
            i for i, (loss, norm) in enumerate(zip(losses, norms, strict=True))
            if not math.isfinite(loss) or (scaler is None and not math.isfinite(norm))
        ]  # fmt: skip
        if scaler is not None and not bad and scaler.get_scale() < 1.0:
            bad = [0]
        if not bad:
            return
        first, last = before + bad[0] + 1, before + len(losses)
        where = f"step {first}" if first == last else f"steps {first} to {last}"
        raise TrainingError(
            f"The loss or its gradient stopped being a number in {where}.",
            why="The weights of these steps are not saved; earlier checkpoints are intact.",
            fix="Lower optimizer.learning_rate, or set train.precision to bf16 or fp32; then start a new run.",
        )
