"""Weight changes: what an adapter adds to one layer's weight, kept as a product where it is one.

A LoCon's changes written out take 3 GB for Stable Diffusion 1.5, so products are compared as products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorasmith.engine.quantization import full_weight


@dataclass(frozen=True)
class Change:
    """A weight change as a product: scale × up (out, rank, …) @ down (rank, in, …)."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that is changed."""
        return (self.up.shape[0], *self.down.shape[1:])

    def written_out(self) -> Tensor:
        """Return the change in fp32, in the shape of the weight."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1)).reshape(self.shape)

    def distance(self, other: AnyChange | None = None) -> float:
        """Return the Frobenius norm of this change less the other.

        ‖U D‖² = tr(UᵀU · DDᵀ), with both changes side by side in U and D; in 64 bits, where cancellation costs nothing.
        """
        if other is not None and not isinstance(other, Change):
            return other.distance(self)
        changes = [(self, 1.0)] + ([(other, -1.0)] if other is not None else [])
        up = torch.cat([sign * change.scale * change.up.flatten(1).double() for change, sign in changes], dim=1)
        down = torch.cat([change.down.flatten(1).double() for change, _ in changes])
        # A clamp keeps NaN, which max() would not.
        return float(torch.sum((up.T @ up) * (down @ down.T)).clamp(min=0).sqrt())

    def rows(self, first: int, count: int) -> Change:
        """Return the change of `count` rows of the weight from `first` on."""
        return Change(self.down, self.up[first : first + count], self.scale)

    def balanced(self, rank: int | None = None) -> Change:
        """Return the same change, or the best of a smaller `rank`, as factors of one size and strength 1.

        The singular values of U D are those of R₁ R₂ᵀ with U = Q₁ R₁ and Dᵀ = Q₂ R₂, a matrix of rank × rank. A
        difference of two products, large against itself, so becomes factors that 16 bits can hold.
        """
        left, first = torch.linalg.qr(self.up.flatten(1).double() * self.scale)
        right, second = torch.linalg.qr(self.down.flatten(1).double().T)
        turned, values, back = torch.linalg.svd(first @ second.T)
        count = min(rank or len(values), len(values))
        root = values[:count].sqrt()
        up, down = left @ turned[:, :count] * root, (right @ back[:count].T * root).T
        shape = (count, *self.down.shape[1:])
        return Change(down.float().reshape(shape), up.float().reshape(-1, count, *self.up.shape[2:]), 1.0)


@dataclass(frozen=True)
class WholeChange:
    """A weight change that is no small product, in the shape of the weight."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that is changed."""
        return tuple(self.weight.shape)

    def written_out(self) -> Tensor:
        """Return the change in fp32."""
        return self.weight.float()

    def distance(self, other: AnyChange | None = None) -> float:
        """Return the Frobenius norm of this change less the other, in 64 bits."""
        gap = self.weight.double()
        if other is not None:
            gap = gap - (other.weight if isinstance(other, WholeChange) else other.written_out()).double()
        return float(torch.linalg.vector_norm(gap))

    def rows(self, first: int, count: int) -> WholeChange:
        """Return the change of `count` rows of the weight from `first` on."""
        return WholeChange(self.weight[first : first + count])


AnyChange = Change | WholeChange


def frozen_layer(layer: Any) -> Any:
    """Return the base model's own layer, with an adapter around it or without."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def base_weight(layer: Any) -> Tensor:
    """Return the frozen weight of a layer (out, in, …) in fp32 on the CPU, unpacked where it is quantized."""
    return full_weight(frozen_layer(layer)).float().cpu()


def weight_shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of a layer's weight; a quantized one is packed into another."""
    layer = frozen_layer(layer)
    if hasattr(layer, "in_features"):
        return (layer.out_features, layer.in_features)
    return tuple(layer.weight.shape)


def adaptable_layers(root: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the path of each linear and convolution layer, and the layer itself or the adapter's layer around it.

    The adapter's own layers are left out.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: tuple[str, ...] = ()
    for path, child in root.named_modules():
        if isinstance(child, BaseTunerLayer):
            inside += (f"{path}.",)
            yield path, child
        elif isinstance(child, torch.nn.Linear | torch.nn.Conv2d) and not path.startswith(inside):
            yield path, child
