"""A run seen from outside its process: what was journaled, what is new, and whether its process lives.

Nothing here touches the run. A long run has one gauge reading a second; of the past ones only those are decoded that
are not superseded, so that ten hours are read in about a second.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from lorasmith.engine.events import Event, RunEnded, RunStarted
from lorasmith.engine.journal import Follower, decode
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import lock_holder

PART_BYTES = 1 << 18
_GAUGES = b'{"event": "HardwareSampled"'
_VRAM = re.compile(rb'"vram_used_gib": ([0-9.]+)')


class RunWatch:
    """Reads the events of `run` from the first one on; one thread at a time.

    `alive` says whether a process works on the run, `ended` holds the last word of the newest start if it has one.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.alive = lock_holder(run) is not None
        self.ended: RunEnded | None = None
        self._follower = Follower(run.journal)
        self._heard = time.monotonic()
        self._peak = -1.0

    @property
    def over(self) -> bool:
        """Whether no more events come, unless somebody resumes the run."""
        return self.ended is not None or not self.alive

    @property
    def quiet_seconds(self) -> float:
        """For how long nothing was written; a living run writes its gauges about once a second."""
        return time.monotonic() - self._heard

    def past(self) -> Iterator[tuple[float, list[Event]]]:
        """Yield the events up to now in parts, each with the share of the journal that was read, above 0 to 1.

        Raises StorageError where the journal cannot be read or belongs to a newer version of lorasmith.
        """
        path = self.run.journal
        size = path.stat().st_size if path.exists() else 0
        while self._follower.position < size:
            lines = self._follower.lines(PART_BYTES)
            if not lines:
                break
            yield min(1.0, self._follower.position / size), self._decode(self._without_superseded(lines))
        if size:
            # A process that hangs since an hour has been quiet for that long already.
            self._heard = time.monotonic() - max(0.0, time.time() - path.stat().st_mtime)

    def news(self) -> list[Event]:
        """Return the events since the last call; raises StorageError as `past`."""
        new = self._decode(self._follower.lines())
        if new:
            self._heard = time.monotonic()
        return new

    def look(self) -> list[Event]:
        """See whether the run's process lives, and return the events since the last call."""
        alive = lock_holder(self.run) is not None
        # Read after the look: what a process wrote before its end is then known before it counts as gone.
        new = self.news()
        self.alive = alive
        return new

    def _decode(self, lines: list[bytes]) -> list[Event]:
        path = self._follower.path
        found = [event for line in lines if (event := decode(line, path)) is not None]
        for event in found:
            if isinstance(event, RunEnded):
                self.ended = event
            elif isinstance(event, RunStarted):
                self.ended = None
        return found

    def _without_superseded(self, lines: list[bytes]) -> list[bytes]:
        """Leave out the gauges that others follow, except those with the most VRAM in use so far."""
        kept: list[bytes] = []
        last = max((at for at, line in enumerate(lines) if line.startswith(_GAUGES)), default=-1)
        for at, line in enumerate(lines):
            if at != last and line.startswith(_GAUGES):
                found = _VRAM.search(line)
                used = float(found[1]) if found else 0.0
                if used <= self._peak:
                    continue
                self._peak = used
            kept.append(line)
        return kept
