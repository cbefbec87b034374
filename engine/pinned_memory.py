"""Main memory that a card copies from by itself, while both compute."""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def host_buffer(size: int, device: torch.device) -> Tensor:
    """Return `size` bytes (size,) of main memory to copy to `device` from, pinned where that is a card.

    Not from torch's own pool, which takes the next power of two. Where the driver pins no more, the memory is
    ordinary and the copies are slower.
    """
    if device.type == "cpu" or not size:
        return torch.empty(size, dtype=torch.uint8)
    # Pages of its own: what is registered twice is refused.
    buffer = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(buffer.data_ptr(), size, 0)):
        logger.warning("The driver pins no more main memory (%d MiB were wanted): block swap is slower.", size >> 20)
        with contextlib.suppress(RuntimeError):
            # The driver keeps the refusal and would blame the next kernel for it.
            torch.zeros(1, device=device).add_(1)
    else:
        # Views of it may live longer: their memory does too, only no longer pinned.
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False
    return buffer
