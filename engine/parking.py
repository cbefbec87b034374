"""Parking: everything moved off the card while a run waits, and back again, exact to the bit.

What is on the card is not listed but found: every tensor that can be reached from the training's parts, so that
nothing is forgotten, whoever keeps it. Storages are moved and not tensors: views stay views of one another, weights
that two layers share stay shared, and every tensor stays the object that others refer to.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from lorasmith.engine.errors import HardwareError
from lorasmith.engine.out_of_memory import is_out_of_memory
from lorasmith.engine.training_parts import TrainingParts

GIB = 2**30
_ENDS = (type, types.ModuleType, types.FrameType, types.CodeType, str, bytes, int, float, complex, torch.device)
"""What no tensor of a training is behind, or behind which is the whole interpreter."""

Storage = torch.UntypedStorage
Move = Callable[[Storage], Storage]


class Card(Protocol):
    """A device that can be cleared; sizes in bytes."""

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether the memory of `tensor` is on this device."""

    def to_host(self, storage: Storage) -> Storage:
        """Return a copy in host memory."""

    def to_card(self, storage: Storage) -> Storage:
        """Return a copy on the device; raises what torch raises where it is full."""

    def free_bytes(self) -> int:
        """Return how much others or we may still take."""

    def release(self) -> None:
        """Give memory that is reserved and not used back to the driver."""


@dataclass(frozen=True)
class CudaCard:
    """An NVIDIA GPU."""

    device: torch.device

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether the memory of `tensor` is on this GPU."""
        return tensor.device == self.device

    def to_host(self, storage: Storage) -> Storage:
        """Return a copy in host memory."""
        return _copy(storage, torch.device("cpu"))

    def to_card(self, storage: Storage) -> Storage:
        """Return a copy on this GPU; raises torch.OutOfMemoryError where it is full."""
        return _copy(storage, self.device)

    def free_bytes(self) -> int:
        """Return what the driver says is free."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def release(self) -> None:
        """Wait for the GPU and empty torch's cache."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


@dataclass
class Parking:
    """What was taken off `card`: tensors that share a storage together."""

    card: Card
    groups: list[list[Tensor]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Size of all storages."""
        return sum(group[0].untyped_storage().nbytes() for group in self.groups)


def park(parts: TrainingParts) -> float:
    """Move the whole training off its card and return how many GiB that freed; 0 where it computes on the CPU.

    Raises HardwareError, and moves nothing, where the host's memory has no room for it.
    """
    card = card_of(parts.learner.family.device)
    if card is None:
        return 0.0
    if swapped := parts.learner.family.swapped:
        # Copies of what main memory holds already; they come again with the first step.
        swapped.release()
    parts.parking, freed = clear(card, [parts.learner, parts.material])
    return freed / GIB


def unpark(parts: TrainingParts) -> None:
    """Bring back what `park` moved; raises HardwareError with the needed and free GiB where the card is full."""
    if parts.parking is not None:
        bring_back(parts.parking)
    parts.parking = None


def card_of(device: torch.device) -> Card | None:
    """Return the card that `device` means; None for the CPU, whose memory is the host's own."""
    return CudaCard(device) if device.type != "cpu" else None


def clear(card: Card, roots: Iterable[object]) -> tuple[Parking, int]:
    """Move every tensor on `card` that `roots` lead to into host memory; returns them and the bytes freed."""
    parking = Parking(card, _by_storage(tensor for tensor in tensors_behind(roots) if card.holds(tensor)))
    needed, available = parking.num_bytes, available_bytes()
    try:
        if needed > available:
            raise MemoryError
        before = card.free_bytes()
        _move(parking.groups, card.to_host)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise HardwareError(
            f"Not parked: {needed / GIB:.1f} GiB would have to move into this machine's memory.",
            why=f"It has {available / GIB:.1f} GiB free.",
            fix="Close other programs and park again, or stop the run: it resumes exactly.",
        ) from None
    card.release()
    return parking, max(0, card.free_bytes() - before)


def bring_back(parking: Parking) -> None:
    """Move everything back to its card; where that is full, raise HardwareError and leave all in host memory."""
    card, needed = parking.card, parking.num_bytes
    try:
        _move(parking.groups, card.to_card)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    else:
        failed = False
    if failed:
        # After the except block, which holds what was copied already.
        card.release()
        raise HardwareError(
            f"The run stays parked: it needs {needed / GIB:.1f} GiB of the card.",
            why=f"Only {card.free_bytes() / GIB:.1f} GiB are free; another program has the rest.",
            fix="Close that program and resume again, or stop the run: it is saved.",
        )


def available_bytes() -> int:
    """Return how much of the host's memory can be taken without swapping."""
    return int(psutil.virtual_memory().available)


def tensors_behind(roots: Iterable[object]) -> Iterator[Tensor]:
    """Yield every tensor that can be reached from `roots`, gradients included, each once.

    Follows what the garbage collector follows; of functions only what they have closed over, not their module.
    """
    waiting: list[Any] = list(roots)
    # With the things themselves: the number of one that is gone could come again as that of another.
    seen: dict[int, Any] = {}
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, _ENDS):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            yield thing
            # Held by torch and not by Python: gradients, and what a view is a view of.
            waiting += [thing.grad if thing.is_leaf else None, thing._base]
        if isinstance(thing, types.FunctionType):
            waiting += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
        else:
            waiting += gc.get_referents(thing)


def _copy(storage: Storage, device: torch.device) -> Storage:
    copied: Storage = storage.to(device=device)
    return copied


def _by_storage(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    return list(groups.values())


def _move(groups: list[list[Tensor]], move: Move) -> None:
    """Copy all storages before the first tensor is touched, so that a failure in between changes nothing."""
    moved = [move(group[0].untyped_storage()) for group in groups]
    for group, storage in zip(groups, moved, strict=True):
        for tensor in group:
            place = torch.empty(0, dtype=tensor.dtype, device=storage.device)
            tensor.data = place.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
