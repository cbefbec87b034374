"""Pictures read and scaled for the screen in one thread of their own: what is looked at now comes first.

A new wish replaces the old one, so that paging through thousands of pictures never decodes what has scrolled away.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.segment import Segment

Cells = list[list[Segment]]
"""Rows of styled half blocks."""


@dataclass(frozen=True)
class Wish:
    """One picture at one size, in cells that it may take at most."""

    path: Path
    width: int
    height: int


class Thumbnails:
    """`get` answers at once with what is loaded; `want` has the rest loaded, calling `told` after each picture.

    At most `bound` pictures are kept, the longest unseen are forgotten first. `told` is called from the loading thread.
    """

    def __init__(self, told: Callable[[], None], bound: int = 400) -> None:
        """Start with nothing loaded and no thread."""
        self._told = told
        self._bound = bound
        self._kept: OrderedDict[Wish, Cells | str] = OrderedDict()
        self._wanted: list[Wish] = []
        self._running = False
        self._lock = threading.Lock()

    def get(self, wish: Wish) -> Cells | str | None:
        """Return the picture's cells, why it cannot be shown in words, or None while it is not loaded."""
        with self._lock:
            if wish in self._kept:
                self._kept.move_to_end(wish)
            return self._kept.get(wish)

    def want(self, wishes: Sequence[Wish]) -> None:
        """Load these, in order, instead of what was wanted before."""
        with self._lock:
            self._wanted = [wish for wish in wishes if wish not in self._kept]
            if self._running or not self._wanted:
                return
            self._running = True
        # Daemon: leaving must not wait for a picture from a slow disk.
        threading.Thread(target=self._load_wanted, name="thumbnails", daemon=True).start()

    def loading(self) -> bool:
        """Whether something that is wanted is still to come."""
        return self._running

    def _load_wanted(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._running = False
                    return
                wish = self._wanted.pop(0)
            cells = load_cells(wish)
            with self._lock:
                self._kept[wish] = cells
                while len(self._kept) > self._bound:
                    self._kept.popitem(last=False)
            self._told()
            time.sleep(50e-6)  # lets the screen's thread in


def load_cells(wish: Wish) -> Cells | str:
    """Return the picture as half blocks, or why it cannot be shown."""
    from lorasmith.engine.errors import LorasmithError
    from lorasmith.tui.widgets.preview import pixel_rows, read_pixels

    try:
        return pixel_rows(read_pixels(wish.path, wish.width, wish.height), half_blocks=True)
    except LorasmithError as error:
        return error.why or error.what
    except (OSError, ValueError, MemoryError) as error:
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
