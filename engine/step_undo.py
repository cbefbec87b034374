"""Putting back what an optimizer step changed before it ran out of memory in its middle, bit for bit.

Copies cost memory and time, so they are made only where a step may fail half-way: in the first step of a process, in
which optimizers make their state weight by weight, and in one that is repeated. Every other step first proves that
there is room for what an optimizer computes beside its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ROOM_FACTOR = 4
"""The widest optimizer here (Prodigy) holds about as many temporary tensors of a weight's size at once."""
_SMALLEST_ROOM = 1 << 20


class StepUndo:
    """The weights, the optimizer's state and other tensors as they are now."""

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: Optimizer, others: Sequence[Tensor] = ()) -> None:
        """Copy everything that a step changes; `others` are tensors that follow the weights, such as their average."""
        self._optimizer = optimizer
        self._weights = [(tensor, tensor.detach().clone()) for tensor in (*parameters, *others)]
        self._states = {
            parameter: {key: _copied(value) for key, value in state.items()}
            for parameter, state in optimizer.state.items()
        }
        self._groups = [
            {key: _copied(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]

    def put_back(self) -> None:
        """Make everything as it was; a state that the step has made is forgotten."""
        with torch.no_grad():
            for tensor, content in self._weights:
                tensor.copy_(content)
            for parameter in [parameter for parameter in self._optimizer.state if parameter not in self._states]:
                del self._optimizer.state[parameter]
            for parameter, before in self._states.items():
                _restore(self._optimizer.state[parameter], before)
            for group, values in zip(self._optimizer.param_groups, self._groups, strict=True):
                _restore(group, values | {"params": group["params"]})


def room_beside(parameters: Sequence[nn.Parameter]) -> int:
    """Return how many bytes an optimizer of `parameters` may need for a moment, beside its state."""
    return ROOM_FACTOR * max(parameter.numel() * parameter.element_size() for parameter in parameters) + _SMALLEST_ROOM


def prove_room(num_bytes: int, device: torch.device) -> None:
    """Take and give back that much memory of `device`; raises as torch does where it is not there."""
    torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _copied(value: Any) -> Any:
    """Return a tensor with a copy of its content, anything else as it is."""
    return (value, value.clone()) if isinstance(value, Tensor) else value


def _restore(current: dict[Any, Any], before: dict[Any, Any]) -> None:
    for key in [key for key in current if key not in before]:
        del current[key]
    for key, value in before.items():
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor):
            tensor, content = value
            tensor.copy_(content)
            current[key] = tensor
        else:
            current[key] = value
