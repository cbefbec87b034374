"""The first measured steps of a run correct the forecasts for its card: once a run, and nothing where there is no card.

Between two readings of the losses nothing but steps happens; their peak and pace are compared with what was forecast
for the largest batch among them, and the ratios are kept (`engine.memory.calibration`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

from lorasmith.engine.card_meter import CardMeter
from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.epochs import Epochs
from lorasmith.engine.learner import Learner
from lorasmith.engine.memory import find_memory
from lorasmith.engine.memory.calibration import card_key, record
from lorasmith.engine.memory.forecast import Subject, can_forecast, forecast
from lorasmith.engine.nvml import Gpu
from lorasmith.engine.step_time import card_speed, step_seconds
from lorasmith.engine.training_parts import TrainingParts

FEWEST_STEPS = 5
"""The first steps choose kernels and make the optimizer's state; a pace wants a few more."""
logger = logging.getLogger("lorasmith.calibration")


class StepMemoryMeter(Protocol):
    """Measures the card: see `card_meter.CardMeter`."""

    def start(self) -> None:
        """Begin to measure."""

    def peak_gib(self) -> float:
        """Return the most that was taken since `start`."""

    def gpu(self) -> Gpu | None:
        """Return the card; None where it is not known."""


@dataclass(frozen=True)
class _Measured:
    gib: float
    seconds: float
    first_step: int
    last_step: int


class StepCalibration:
    """Watches the first steps of one training; `meter` is None where nothing is to be measured."""

    def __init__(self, parts: TrainingParts, meter: StepMemoryMeter | None = None) -> None:
        """Measure the training's own card, or with `meter`."""
        device = parts.learner.family.device
        self._parts = parts
        self._meter = meter or (CardMeter(device) if device.type != "cpu" else None)
        self._since = -1

    def read(self) -> None:
        """Take the chance of a reading of the losses, at which the device has been waited for anyway."""
        meter, parts = self._meter, self._parts
        if meter is None:
            return
        if parts.rungs.taken("step"):
            # What runs now is not what the settings say.
            self._meter = None
            return
        if self._since < 0:
            self._restart()
            return
        if parts.step - self._since < FEWEST_STEPS:
            return
        self._meter = None
        try:
            self._record(_Measured(meter.peak_gib(), parts.meter.seconds_per_step, self._since, parts.step), meter)
        except Exception:
            # Nothing of the training rests on it.
            logger.exception("the first steps were not compared with their forecast")

    def disturb(self) -> None:
        """Begin anew: something else than steps took memory or time."""
        self._since = -1

    def _restart(self) -> None:
        if self._meter is not None:
            self._meter.start()
        self._since = self._parts.step

    def _record(self, measured: _Measured, meter: StepMemoryMeter) -> None:
        learner, gpu = self._parts.learner, meter.gpu()
        subject = step_subject(learner, self._largest_batch(measured))
        if gpu is None or subject is None:
            return
        told = forecast(subject).step.without_slack
        seconds = step_seconds(subject, card_speed(gpu.name, gpu.compute_capability)).seconds
        record(card_key(gpu, learner.family.spec.name), told, measured.gib, seconds, measured.seconds)
        ratio = measured.gib / told
        logger.info("steps took %.2f GiB, %.0f %% of their forecast", measured.gib, 100 * ratio)

    def _largest_batch(self, measured: _Measured) -> int:
        """Return the pixels of the largest picture in the steps that were measured."""
        config, plan = self._parts.config, self._parts.material.plan
        epochs, num_micro = Epochs(plan, config), config.train.gradient_accumulation
        numbers = range(measured.first_step * num_micro, measured.last_step * num_micro)
        buckets = [plan.samples[epochs.micro_batch(number).indices[0]].bucket for number in numbers]
        return max(bucket.width * bucket.height for bucket in buckets)


def step_subject(learner: Learner, pixels: int) -> Subject | None:
    """Return a training's step as what is forecast; None where the memory of its base model or adapter is not known."""
    family, config = learner.family, learner.config
    model = find_memory(family.spec.name, family.identity.parameters)
    if model is None:
        return None
    subject = Subject(
        config=with_precision(config, learner),
        spec=family.spec,
        model=model,
        megapixels=pixels / 1e6,
        num_parameters=learner.adapter.num_parameters(),
        keeps_text=learner.conditionings is None,
    )
    return None if can_forecast(subject) else subject


def with_precision(config: RunConfig, learner: Learner) -> RunConfig:
    """Return the settings with the number format that `auto` turned out to be."""
    name = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[str(learner.family.dtype).removeprefix("torch.")]
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": name})})
