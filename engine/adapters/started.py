"""Starting from the base's own weights: PiSSA, OLoRA and LoftQ.

PiSSA (Meng et al., arXiv:2404.02948) and OLoRA (Büyükakyüz, arXiv:2406.01775) begin with a product that is a part of
the weight, and take that part off the weight, so that nothing changes at first. Here the frozen weight stays as it is
and the layer computes `up @ down - first up @ first down`, which is the same function with the same gradients, but
exact: nothing is rounded to 16 bits, nothing has to be put back to switch the adapter off, and a quantized weight is
not quantized again.

LoftQ (Li et al., arXiv:2310.08659) begins with the main directions of what quantization took off the weight, and the
layer adds them: training sees nearly the base that was not quantized. What is shared is what training changed,
`up @ down - first up @ first down`, since people use the file on a base that lost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorasmith.engine.adapters.module import DOWN, UP, AdapterModule

_POWERS = 4
_OVERSAMPLING = 8


def first_product(weight: Tensor, kind: str, rank: int, scale: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return `lora_A.weight` (k, in) and `lora_B.weight` (out, k) with k = min(rank, out, in) of a weight (out, in).

    `pissa`: scale · B A is the best approximation of that rank, and for `loftq` too, of what quantization lost;
    `olora`: B is orthonormal and B A the weight's projection on it.
    """
    if kind == "olora":
        basis = torch.linalg.qr(weight[:, : min(rank, *weight.shape)]).Q
        return {DOWN: basis.T @ weight, UP: basis}
    left, values, right = _main_directions(weight, rank, generator)
    root = (values / scale).sqrt()
    return {DOWN: root[:, None] * right, UP: left * root}


def _main_directions(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values and vectors (out, k), (k,), (k, in), by subspace iteration.

    Halko et al., arXiv:0909.4061, algorithm 4.4: a full decomposition of a large layer takes minutes.
    """
    count = min(rank + _OVERSAMPLING, *weight.shape)
    sample = torch.randn(weight.shape[1], count, generator=generator).to(weight.device)
    basis = torch.linalg.qr(weight @ sample).Q
    for _ in range(_POWERS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    count = min(rank, count)
    return (basis @ left)[:, :count], values[:count], right[:count]


def start_from_weight(module: AdapterModule) -> None:
    """Make the layer of `module` subtract the product of its present values, which become `module.start`."""
    start = _kept_start(module)
    layer = module.layer
    for holder, name, kind in ((layer.lora_A, DOWN, _BothDown), (layer.lora_B, UP, _Difference)):
        for key, plain in list(holder.items()):
            holder[key] = kind(plain, start[name])


def start_beside_weight(module: AdapterModule) -> None:
    """Keep the present values of `module` as `module.start`, which its layer does not subtract."""
    for name, first in _kept_start(module).items():
        # Held by the layer, so that they are wherever it is.
        module.layer.register_parameter(f"first_{name.split('.')[0]}", first)


def _kept_start(module: AdapterModule) -> dict[str, nn.Parameter]:
    # Parameters, since those stay the same objects where a model is moved to another device.
    start = {
        name: nn.Parameter(tensor.detach().clone(), requires_grad=False) for name, tensor in module.tensors.items()
    }
    module.start = dict(start)
    return start


class _Started(nn.Module):
    """A matrix of a LoRA, linear or convolution, beside its first value."""

    def __init__(self, plain: Any, first: nn.Parameter) -> None:
        super().__init__()
        self.weight = plain.weight
        self.first = first
        self._shape = {
            name: getattr(plain, name) for name in ("stride", "padding", "dilation", "groups") if hasattr(plain, name)
        }

    def apply_matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Apply a matrix as the plain layer would."""
        if self._shape:
            return functional.conv2d(x, matrix, **self._shape)
        return functional.linear(x, matrix)


class _BothDown(_Started):
    """Both down matrices: the two results lie one behind the other, two of each rank."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, 2 rank), for convolutions (B, 2 rank, h, w)."""
        results = (self.apply_matrix(x, self.weight), self.apply_matrix(x, self.first))
        return torch.cat(results, dim=1 if self._shape else -1)


class _Difference(_Started):
    """Both up matrices, the first one's result taken off."""

    def forward(self, both: Tensor) -> Tensor:
        """Return (…, out), for convolutions (B, out, h, w); exact zeros while both are the same."""
        now, before = both.chunk(2, dim=1 if self._shape else -1)
        return self.apply_matrix(now, self.weight) - self.apply_matrix(before, self.first)
