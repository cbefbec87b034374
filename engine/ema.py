"""A running average of the adapter's weights: smoother than the last step's, and what previews and the export show.

Polyak & Juditsky (SIAM J. Control Optim. 30(4), 1992) average the iterates of a stochastic descent; here with weights
that fall by `decay` a step. The young average would hang on the first, untrained weights, so the decay begins small:
min(decay, (1 + n) / (10 + n)) at update n, as TensorFlow's `ExponentialMovingAverage` does with `num_updates`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of `parameters`, in fp32 on their device; begins as a copy of them.

    `shadow` has one tensor for each parameter, in the same order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters = list(parameters)
        self.shadow: list[Tensor] = [parameter.detach().float().clone() for parameter in self._parameters]

    def update(self, step: int, left_out: Tensor) -> None:
        """Take in the weights after the optimizer step that followed `step` finished ones; never waits for the device.

        The decay is a function of the step alone, so that a resumed run averages as an uncut one. `left_out` () on the
        device is 1 where that step changed nothing, so that the average changes nothing either, else 0.
        """
        weights, share = [parameter.detach() for parameter in self._parameters], 1.0 - decay_at(self.decay, step)
        if left_out.device.type == "cpu":
            # Asking costs nothing there, and one pass over the weights is a third of three.
            if not left_out:
                torch._foreach_lerp_(self.shadow, weights, share)
            return
        change = torch._foreach_sub(weights, self.shadow)
        torch._foreach_mul_(change, (1.0 - left_out) * share)
        torch._foreach_add_(self.shadow, change)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters hold the average inside; afterwards they hold the very tensors from before.

        Storages are swapped and nothing is copied, so that this takes no memory and loses no bit.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def move_to(self, device: torch.device) -> None:
        """Move the average to another device."""
        self.shadow = [tensor.to(device) for tensor in self.shadow]

    def _swap(self) -> None:
        for index, parameter in enumerate(self._parameters):
            parameter.data, self.shadow[index] = self.shadow[index], parameter.data


def decay_at(decay: float, step: int) -> float:
    """Return the decay of the update after the optimizer step that followed `step` finished ones."""
    return min(decay, (1 + step) / (10 + step))
