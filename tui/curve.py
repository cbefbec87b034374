"""One number a step, immutable, shared and cheap to extend: the losses of a run."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
FIRST_CAPACITY = 256


class _Buffer:
    """Storage that several curves share; `filled` values at its start belong to the longest of them."""

    def __init__(self, values: Floats, filled: int) -> None:
        self.values = values
        self.filled = filled


class Curve:
    """One immutable number per finished step: value `i` belongs to step `i + 1`, NaN where none is known.

    Extending costs amortized O(new values): the new curve shares the old one's buffer, which grows by doubling. A curve
    that is extended a second time copies, so no curve ever changes under its holder.
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        """Hold `values`, the first one for step 1."""
        array = np.asarray(list(values), dtype=np.float64)
        self._buffer = _Buffer(array, len(array))
        self._length = len(array)

    def __len__(self) -> int:
        """Return the last step that has a value or a gap."""
        return self._length

    def __eq__(self, other: object) -> bool:
        """Say whether both hold the same values, NaN equal to NaN."""
        return isinstance(other, Curve) and np.array_equal(self.values, other.values, equal_nan=True)

    __hash__ = None  # type: ignore[assignment]

    @property
    def values(self) -> Floats:
        """The values as a read-only view, shape (steps,)."""
        view = self._buffer.values[: self._length]
        view.flags.writeable = False
        return view

    def cut(self, length: int) -> Curve:
        """Return the curve of the first `length` steps."""
        return self if length >= self._length else self._share(self._buffer, max(0, length))

    def put(self, last_step: int, values: Iterable[float]) -> Curve:
        """Return the curve with `values` for the steps that end at `last_step`; later steps are dropped."""
        new = np.asarray(list(values), dtype=np.float64)
        first = max(0, last_step - len(new))
        length = first + len(new)
        kept = min(self._length, first)
        buffer = self._buffer
        if buffer.filled > kept or length > len(buffer.values):
            grown = np.full(max(FIRST_CAPACITY, length if length <= len(buffer.values) else 2 * length), np.nan)
            grown[:kept] = buffer.values[:kept]
            buffer = _Buffer(grown, kept)
        buffer.values[kept:first] = np.nan
        buffer.values[first:length] = new
        buffer.filled = length
        return self._share(buffer, length)

    @staticmethod
    def _share(buffer: _Buffer, length: int) -> Curve:
        curve = Curve.__new__(Curve)
        curve._buffer = buffer
        curve._length = length
        return curve
