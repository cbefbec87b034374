"""How the learning rate changes over a run: a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from lorasmith.engine.config import ScheduleSettings


def lr_factor(settings: ScheduleSettings, step: int, total: int) -> float:
    """Return what the learning rate is multiplied by in the step that follows `step` finished ones of `total`.

    The shape lives on the steps from `settings.start_step` to `total`; before them the rate is full. Warm-up rises in
    equal parts and reaches 1 with its last step. The falling shapes would reach 0 after the last step, so that every
    step still learns. Cosine with restarts: Loshchilov & Hutter, arXiv:1608.03983.
    """
    step, total = step - settings.start_step, total - settings.start_step
    if step < 0:
        return 1.0
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    match settings.name:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return _half_cosine(done)
        case "cosine_restarts":
            return _half_cosine(done * settings.restarts % 1.0)


def _half_cosine(done: float) -> float:
    """Return 1 at 0, 0.5 at a half, 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * done))
