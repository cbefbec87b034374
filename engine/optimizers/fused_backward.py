"""Fused backward: each weight is updated, and its gradient freed, as soon as the backward pass has reached it.

Only gradients that are not there any more save memory, and a LoRA's are small beside the activations; what it saved is
in `benchmarks/README.md`. The whole gradient is never there at once, so it can be neither clipped nor judged before
the first weight has changed: a step is left out for its loss alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class FusedBackward:
    """Steps one optimizer weight by weight, with the bits of a step over all of them at once.

    The state stays where the optimizer has it, so that checkpoints are the same with and without.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        """Hang hooks on `parameters`, all those of `optimizer`; they do nothing before `arm`."""
        self._optimizer = optimizer
        self._parameters = list(parameters)
        self._place = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._norms: dict[Tensor, Tensor] = {}
        self._counted: dict[int, dict[str, Any]] = {}
        self._before: Callable[[], None] | None = None
        self._armed = self._left_out = False
        self._on_device = bool(optimizer.defaults.get("fused"))
        for parameter in self._parameters:
            hooked: Any = parameter
            hooked.register_post_accumulate_grad_hook(self._on_gradient)

    def arm(self, left_out: Tensor, before_update: Callable[[], None] | None) -> None:
        """Update in the backward pass that follows, unless `left_out` () is 1.

        `before_update` is called once before the first weight changes. torch's fused kernels look at `left_out`
        themselves; for others the device is asked here, once a step.
        """
        self._armed, self._before = True, before_update
        self._norms, self._counted = {}, {}
        if self._on_device:
            optimizer: Any = self._optimizer
            optimizer.found_inf, optimizer.grad_scale = left_out, None
        else:
            self._left_out = bool(left_out.item())

    def finish(self) -> Tensor:
        """End the step and return the norm of all its gradients, as `clip_grad_norm_` does, on the device."""
        self._armed = False
        for place, counted in self._counted.items():
            self._optimizer.param_groups[place].update(counted)
        norms = [self._norms[p] for p in self._parameters if p in self._norms]
        self._norms, self._counted = {}, {}
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def cancel(self) -> None:
        """Forget a step that failed: what it counted does not count."""
        self._armed, self._norms, self._counted = False, {}, {}

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        if self._before is not None:
            self._before()
            self._before = None
        assert parameter.grad is not None
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        if not self._left_out:
            self._step(parameter)
        parameter.grad = None

    def _step(self, parameter: Tensor) -> None:
        """Show the optimizer a group of this weight alone; what the group counts is taken over once, in `finish`."""
        groups, place = self._optimizer.param_groups, self._place[parameter]
        alone = {**groups[place], "params": [parameter]}
        self._optimizer.param_groups = [alone]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = groups
        del alone["params"]
        self._counted[place] = alone
