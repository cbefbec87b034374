"""Edits on their way to the overlay: written in order by a thread, kept where that fails, never lost by leaving."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.engine.errors import LorasmithError

if TYPE_CHECKING:
    from lorasmith.engine.dataset.overlay import Edit


class OverlayWriter:
    """Syncing to a disk can take long, so the screen's thread only puts edits in line.

    `problem` says in words why the last write failed, "" while all is well; what could not be written is tried again
    with the next edit. `told` is called from the writing thread after each write.
    """

    def __init__(self, path: Path, told: Callable[[], None] = lambda: None) -> None:
        """Write to the overlay at `path`."""
        self.path = path
        self.told = told
        self.problem = ""
        self.written = 0
        self._waiting: dict[str, Edit] = {}
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def add(self, edits: Mapping[str, Edit]) -> None:
        """Put edits in line; later ones of a picture replace earlier ones."""
        with self._lock:
            self._waiting |= edits
            if not self._waiting or self._thread is not None:
                return
            # No daemon: leaving waits for the last edit.
            self._thread = threading.Thread(target=self._write_all, name="overlay")
            self._thread.start()

    @property
    def waiting(self) -> bool:
        """Whether an edit is not on the disk yet."""
        return bool(self._waiting) or self._thread is not None

    def finish(self) -> bool:
        """Wait until everything is written or has failed, trying failures once more; True where all is on the disk."""
        self.add({})
        thread = self._thread
        if thread is not None:
            thread.join()
        return not self._waiting

    def _write_all(self) -> None:
        while True:
            with self._lock:
                edits, self._waiting = self._waiting, {}
                if not edits:
                    self._thread = None
                    break
            try:
                _write(self.path, edits)
            except LorasmithError as error:
                self._keep(edits, error)
                break
            self.problem = ""
            self.written += len(edits)
        self.told()

    def _keep(self, edits: dict[str, Edit], error: LorasmithError) -> None:
        with self._lock:
            self._waiting = edits | self._waiting
            self._thread = None
            self.problem = " ".join(part for part in (error.what, error.why, error.fix) if part)


def _write(path: Path, edits: Mapping[str, Edit]) -> None:
    """Add the captions of `edits`; whether a picture is left out stays as the file says it, which may be newer."""
    from lorasmith.engine.dataset import overlay

    present = overlay.read_overlay(path)
    kept = {
        name: replace(edit, exclude=present[name].exclude) if name in present else edit for name, edit in edits.items()
    }
    overlay.append_edits(path, kept)
