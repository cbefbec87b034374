"""What operations give on the meta device, remembered: equal blocks ask for the same shapes dozens of times.

torch works a shape out in Python, which takes ten times as long as making a tensor of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_Key = tuple[Any, ...]


class MetaResults:
    """Runs operations that make new tensors; the results of those on meta tensors are made from memory."""

    def __init__(self) -> None:
        self._known: dict[_Key, Any] = {}

    def run(self, func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Return what `func`, which changes none of its arguments and gives no views, gives."""
        key = (func, *_described(args), *((name, _described(value)) for name, value in named.items()))
        try:
            template = self._known.get(key)
        except TypeError:  # an argument that has no hash
            return func(*args, **named)
        if template is not None:
            return _made(template)
        result = func(*args, **named)
        template = _template(result)
        if template is not None:
            self._known[key] = template
        return result


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device, value.is_conj(), value.is_neg())
    if isinstance(value, tuple | list):
        return tuple(_described(item) for item in value)
    # 1, 1.0 and True are one key of a dictionary, but not one argument.
    return type(value), value


def _template(result: Any) -> Any:
    """Return how to make a result again; None where it is not made of whole meta tensors."""
    if isinstance(result, tuple | list):
        parts = [_template(item) for item in result]
        return None if None in parts else (type(result), parts)
    if result is None:
        return (None, None)
    if not isinstance(result, Tensor) or not result.is_meta or result.is_conj() or result.is_neg():
        return None
    template = (Tensor, (tuple(result.shape), result.stride(), result.dtype))
    whole = result.untyped_storage().nbytes() == _made(template).untyped_storage().nbytes()
    return template if whole else None


def _made(template: Any) -> Any:
    kind, parts = template
    if kind is Tensor:
        shape, stride, dtype = parts
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return None if kind is None else kind([_made(part) for part in parts])
