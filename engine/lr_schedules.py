"""How the learning rate changes over a run: a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from lorasmith.engine.config import ScheduleSettings


def lr_factor(settings: ScheduleSettings, step: int, total: int) -> float:
    """Return what the learning rate is multiplied by in the step that follows `step` finished ones of `total`.

    The shape lives on the steps from `settings.start_step` to `total`; before them the rate is full. Warm-up rises in
    equal parts and reaches 1 with its last step. The falling shapes would reach 0 after the last step, so that every
    step still learns. Cosine with restarts: Loshchilov & Hutter, arXiv:1608.03983. REX: Chen et al., arXiv:2107.04197,
    eq. 2. Warm-up, stable, decay: Hu et al., arXiv:2404.06395, with the 1 - √ fall that Hägele et al.,
    arXiv:2405.18392, found best. Inverse square root: Vaswani et al., arXiv:1706.03762, section 5.3, measured in
    warm-ups; without one, a tenth of the steps takes its place.
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
        case "polynomial":
            return math.pow(1.0 - done, settings.power)
        case "rex":
            return (1.0 - done) / (0.5 + 0.5 * (1.0 - done))
        case "wsd":
            falling = (done - (1.0 - settings.decay_share)) / settings.decay_share
            return 1.0 - math.sqrt(max(0.0, falling))
        case "inverse_sqrt":
            scale = settings.warmup_steps or max(1.0, total / 10)
            return math.sqrt(scale / (scale + step - settings.warmup_steps))


def _half_cosine(done: float) -> float:
    """Return 1 at 0, 0.5 at a half, 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * done))
