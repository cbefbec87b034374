"""The loss on held-out pictures with the same noise each time, by noise level.

The training loss hardly tells learning from memorizing: every picture is in it, and its noise drowns the trend. Here
pictures that are never trained get the same noise at the same levels each time, so that only the weights differ
between two measurements. Weights are those that previews and the exported file show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lorasmith.engine.dataset.buckets import Sample
from lorasmith.engine.events import Logged, Validated
from lorasmith.engine.families import Conditioning
from lorasmith.engine.holdout import HeldOut
from lorasmith.engine.learner import Learner
from lorasmith.engine.objectives import mask_weights
from lorasmith.engine.training_parts import TrainingParts

_SEED_DIGITS = 15
"""Hexadecimal digits of a picture's hash that its noise is drawn by: 60 bits."""

Group = list[tuple[Sample, str]]


def noise_levels(number: int) -> list[float]:
    """Return the middles of `number` equal parts of 0..1, the least noise first."""
    return [(index + 0.5) / number for index in range(number)]


class Validator:
    """Measures one training on its held-out pictures."""

    def __init__(self, learner: Learner, held_out: HeldOut) -> None:
        self._learner = learner
        self._held_out = held_out
        self.levels = noise_levels(learner.config.validation.levels)

    def measure(self, should_stop: Callable[[], bool] = lambda: False) -> list[float] | None:
        """Return the mean loss of all held-out pictures at each of `levels`, or None once `should_stop` is true.

        Waits for the device once, at the end. Leaves no trace: dropout is off meanwhile, nothing is drawn from the
        random state, and weights and gradients stay what they are.
        """
        learner = self._learner
        learner.adapter.train(False)
        try:
            with torch.no_grad(), learner.averaged():
                sums = self._sums(should_stop)
        finally:
            learner.adapter.train()
        if sums is None:
            return None
        return [float(loss) / len(self._held_out.samples) for loss in torch.stack(sums).tolist()]

    def _sums(self, should_stop: Callable[[], bool]) -> list[Tensor] | None:
        """Return the sum of the pictures' losses at each level, on the device."""
        sums = [torch.zeros((), device=self._learner.family.device) for _ in self.levels]
        for group in self._groups():
            latents = torch.stack([self._held_out.latents[sample.index] for sample, _ in group])
            pixels, prompts = self._pixel_weights(group), self._encode([prompt for _, prompt in group])
            for index, level in enumerate(self.levels):
                if should_stop():
                    return None
                sums[index] += self._loss(group, latents, pixels, prompts, level) * len(group)
        return sums

    def _groups(self) -> Iterator[Group]:
        """Yield batches of one size, as large as those of the training."""
        held, learner = self._held_out, self._learner
        most = learner.pictures_at_once or learner.config.train.batch_size
        buckets: dict[object, Group] = {}
        for sample, prompt in zip(held.samples, held.prompts, strict=True):
            buckets.setdefault(sample.bucket, []).append((sample, prompt))
        for group in buckets.values():
            for start in range(0, len(group), most):
                yield group[start : start + most]

    def _pixel_weights(self, group: Group) -> Tensor | None:
        masks = self._held_out.masks
        if not any(sample.index in masks for sample, _ in group):
            return None
        unmasked, shape = self._learner.config.objective.unmasked_weight, self._held_out.latents[group[0][0].index]
        rows = [
            mask_weights(masks[sample.index], unmasked) if sample.index in masks else torch.ones_like(shape[:1]).float()
            for sample, _ in group
        ]
        return torch.stack(rows).to(self._learner.family.device)

    def _encode(self, prompts: list[str]) -> Conditioning:
        learner = self._learner
        known = learner.conditionings
        found = learner.family.encode_prompts(prompts) if known is None else [known[prompt] for prompt in prompts]
        return learner.family.collate(found)

    def _loss(
        self, group: Group, latents: Tensor, pixels: Tensor | None, prompts: Conditioning, level: float
    ) -> Tensor:
        family, objective = self._learner.family, self._learner.objective
        seeds = [int(sample.item.sha256[:_SEED_DIGITS], 16) for sample, _ in group]
        noisy = objective.at(latents.to(family.device, torch.float32), level, seeds)
        noisy.pixel_weights = pixels
        return objective.loss(family.predict(noisy.noisy.to(family.dtype), noisy.timesteps, prompts), noisy)


def validate(parts: TrainingParts) -> None:
    """Measure the present step and tell it; whatever goes wrong there is a warning, and training goes on."""
    learner = parts.learner
    if learner.held_out is None:
        return
    parts.meter.read(parts.step)
    validator = Validator(learner, learner.held_out)
    try:
        losses = validator.measure(parts.controls.stop_wanted)
    except Exception as error:
        message = f"No validation at step {parts.step}, training goes on: {error or type(error).__name__}"
        parts.emit(Logged(severity="warning", message=message))
        return
    if losses is not None:
        pictures = len(learner.held_out.samples)
        parts.emit(Validated(step=parts.step, levels=validator.levels, losses=losses, pictures=pictures))
