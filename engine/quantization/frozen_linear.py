"""A frozen linear layer whose weight is kept packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorasmith.engine.quantization.codecs import CODECS, Packed
from lorasmith.engine.quantization.products import can_multiply, has_products, multiply, multiply_back


class FrozenLinear(nn.Linear):
    """A linear layer of which only the packed weight is in memory; results and gradients have the format `dtype`.

    The packed tensors are buffers that no state dict holds, so that they move with the module and are never saved.
    `weight` widens them anew at each reading. The bias stays a parameter as it was.
    """

    def __init__(
        self, layer: nn.Linear, quantization: str, device: torch.device, *, quantized_matmul: bool = False
    ) -> None:
        """Pack the weight of `layer` on `device`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.quantization, self._wants_products = quantization, quantized_matmul
        self.dtype = layer.weight.dtype
        self._codec = CODECS[quantization]
        for name, tensor in zip(self._codec.names, self._codec.pack(layer.weight.detach().to(device)), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        bias = None if layer.bias is None else layer.bias.detach().to(device)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.train(layer.training)
        self.settle()

    @property
    def packed(self) -> Packed:
        """The packed tensors, where they are now."""
        return tuple(self._buffers[name] for name in self._codec.names)  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are now."""
        return self.packed[0].device

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter in the class above
        """The weight (out, in), widened for this reading alone."""
        return self._codec.widen(self.packed, (self.out_features, self.in_features), self.dtype)

    def widen(self, packed: Packed) -> Tensor:
        """Return packed tensors of this layer as its weight (out, in)."""
        return self._codec.widen(packed, (self.out_features, self.in_features), self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return input (…, in) times the weight, plus the bias: (…, out)."""
        result: Tensor = _Product.apply(input, self, self.bias, *self.packed)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        """Tell the format beside the sizes."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.quantization}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """Move the packed tensors and never convert them: another format is what is computed in from then on."""
        example = torch.empty(0, dtype=self.dtype, device=self.device)
        packed = dict(zip(self._codec.names, self.packed, strict=True))
        for name in packed:
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self.dtype = fn(example).dtype
            packed |= {name: _moved(tensor, fn) for name, tensor in packed.items()}
        finally:
            self._buffers |= packed
        self.settle()
        return self

    def settle(self) -> None:
        """Find out whether the device that the layer is on multiplies its format; else it is widened there."""
        self.multiplies = self._wants_products and has_products(self.quantization, self.device)


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


class _Product(torch.autograd.Function):
    """Input times a packed weight; the backward pass widens it once more instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear, bias: Tensor | None, *packed: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*packed)
        if layer.multiplies and can_multiply(x, packed[0]):
            result = multiply(x, *packed)
            return result if bias is None else result.add_(bias)
        return functional.linear(x, layer.widen(packed), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), layer, packed = gradients, ctx.layer, ctx.saved_tensors
        if layer.multiplies and can_multiply(gradient, packed[0].T):
            back = multiply_back(gradient, *packed)
        else:
            back = gradient @ layer.widen(packed)
        return back, None, None, *(None for _ in packed)
