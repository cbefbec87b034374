"""The one place where events leave the engine's side and become the state of the screen.

The engine never waits on the screen: it appends events to its own queue, and a timer of the screen calls `Bridge.poll`.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from lorasmith.engine.commands import Command
from lorasmith.engine.events import Event, RunEnded
from lorasmith.tui.state import RunState, reduce

MAX_EVENTS_PER_POLL = 2000


class RunSource(Protocol):
    """Where events come from and commands go to: `engine.session.Session`, or `FollowedRun`."""

    @property
    def finished(self) -> bool:
        """Whether no more events will come after those waiting."""
        ...

    def drain(self) -> list[Event]:
        """Return the events since the last call, oldest first, without waiting."""
        ...

    def send(self, command: Command) -> None:
        """Ask the run for something, without waiting."""
        ...


class JournalTail(Protocol):
    """What `engine.journal.Follower` offers."""

    def poll(self) -> list[Event]:
        """Return the events that were appended since the last call."""
        ...


class FollowedRun:
    """A run of another process, or one that is over, seen through its journal: it can be watched, not commanded."""

    def __init__(self, follower: JournalTail) -> None:
        """Read events from `follower`."""
        self._follower = follower
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether the journal's last word is the end of the run."""
        return self._ended

    def drain(self) -> list[Event]:
        """Return the events that were journaled since the last call."""
        new = self._follower.poll()
        if new:
            self._ended = isinstance(new[-1], RunEnded)
        return new

    def send(self, command: Command) -> None:
        """Do nothing: commands belong to the process that trains."""


class Bridge:
    """Folds the events of one source into a state, a bounded number at a time so that keys stay quick."""

    def __init__(self, source: RunSource, state: RunState | None = None) -> None:
        """Start from `state`, an empty one by default."""
        self.source = source
        self.state = state or RunState()
        self._waiting: deque[Event] = deque()

    def poll(self) -> bool:
        """Take in waiting events and say whether there were any."""
        self._waiting.extend(self.source.drain())
        count = min(MAX_EVENTS_PER_POLL, len(self._waiting))
        state = self.state
        for _ in range(count):
            state = reduce(state, self._waiting.popleft())
        self.state = state
        return count > 0
