"""Block swap: frozen weights of some blocks wait in main memory and come to the card while other blocks compute.

They are frozen, so they are only ever copied to the card and never back. The weights of one block lie in one buffer of
pinned main memory and come in one copy, on a stream of their own, into one of a few equal buffers on the card: the
ring. Which block comes next is learned from the order that they ran in. A wrong guess costs time, never a result.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorasmith.engine.block_checkpointing import CheckpointedForward, denoiser_blocks
from lorasmith.engine.pinned_memory import host_buffer
from lorasmith.engine.quantization.frozen_linear import FrozenLinear

if TYPE_CHECKING:
    from lorasmith.engine.families import Family

ALIGNMENT = 256
"""Bytes that each tensor's place in a buffer is a multiple of, as the CUDA allocator's are."""


@dataclass(frozen=True)
class _Place:
    """Where one frozen tensor lies in its block's buffer."""

    tensor: Tensor
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    def point_into(self, buffer: Tensor) -> None:
        """Let the tensor be a view of its place in `buffer`, bytes (n,)."""
        count = self.tensor.numel() * self.tensor.element_size()
        flat = buffer[self.offset : self.offset + count].view(self.tensor.dtype)
        self.tensor.data = flat.as_strided(self.size, self.stride)


@dataclass(eq=False)
class SwappedBlock:
    """One block: its frozen tensors and the buffer in main memory that they live in."""

    name: str
    module: nn.Module
    places: list[_Place]
    host: Tensor
    packed: list[FrozenLinear]

    def point_into(self, buffer: Tensor) -> None:
        """Let all frozen tensors be views of `buffer`."""
        for place in self.places:
            place.point_into(buffer)
        for layer in self.packed:
            layer.settle()


@dataclass(eq=False)
class _Slot:
    """One buffer of the ring, the block in it, whether that points into it, and when its copy is complete."""

    buffer: Tensor
    block: int = -1
    used: bool = False
    complete: torch.cuda.Event | None = None


class SwappedForward:
    """Takes the place of a block's `forward`: has its weights brought before `inner` runs."""

    needs_checkpoint = True
    """Its weights leave the card after the forward pass, so only inputs can be kept for the backward pass."""

    def __init__(self, inner: Any, swap: BlockSwap, index: int) -> None:
        functools.update_wrapper(self, inner)
        self.inner, self.swap, self.index = inner, swap, index

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Return what `inner` returns."""
        self.swap.bring(self.index)
        return self.inner(*args, **named)


class BlockSwap:
    """The swapped blocks (`families.SwappedBlocks`) of one denoiser, whose other weights are on `device`.

    `card_bytes` is what the ring takes there, `host_bytes` what the blocks take in main memory. `copies` counts the
    copies so far, `waits` those that were not begun ahead.
    """

    def __init__(self, family: Family, blocks: Sequence[tuple[str, nn.Module]], depth: int) -> None:
        """Move the frozen weights of `blocks` into buffers in main memory."""
        self.device, self.depth = family.device, min(depth, len(blocks))
        self._family = family
        shared = _shared_places(family.denoiser, [module for _, module in blocks])
        self.blocks = [_gather(name, module, shared, self.device) for name, module in blocks]
        self._slots: list[_Slot] = []
        self._order: list[int] = []
        self._stream: torch.cuda.Stream | None = None
        self._away = False
        self.copies = self.waits = 0
        for index, block in enumerate(self.blocks):
            _wrap(block.module, self, index)

    @property
    def host_bytes(self) -> int:
        """Bytes of all blocks in main memory."""
        return sum(block.host.numel() for block in self.blocks)

    @property
    def card_bytes(self) -> int:
        """Bytes of the ring on the card; 0 before its first use and while it is released."""
        return sum(slot.buffer.numel() for slot in self._slots)

    @property
    def on_card(self) -> list[str]:
        """The paths of the blocks whose weights are on the card or on their way there, sorted."""
        return sorted(self.blocks[slot.block].name for slot in self._slots if slot.block >= 0)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def bring(self, index: int) -> None:
        """Have the weights of a block on the card before what is computed next, and begin to bring those after it."""
        if self._away:
            return
        if index not in self._order:
            self._order.append(index)
        slot = self._slot_of(index)
        if slot is None:
            self.waits += 1
            slot = self._load(index, keep=())
        if slot.complete is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.complete)
        if not slot.used:
            # Not before: whoever reads a weight finds it complete, in main memory or on the card.
            self.blocks[index].point_into(slot.buffer)
            slot.used = True
        ahead = [index]
        for following in self._following(index):
            if self._slot_of(following) is None:
                self._load(following, keep=ahead)
            ahead.append(following)

    def release(self) -> None:
        """Give the ring's memory back; the weights are in main memory alone until a block runs again."""
        if self._stream is not None:
            self._stream.synchronize()
        for slot in self._slots:
            self._empty(slot)
        self._slots.clear()

    def to(self, device: torch.device) -> None:
        """Move the denoiser as its own `to` would; away from its card the swapped blocks compute in main memory."""
        self.release()
        stays = {id(place.tensor) for block in self.blocks for place in block.places}
        denoiser: Any = self._family.denoiser
        denoiser._apply(lambda tensor: tensor if id(tensor) in stays else tensor.to(device))
        self._away = device != self.device

    def bring_back(self) -> None:
        """Lay every block on the card for good, as without a swap."""
        blocks = self.blocks
        self.give_up()
        for block in blocks:
            for place in block.places:
                place.tensor.data = place.tensor.data.to(self.device, copy=True)
            for layer in block.packed:
                layer.settle()

    def give_up(self) -> None:
        """End the swap; the blocks' weights stay in main memory, for whoever moves them next."""
        self.release()
        for block in self.blocks:
            _unwrap(block.module)
        self.blocks, self._family.swapped = [], None

    def _following(self, index: int) -> Iterator[int]:
        """Yield the blocks that run next, as far as the order of former passes tells and the ring can hold them."""
        rank, last = self._order.index(index), len(self._order) - 1
        back = _in_backward()
        for _ in range(self.depth - 1):
            rank += -1 if back else 1
            if rank > last and not torch.is_grad_enabled():
                rank = 0
            if not 0 <= rank <= last:
                # Where a pass with gradients turns, the blocks at hand are those that run again.
                return
            yield self._order[rank]

    def _slot_of(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.block == index), None)

    def _load(self, index: int, keep: Sequence[int]) -> _Slot:
        """Begin to copy a block into the slot that was used longest ago and holds none of `keep`."""
        slot, block = self._free_slot(keep), self.blocks[index]
        self._empty(slot)
        slot.block = index
        target = slot.buffer[: block.host.numel()]
        if self.device.type == "cpu":
            target.copy_(block.host)
        else:
            stream = self._copying()
            # What was computed with the slot's last weights is issued by now: blocks run one after another.
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                target.copy_(block.host, non_blocking=True)
            slot.complete = stream.record_event()
        self.copies += 1
        # The longest unused comes first.
        self._slots.remove(slot)
        self._slots.append(slot)
        return slot

    def _free_slot(self, keep: Sequence[int]) -> _Slot:
        if len(self._slots) < self.depth:
            largest = max(block.host.numel() for block in self.blocks)
            self._slots.append(_Slot(torch.empty(largest, dtype=torch.uint8, device=self.device)))
            return self._slots[-1]
        return next(slot for slot in self._slots if slot.block not in keep)

    def _empty(self, slot: _Slot) -> None:
        """Let the block in a slot live in main memory alone."""
        if slot.used:
            self.blocks[slot.block].point_into(self.blocks[slot.block].host)
        slot.block, slot.used = -1, False

    def _copying(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._stream


def swap_blocks(family: Family, count: int, depth: int = 2) -> BlockSwap:
    """Let the frozen weights of `count` blocks of the denoiser, evenly spread, wait in main memory.

    The denoiser's other weights go to the family's device, and `depth` blocks at a time have room there. Swapped blocks
    are checkpointed. Adapters stay on the card whole. A denoiser with fewer blocks has all of them swapped. Where
    blocks are swapped already, these are swapped instead.
    """
    blocks = denoiser_blocks(family)
    count = min(count, len(blocks))
    # Evenly spread, so that each copy has the same number of resident blocks to hide behind.
    chosen = [blocks[(2 * place + 1) * len(blocks) // (2 * count)] for place in range(count)]
    before = family.swapped
    if isinstance(before, BlockSwap):
        before.give_up()
    family.swapped = swap = BlockSwap(family, chosen, max(1, depth))
    swap.to(family.device)
    return swap


def _in_backward() -> bool:
    """Tell whether autograd is going back through a graph in this thread, as torch's own checkpointing asks."""
    return bool(torch._C._current_graph_task_id() != -1)


def _wrap(block: nn.Module, swap: BlockSwap, index: int) -> None:
    forward = block.__dict__.get("forward")
    if isinstance(forward, CheckpointedForward):
        forward.inner = SwappedForward(forward.inner, swap, index)
    else:
        block.forward = CheckpointedForward(SwappedForward(block.forward, swap, index))


def _unwrap(block: nn.Module) -> None:
    forward = block.__dict__.get("forward")
    if isinstance(forward, CheckpointedForward) and isinstance(forward.inner, SwappedForward):
        forward.inner = forward.inner.inner


def _gather(name: str, block: nn.Module, shared: set[int], device: torch.device) -> SwappedBlock:
    """Move the frozen tensors of a block into one buffer in main memory, one behind the other."""
    tensors = [tensor for tensor in frozen_tensors(block) if _address(tensor) not in shared]
    places, size = [], 0
    for tensor in tensors:
        dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
        stride = tensor.stride() if dense else torch.empty(tensor.shape, device="meta").stride()
        places.append(_Place(tensor, size, tensor.shape, stride))
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    host = host_buffer(size, device)
    packed = [layer for layer in block.modules() if isinstance(layer, FrozenLinear)]
    gathered = SwappedBlock(name, block, places, host, packed)
    for place, values in zip(places, [tensor.data for tensor in tensors], strict=True):
        place.point_into(host)
        place.tensor.data.copy_(values)
    return gathered


def frozen_tensors(block: nn.Module) -> list[Tensor]:
    """Return the tensors of a block that no training changes and that belong to no adapter, each once."""
    adapters = {
        id(part)
        for layer in block.modules()
        if isinstance(layer, BaseTunerLayer)
        for name, child in layer.named_children()
        if name != "base_layer"
        for part in child.modules()
    }
    found = {
        id(tensor): tensor
        for module in block.modules()
        if id(module) not in adapters
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and not tensor.requires_grad
    }
    return list(found.values())


def _shared_places(denoiser: nn.Module, blocks: Sequence[nn.Module]) -> set[int]:
    """Return the addresses of what several blocks have in common, or a block with the rest: it stays on the card."""
    inside = [{_address(tensor) for tensor in frozen_tensors(block)} for block in blocks]
    counts = Counter(address for addresses in inside for address in addresses)
    parts = {id(part) for block in blocks for part in block.modules()}
    outside = {
        _address(tensor)
        for module in denoiser.modules()
        if id(module) not in parts
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    }
    return {address for address, count in counts.items() if count > 1} | (counts.keys() & outside)


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() or id(tensor)
