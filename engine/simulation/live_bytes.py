"""Counting the bytes of tensors that are alive, on the meta device and on real tensors alike."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.engine.simulation.meta_results import MetaResults

BLOCK = 512
"""CUDA's caching allocator gives out multiples of so many bytes (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)."""
_NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "_local_scalar_dense", "lift", "resize_", "set_")


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make while the mode is on, until they are freed.

    Each new storage of an output on `device` counts with its size rounded up to 512 bytes. Views and results in place
    cost nothing, as do `free` tensors (weights, inputs) and whatever existed before. `peak` is the most that lived at
    once, `kernels` how many operations were no views. Not to be used below a FlopCounterMode, which keeps tensors.
    """

    def __init__(self, device: torch.device, free: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device.type
        self.live = 0
        self.peak = 0
        self.kernels = 0
        self._meta = MetaResults() if device.type == "meta" else None
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        for tensor in free:
            self._remember(tensor, 0)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and count what it made."""
        aliases, launches = _facts(func)
        named = kwargs or {}
        meta = None if aliases else self._meta
        result = meta.run(func, args, named) if meta else func(*args, **named)
        here = False
        for tensor in _tensors(result):
            if tensor.device.type == self.device_type:
                here = True
                self._remember(tensor, 0 if aliases else None)
        self.kernels += here and launches
        return result

    def count(self, *tensors: Tensor) -> None:
        """Count tensors that were made outside, from now on."""
        for tensor in tensors:
            self._remember(tensor, None)

    def set_aside(self, tensor: Tensor) -> None:
        """Stop counting a tensor that is alive, such as a gradient that is counted elsewhere."""
        key = tensor.untyped_storage()._cdata
        reference, size = self._known.pop(key, (None, 0))
        self.live -= size
        if reference is not None:
            self._remember(tensor, 0)

    def _remember(self, tensor: Tensor, size: int | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        if size is None:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
        # What autograd or another tensor keeps holds the storage's Python object too, so its end is the memory's end.
        self._known[key] = (weakref.ref(storage, partial(self._forget, key)), size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, reference: weakref.ref[Any]) -> None:
        known = self._known.get(key)
        if known is not None and known[0] is reference:
            del self._known[key]
            self.live -= known[1]


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for item in result:
            yield from _tensors(item)


@cache
def _facts(func: Callable[..., Any]) -> tuple[bool, bool]:
    """Tell whether an operation returns its arguments' own storage, and whether it launches a kernel."""
    schema: Any = func._schema  # type: ignore[attr-defined]
    aliases = [value.alias_info for value in schema.returns if value.alias_info is not None]
    is_view = bool(aliases) and not any(alias.is_write for alias in aliases)
    name = schema.name.partition("::")[2]
    return bool(aliases), not is_view and not name.startswith(_NO_KERNEL)
