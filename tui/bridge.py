"""The one place where events leave the engine's side and become the state of the screen.

The engine never waits on the screen: it appends events to its own queue, and a timer of the screen calls `Bridge.poll`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol

from lorasmith.engine.commands import Command
from lorasmith.engine.control import ask
from lorasmith.engine.errors import ConfigError, StorageError
from lorasmith.engine.events import Event, RunEnded
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_watch import RunWatch
from lorasmith.engine.sudden_end import describe_sudden_end
from lorasmith.tui.state import RunState, reduce

MAX_EVENTS_PER_POLL = 2000
READ_SECONDS = 0.2
LOOK_SECONDS = 1.0


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

    in_control = False
    quiet_seconds = 0.0
    problem = ""

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


class AttachedRun:
    """A run of another process, seen through its journal and commanded through its control socket.

    A thread of its own reads, asks and looks whether the process lives, so that no slow disk and no busy process holds
    the screen up. `state` is the fold of all that was journaled when the thread began, complete once `share_read` is 1.
    `in_control` says whether commands reach the run, `last_words` what is known of a process that died without a word.
    """

    def __init__(self, run: RunFolder, *, read_only: bool = False) -> None:
        """Watch `run` from `start` on; with `read_only` without commands."""
        self.run = run
        self.read_only = read_only
        self.state = RunState()
        self.share_read = 0.0
        self.in_control = False
        self.last_words = ""
        self._unread = self._unreachable = ""
        self._over = False
        self._watch = RunWatch(run)
        self._new: deque[Event] = deque()
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="attached", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def close(self) -> None:
        """End the thread at its next turn; the run is not touched."""
        self._commands.put(None)

    @property
    def problem(self) -> str:
        """What went wrong with reading or commanding the run, in words; "" while all is well."""
        return self._unread or self._unreachable

    @property
    def alive(self) -> bool:
        """Whether a process works on the run, as of the last look a second ago."""
        return self._watch.alive

    @property
    def ended(self) -> RunEnded | None:
        """The last word of the run's newest start, if it had one."""
        return self._watch.ended

    @property
    def finished(self) -> bool:
        """Whether the run has ended or its process is gone, and every event was drained."""
        return self._over and not self._new

    @property
    def quiet_seconds(self) -> float:
        """For how long the run has said nothing; its gauges come about once a second."""
        return self._watch.quiet_seconds

    def drain(self) -> list[Event]:
        """Return the events since the last call, oldest first, without waiting."""
        taken: list[Event] = []
        while self._new:
            taken.append(self._new.popleft())
        return taken

    def send(self, command: Command) -> None:
        """Ask the run for something, without waiting; a failure is said in `problem`."""
        if not self.read_only:
            self._commands.put(command)

    def _work(self) -> None:
        try:
            for share, part in self._watch.past():
                for event in part:
                    self.state = reduce(self.state, event)
                self.share_read = min(share, 0.99)
        except StorageError as error:
            self._unread = str(error)
        self.share_read = 1.0
        looked = 0.0
        while True:
            now = time.monotonic()
            if now - looked >= LOOK_SECONDS:
                looked = now
                self._look()
            try:
                command = self._commands.get(timeout=READ_SECONDS)
            except Empty:
                self._read(self._watch.news)
                continue
            if command is None:
                return
            self._ask(command)

    def _read(self, read: Callable[[], list[Event]]) -> None:
        try:
            self._new.extend(read())
            self._unread = ""
        except StorageError as error:
            self._unread = str(error)
        # Only now: who sees the end must find its last events waiting.
        self._over = self._watch.over

    def _look(self) -> None:
        self._read(self._look_closely)
        if not self._watch.alive:
            self.in_control = False
        elif not (self.read_only or self.in_control):
            self._ask("ping")

    def _look_closely(self) -> list[Event]:
        new = self._watch.look()
        if self._watch.ended is not None or self._watch.alive:
            self.last_words = ""
        elif not self.last_words:
            self.last_words = describe_sudden_end(self.run)
        return new

    def _ask(self, request: str) -> None:
        try:
            ask(self.run, {"request": str(request)})
            self.in_control, self._unreachable = True, ""
        except ConfigError:
            # Nobody works on the run any more; the next look tells so.
            self.in_control = False
        except StorageError as error:
            self.in_control, self._unreachable = False, f"Not in control: {error}"


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
