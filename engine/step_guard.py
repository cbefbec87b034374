"""An optimizer step that changes nothing where the loss or the gradient is no number, decided on the device.

Leaving a step out is not the same as zero gradients, which would still move momentum, decay and step counters. Asking
the device before each step would be right but slow: it then idles while the next step is prepared. So each optimizer
gets the cheapest way that keeps every bit; `StepGuard.apply` says which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

WINDOW = 20
"""Steps within which bad ones are counted."""
MAX_BAD = {"skip": 3, "stop": 1}
"""The how-manieth bad step within `WINDOW` ends the attempt, by `train.not_finite`."""
_WAITING = (
    *("adamw8bit", "paged_adamw", "paged_adamw8bit", "lion8bit", "paged_lion8bit", "ademamix", "ademamix8bit"),
    *("prodigy", "prodigy_schedulefree", "dadaptation"),
)
"""Optimizers that wait for the device in each step by themselves, so that asking it costs nothing more."""


class StepGuard:
    """Judges each step of one training and applies the good ones.

    `recent` has a place for each of the last `WINDOW` steps: 1 where it was left out. Once as many as `limit` were bad,
    every later step is left out too, so that the state stays that of the last good step until somebody reads.
    """

    def __init__(self, optimizer: Optimizer, name: str, device: torch.device, policy: str) -> None:
        """Guard `optimizer`, named as in `optimizer.name`, whose weights are on `device`; `policy`: `MAX_BAD`."""
        self.optimizer = optimizer
        self.limit = MAX_BAD[policy]
        self.recent = torch.zeros(WINDOW, device=device)
        self._places = list(self.recent.unbind())
        self._asks = device.type == "cpu" or name in _WAITING
        self._fused = bool(optimizer.defaults.get("fused"))
        self._unsure: _Unsure | None = None

    def resume(self, step: int, bad_steps: Sequence[int]) -> None:
        """Go on after `step` steps of which `bad_steps` (counted from 1) were left out."""
        self.recent.zero_()
        for bad in bad_steps:
            if bad > step - WINDOW:
                self._places[(bad - 1) % WINDOW].fill_(1.0)

    def judge(self, step: int, value: Tensor) -> Tensor:
        """Return 1 on the device where the step after `step` finished ones is to be left out, else 0; never waits.

        `value` () is finite where the step is good: its loss, or loss and gradient norm added.
        """
        halted = self.recent.sum() >= self.limit
        gap = value - value  # NaN for NaN and for infinity, else 0
        place = self._places[step % WINDOW]
        place.copy_((gap != gap) | halted)
        return place

    def apply(self, left_out: Tensor) -> None:
        """Do the optimizer's step unless `left_out` (), from `judge`, is 1."""
        if self._fused:
            # torch's fused kernels look at this number themselves, as GradScaler has them do.
            optimizer: Any = self.optimizer
            optimizer.found_inf, optimizer.grad_scale = left_out, None
            optimizer.step()
        elif self._asks:
            if not left_out.item():
                self.optimizer.step()
        else:
            self._apply_and_put_back(left_out)

    def settle(self) -> None:
        """Bring the numbers that Python keeps up to date with the device; waits for the last step only."""
        if self._unsure is not None and self._unsure.was_left_out():
            self._unsure.put_back(self.optimizer)
        self._unsure = None

    def _apply_and_put_back(self, left_out: Tensor) -> None:
        """Step on a copy's account: tensors are put back on the device, Python's own counters one step later.

        By then the device has the whole next step waiting, so that it never idles.
        """
        self.settle()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        before = [parameter.detach().clone() for parameter in parameters]
        states = [_Kept(self.optimizer.state[parameter]) for parameter in parameters if parameter.grad is not None]
        self._unsure = _Unsure(left_out, self.optimizer, states)
        self.optimizer.step()
        bad = left_out > 0
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(torch.where(bad, old, parameter))
            for kept in states:
                kept.put_back_tensors(bad)


def spoil(parameters: Sequence[nn.Parameter], left_out: Tensor) -> None:
    """Make the first gradient NaN where `left_out` () is 1, so that a gradient scaler leaves the step out."""
    gradient = next((p.grad for p in parameters if p.grad is not None), None)
    if gradient is not None:
        gradient.add_(torch.where(left_out > 0, math.nan, 0.0))


class _Kept:
    """What the optimizer knew of one weight before a step: copies of its tensors, and its plain values."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
        self.tensors = {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
        self.values = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        self.is_new = not state

    def put_back_tensors(self, bad: Tensor) -> None:
        """Put the tensors back where `bad` () is true."""
        for key, old in self.tensors.items():
            value = self.state[key]
            value.copy_(torch.where(bad, old, value))
        self.tensors = {}

    def put_back_values(self) -> None:
        """Put the plain values back; a state that the step began is forgotten, so that the next step begins it."""
        if self.is_new:
            self.state.clear()
        self.state.update(self.values)


class _Unsure:
    """The plain values from before a step of which only the device knows yet whether it was left out."""

    def __init__(self, left_out: Tensor, optimizer: Optimizer, states: list[_Kept]) -> None:
        self._states = states
        self._groups = [_plain(group) for group in optimizer.param_groups]
        self._event: torch.cuda.Event | None = None
        self._flag = torch.empty((), pin_memory=left_out.is_cuda)
        self._flag.copy_(left_out, non_blocking=True)
        if left_out.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def was_left_out(self) -> bool:
        """Wait for the answer."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flag)

    def put_back(self, optimizer: Optimizer) -> None:
        """Put the plain values back, and take away those that the step began to count."""
        for group, values in zip(optimizer.param_groups, self._groups, strict=True):
            for key in _plain(group).keys() - values.keys():
                del group[key]
            group.update(values)
        for kept in self._states:
            kept.put_back_values()


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """Return what a step may count on by itself; the rate is set anew before each step."""
    return {key: value for key, value in group.items() if isinstance(value, int | float) and key != "lr"}
