"""Schedule-free optimizers (Defazio et al., arXiv:2405.15682): training at one point, an average beside it.

They hold three points: z takes the steps, x is the average of all z, and gradients are taken at y between them,
y = (1 - β) · z + β · x. The weights in memory are y while training; x is what a user wants to see and share. The
libraries switch between both by computing forth and back, which loses bits, so that a run with previews would end
elsewhere than one without; here x is computed beside y, which stays untouched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class ScheduleFreeAverage:
    """The averaged weights x of a schedule-free optimizer, in the place that `ema.WeightAverage` has for others."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self.shadow: list[Tensor] = []
        """Nothing is kept: the optimizer's state has it all."""

    def update(self, step: int, left_out: Tensor) -> None:
        """Do nothing: each step of the optimizer has updated its average already."""

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters hold x inside; afterwards they hold the very tensors from before, to the bit."""
        kept = [parameter.data for parameter in self._parameters]
        try:
            for parameter, average in zip(self._parameters, self._averages(), strict=True):
                parameter.data = average
            yield
        finally:
            for parameter, trained in zip(self._parameters, kept, strict=True):
                parameter.data = trained

    def move_to(self, device: torch.device) -> None:
        """Do nothing: there is nothing of its own to move."""

    def _averages(self) -> list[Tensor]:
        """Return x = (y - (1 - β) · z) / β for each parameter; before the first step x = y."""
        momentum = {p: _momentum(group) for group in self._optimizer.param_groups for p in group["params"]}
        state = self._optimizer.state
        with torch.no_grad():
            # `get` and not an index, which would begin an empty state.
            return [
                torch.lerp(p.detach(), known["z"], 1.0 - 1.0 / momentum[p])
                if "z" in (known := state.get(p, {}))
                else p.detach().clone()
                for p in self._parameters
            ]


def _momentum(group: dict[str, Any]) -> float:
    """Return β: the wrapper's own, or the first of Adam's."""
    return float(group["momentum"] if "momentum" in group else group["betas"][0])
