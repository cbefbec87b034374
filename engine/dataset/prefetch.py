"""Micro-batches prepared ahead in threads, with the same bits as without.

A batch is a pure function of its number, so threads may make them in any order. On an NVIDIA GPU they are put into
pinned memory as well, from which the card fetches them while it computes.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from lorasmith.engine.dataset.loader import Batch

AHEAD_FOR_EACH = 2
"""Batches that wait ready for each worker; more would only take memory."""


class BatchSource(Protocol):
    """Where batches come from by number, from any thread: `engine.dataset.loader.Loader`."""

    def batch(self, micro: int) -> Batch:
        """Return micro-batch `micro`."""


class Prefetcher:
    """Hands out the batches of `loader` by number and prepares those of the next numbers in `workers` threads.

    None is prepared at or after `end`. With no workers a batch is made when it is asked for, in the caller's thread.
    The threads start with the first batch; `close` ends them, and a later `batch` starts them anew.
    """

    def __init__(self, loader: BatchSource, workers: int, *, end: int, pin: bool = False) -> None:
        self._loader = loader
        self._workers = workers
        self._end = end
        self._pin = pin
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[Batch]] = {}

    def batch(self, micro: int) -> Batch:
        """Return micro-batch `micro`, counted from 0 over the whole run.

        Whatever a thread met while it prepared the batch is raised here, in the engine's thread.
        """
        if not self._workers:
            return self._loader.batch(micro)
        if micro not in self._coming:
            # The first one, or a jump: after a rollback the run goes on at an earlier step.
            self._forget()
        self._order(micro)
        return self._coming.pop(micro).result()

    def close(self) -> None:
        """End the threads and let go of what they prepared; waits for a batch that is being made."""
        self._forget()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _order(self, first: int) -> None:
        """Let the threads make `first` and the batches after it, as far as they are allowed ahead."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="loader")
        last = min(first + self._workers * AHEAD_FOR_EACH, self._end - 1)
        for micro in range(first, max(first, last) + 1):
            if micro not in self._coming:
                self._coming[micro] = self._pool.submit(self._prepare, micro)

    def _prepare(self, micro: int) -> Batch:
        batch = self._loader.batch(micro)
        return pinned(batch) if self._pin else batch

    def _forget(self) -> None:
        for future in self._coming.values():
            future.cancel()
        self._coming.clear()


def pinned(batch: Batch) -> Batch:
    """Return the batch in memory from which a GPU copies without the processor."""
    weights = batch.pixel_weights
    return dataclasses.replace(
        batch,
        latents=batch.latents.pin_memory(),
        weights=batch.weights.pin_memory(),
        pixel_weights=None if weights is None else weights.pin_memory(),
    )
