"""What checkpointed blocks keep of their inputs, in main memory instead of on the card.

Each input is copied off the card while the block computes, on a stream of its own, and brought back while the block
behind it is computed again. On the CPU the same is done without streams, so that tests see the bookkeeping.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

AHEAD = 2
"""Blocks whose inputs may still be on their way to main memory when the next one begins."""


@dataclass(eq=False)
class _Kept:
    """An input in main memory; `original` while its copy is made, `returned` once it is on its way back."""

    host: Tensor
    original: Tensor | None
    copied: torch.cuda.Event | None = None
    returned: Tensor | None = None
    back: torch.cuda.Event | None = None
    used: bool = False
    block: list[weakref.ref[_Kept]] = field(default_factory=list)
    before: list[weakref.ref[_Kept]] = field(default_factory=list)


class Offloader:
    """Keeps the inputs of checkpointed blocks in main memory; one for all blocks of a denoiser.

    An input that several blocks are given, or that has no gradient, stays where it is: the model itself holds it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._seen: Any = WeakIdKeyDictionary()
        self._leaving: list[list[_Kept]] = []
        self._last: list[weakref.ref[_Kept]] = []
        self.host_bytes = 0
        """What is in main memory now."""
        self.most_host_bytes = 0
        """The most that it was."""

    @contextlib.contextmanager
    def keeping(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Keep what autograd saves of `tensors`, the inputs of one block, in main memory."""
        movable = {_place(tensor) for tensor in tensors if tensor.grad_fn is not None and tensor not in self._seen}
        for tensor in tensors:
            self._seen[tensor] = True
        self._settle(AHEAD - 1)
        block: list[weakref.ref[_Kept]] = []
        before, self._last = self._last, block
        leaving: list[_Kept] = []

        def pack(saved: Tensor) -> Tensor | _Kept:
            if _place(saved) not in movable:
                return saved
            kept = self._take(saved)
            kept.block, kept.before = block, before
            block.append(weakref.ref(kept))
            leaving.append(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield
        self._leaving.append(leaving)

    def reset(self) -> None:
        """Forget what an ended step left on its way."""
        self._settle(0)
        self._last = []

    def _take(self, tensor: Tensor) -> _Kept:
        """Begin the copy of `tensor` to main memory."""
        size = tensor.numel() * tensor.element_size()
        if self.device.type == "cpu":
            kept = _Kept(tensor.detach().clone(), tensor)
        else:
            out, _ = self._copying()
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            out.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(out):
                host.copy_(tensor, non_blocking=True)
            kept = _Kept(host, tensor, copied=out.record_event())
        self.host_bytes += size
        self.most_host_bytes = max(self.most_host_bytes, self.host_bytes)
        weakref.finalize(kept, self._freed, size).atexit = False
        return kept

    def _freed(self, size: int) -> None:
        self.host_bytes -= size

    def _settle(self, left: int) -> None:
        """Let go of the originals of all blocks but the last `left`.

        The card waits for their copies before it goes on, so that their memory can be given to what comes next.
        """
        while len(self._leaving) > left:
            for kept in self._leaving.pop(0):
                if kept.copied is not None:
                    torch.cuda.current_stream(self.device).wait_event(kept.copied)
                kept.original = None

    def _unpack(self, kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._fetch(kept)
        kept.used = True
        for reference in (*kept.block, *kept.before):
            other = reference()
            if other is not None and not other.used:
                self._fetch(other)
        self._settle(0)
        if kept.back is not None:
            torch.cuda.current_stream(self.device).wait_event(kept.back)
        returned, kept.returned = kept.returned, None
        assert returned is not None
        return returned

    def _fetch(self, kept: _Kept) -> None:
        """Begin the way back, where it has not begun."""
        if kept.returned is None:
            kept.returned = kept.original
        if kept.returned is not None:
            return
        if self.device.type == "cpu":
            kept.returned = kept.host.clone()
            return
        _, back = self._copying()
        # Made on the computing stream, which also frees it; the copy waits until its memory is free for certain.
        kept.returned = torch.empty_like(kept.host, device=self.device)
        back.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(back):
            kept.returned.copy_(kept.host, non_blocking=True)
        kept.back = back.record_event()

    def _copying(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if self._streams is None:
            self._streams = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._streams


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tells a tensor from others, also when autograd hands over another object for it."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()
