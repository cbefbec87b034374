"""What `torch.autocast` does on a card, for the meta device, which has none: to simulate trainers that use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

_LOWER = frozenset(
    {
        functional.linear,
        functional.scaled_dot_product_attention,
        torch.conv2d,
        torch.matmul,
        torch.bmm,
        torch.baddbmm,
        torch.addmm,
        torch.mm,
        torch.einsum,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.bmm,
        Tensor.mm,
    }
)
"""Operations that compute in 16 bits (torch's aten/src/ATen/autocast_mode.h, AT_FORALL_LOWER_PRECISION_FP)."""
_FULL = frozenset(
    {
        functional.layer_norm,
        functional.group_norm,
        functional.softmax,
        functional.interpolate,
        functional.softplus,
        torch.softmax,
        torch.exp,
        torch.pow,
        torch.rsqrt,
        torch.sum,
        torch.prod,
        Tensor.pow,
        Tensor.__pow__,
        Tensor.rsqrt,
        Tensor.exp,
        Tensor.sum,
        Tensor.softmax,
    }
)
"""Those that compute in 32 bits (AT_FORALL_FP32 and its siblings)."""


class Autocast(TorchFunctionMode):
    """Casts as `torch.autocast` with bf16 does; trained weights are cast once and kept, as its cache does."""

    def __init__(self) -> None:
        super().__init__()
        self._cast: Any = WeakTensorKeyDictionary()
        self._active = False

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation with its arguments cast."""
        named = dict(kwargs or {})
        if func in _LOWER or func in _FULL:
            dtype = torch.bfloat16 if func in _LOWER else torch.float32
            args = [self._as(value, dtype) for value in args]
            named = {key: self._as(value, dtype) for key, value in named.items()}
        return func(*args, **named)

    def wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call that is cast, also where a checkpoint runs it again in the backward pass."""

        def run(*args: Any, **named: Any) -> Any:
            if self._active:
                return call(*args, **named)
            self._active = True
            try:
                with self:
                    return call(*args, **named)
            finally:
                self._active = False

        return run

    def _as(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._as(item, dtype) for item in value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype is dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if value not in self._cast:
            self._cast[value] = value.to(dtype)
        return self._cast[value]
