"""How far a prediction is from its target: kinds of loss, weights of pictures, weights of pixels under masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.engine.config import ObjectiveSettings

MIN_MASK_MEAN = 0.1
"""No pixel under a mask counts more than 1 / 0.1 times as much as one of a picture without a mask."""


@dataclass
class NoisyBatch:
    """One micro-batch ready for the denoiser: `noisy` and `target` (B, C, h, w), `timesteps` (B,), `weights` (B,).

    `pixel_weights` (B, 1, h, w) are those of the pictures' masks, None where no picture has one. `limits` (B,) are the
    errors above which a robust loss grows linearly, None for the squared error.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor
    pixel_weights: Tensor | None = None
    limits: Tensor | None = None


def weighted_loss(prediction: Tensor, batch: NoisyBatch, *, smooth_l1: bool = False) -> Tensor:
    """Return the mean over pictures of weight · mean of (pixel weight · error), in fp32; see `pixel_errors`."""
    errors = pixel_errors(prediction, batch, smooth_l1=smooth_l1)
    if batch.pixel_weights is not None:
        errors = errors * batch.pixel_weights
    return (errors.flatten(1).mean(dim=1) * batch.weights).mean()


def pixel_errors(prediction: Tensor, batch: NoisyBatch, *, smooth_l1: bool) -> Tensor:
    """Return each number's error (B, C, h, w): squared, or the pseudo-Huber loss where the batch has limits.

    With the limit c and the difference d: 2c·(√(d² + c²) - c), which is d² for small d and 2c·|d| for large ones
    (Khrapov et al., "Scheduled Pseudo-Huber Loss", arXiv:2403.16728); `smooth_l1` leaves out the factor c, so that it
    is d²/c for small d, as sd-scripts (`conditional_loss`) and OneTrainer name it.
    """
    difference = prediction.float() - batch.target
    if batch.limits is None:
        return difference.square()
    limits = batch.limits.view(-1, 1, 1, 1)
    # Not √(d² + c²) - c itself: for small d that is the difference of two nearly equal numbers.
    squares = difference.square()
    errors = 2.0 * squares / ((squares + limits.square()).sqrt() + limits)
    return errors if smooth_l1 else errors * limits


def huber_limits(settings: ObjectiveSettings, signal: Tensor, noise: Tensor, time: Tensor) -> Tensor | None:
    """Return the limit c of the robust loss at noise levels, shaped as they are; None for the squared error.

    A level mixes `signal` · latents + `noise` · noise, and `time` is its place in 0..1. Schedules of arXiv:2403.16728
    (section 4) as sd-scripts writes them (`get_huber_threshold_if_needed`), with C = `huber_c`: `constant` C,
    `exponential` C^time, `snr` (1 - C) / (1 + noise/signal)² + C. All begin at 1 or at C and end at C: errors at high
    noise, where bad pictures do the most harm, count least. Written without a division by the signal, which may be 0.
    """
    if settings.loss == "l2":
        return None
    limit = settings.huber_c
    if settings.huber_schedule == "constant":
        return torch.full_like(time, limit)
    if settings.huber_schedule == "exponential":
        return torch.pow(limit, time)
    return (1.0 - limit) * (signal / (signal + noise)).square() + limit


def mask_weights(mask: Tensor, unmasked_weight: float) -> Tensor:
    """Return the loss weight of each latent pixel (1, h, w) from a mask (1, h, w) uint8, 255 where to learn.

    The weight is 1 under the mask and `unmasked_weight` elsewhere, linear in between, then divided by its mean over the
    picture, so that a picture counts as much as others however small its mask is. Trainers differ in that: sd-scripts
    (apply_masked_loss) never divides, OneTrainer (masked_losses) does so by picture if asked to, ai-toolkit (SDTrainer)
    always but by the batch, so that pictures would depend on their neighbors. The divisor is at least `MIN_MASK_MEAN`,
    so that a speck is not blown up without bound. A black mask leaves out all of a picture, which is not made up for.
    """
    outside = 1.0 - mask.float() / 255.0
    weights = 1.0 - (1.0 - unmasked_weight) * outside
    if not mask.any():
        return weights
    return weights / weights.mean().clamp(min=MIN_MASK_MEAN)
