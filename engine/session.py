"""A run hosted by this process: its thread, its lock, commands in and events out.

The engine thread never waits for a viewer: an event goes to the journal, then into a bounded queue that a viewer drains
when it likes. It is no daemon thread, since torch aborts a process that exits under it: stop and join it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections import deque
from queue import Empty, SimpleQueue
from typing import Any

from lorasmith.engine.commands import Command
from lorasmith.engine.config import RunConfig
from lorasmith.engine.control import ControlServer
from lorasmith.engine.end_notice import run_on_finish
from lorasmith.engine.errors import StorageError
from lorasmith.engine.events import (
    Event,
    HardwareSampled,
    Logged,
    Parked,
    Paused,
    Resumed,
    RunEnded,
    RunStarted,
    StageChanged,
)
from lorasmith.engine.hardware import Sampler, resolve_device
from lorasmith.engine.journal import Journal
from lorasmith.engine.out_of_memory import free_memory
from lorasmith.engine.run_failure import describe_failure, describe_wordless_end
from lorasmith.engine.run_folder import RunFolder, create_run, open_run
from lorasmith.engine.run_lock import RunLock, lock_holder
from lorasmith.engine.run_log import RunLog, plain_text, quiet_libraries
from lorasmith.engine.run_summary import RunSummary, list_runs, summarize_run
from lorasmith.engine.sudden_end import describe_sudden_end
from lorasmith.engine.watchdog import Watchdog

__all__ = [
    "RunFolder",
    "RunSummary",
    "Session",
    "create_run",
    "list_runs",
    "lock_holder",
    "open_run",
    "quiet_libraries",
    "summarize_run",
]

MAX_WAITING_EVENTS = 50_000
SWITCH_SECONDS = 0.001
STUCK_SECONDS = 5.0
_DOING: dict[type[Event], str] = {
    RunStarted: "running",
    Resumed: "running",
    Paused: "paused",
    Parked: "parked",
    RunEnded: "ended",
}

logger = logging.getLogger("lorasmith.session")


class Session:
    """One run of `config` in `run`, for one start; resuming makes another session.

    `latest` holds the last event of each type; it is replaced, never changed, by the engine.
    `missed` counts events that were dropped from the queue because nobody drained it; the journal has them all.
    """

    def __init__(self, run: RunFolder, config: RunConfig) -> None:
        self.run = run
        self.config = config
        self.latest: dict[type[Event], Event] = {}
        self.missed = 0
        self._waiting: deque[Event] = deque(maxlen=MAX_WAITING_EVENTS)
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._emitting = threading.Lock()
        self._told_problem = ""
        self._before = ""
        self._ended = False
        self._step = 0
        self._watchdog = Watchdog(self._emit_past_a_hanging_disk, run.stacks, lambda: self._step)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Lock the run folder and start the engine thread.

        Raises RunLockedError naming the process that has it, or StorageError where the folder cannot be written to.
        """
        if self._thread is not None:
            raise RuntimeError("a session starts once")
        quiet_libraries()
        self._before = describe_sudden_end(self.run)
        with contextlib.ExitStack() as undo:
            self._lock = RunLock(self.run)
            undo.callback(self._lock.release)
            self._log = _open_log(self.run)
            undo.callback(self._log.close)
            self._journal = Journal(self.run.journal)
            undo.pop_all()
        # The engine's small Python segments would starve the screen's thread at the default of 5 ms.
        sys.setswitchinterval(SWITCH_SECONDS)
        self._sampler = Sampler(self.emit, device=self.config.train.device)
        self._control = ControlServer(self.run, self.send, self.status)
        self._thread = threading.Thread(target=self._host, name="engine", daemon=False)
        self._thread.start()

    def send(self, command: Command) -> None:
        """Ask the engine for something, without waiting; it is taken up at the next step boundary."""
        self._commands.put(command)

    def drain(self) -> list[Event]:
        """Return the events since the last call, oldest first, without waiting."""
        taken: list[Event] = []
        while self._waiting:
            taken.append(self._waiting.popleft())
        return taken

    @property
    def finished(self) -> bool:
        """Whether the engine thread is over; every event is then in the journal and the run folder is free."""
        return self._thread is not None and not self._thread.is_alive()

    @property
    def outcome(self) -> RunEnded | None:
        """How the run ended, or None before it did."""
        ended = self.latest.get(RunEnded)
        return ended if isinstance(ended, RunEnded) else None

    def status(self) -> dict[str, Any]:
        """Return what the run does now, as plain values: run, state, stage, step and total_steps."""
        doing = max(
            (self.latest[kind] for kind in _DOING if kind in self.latest), key=lambda event: event.time, default=None
        )
        begun, stage = self.latest.get(RunStarted), self.latest.get(StageChanged)
        return {
            "run": self.run.name,
            "state": _DOING[type(doing)] if doing else "running",
            "stage": getattr(stage, "stage", ""),
            "step": self._step,
            "total_steps": getattr(begun, "total_steps", self.config.train.steps),
        }

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the engine thread is over, at most `timeout` seconds; return whether it is."""
        if self._thread is None:
            return False
        self._thread.join(timeout)
        return self.finished

    def stop_and_join(self, timeout: float) -> bool:
        """Ask for a checkpoint and the end, wait at most `timeout` seconds and return whether the run ended."""
        self.send(Command.STOP)
        return self.join(timeout)

    # What the engine calls: the `Host` of `engine.trainer.train`.

    def emit(self, event: Event) -> None:
        """Journal `event`, then show it; never raises and never waits for a viewer. Safe from any thread."""
        self._watchdog.note(event)
        with self._emitting:
            self._record(event)

    def next_commands(self) -> list[Command]:
        """Return the commands that arrived since the last call, without waiting."""
        self._watchdog.beat()
        commands: list[Command] = []
        while True:
            try:
                commands.append(self._commands.get_nowait())
            except Empty:
                return commands

    def wait_command(self, timeout: float) -> Command | None:
        """Return the next command, waiting at most `timeout` seconds for it."""
        self._watchdog.beat()
        try:
            return self._commands.get(timeout=timeout)
        except Empty:
            return None

    def _emit_past_a_hanging_disk(self, event: Event) -> None:
        # The engine may hang in its write to the journal: then the screen at least must tell.
        if not self._emitting.acquire(timeout=STUCK_SECONDS):
            self._show(event)
            return
        try:
            self._record(event)
        finally:
            self._emitting.release()

    def _record(self, event: Event) -> None:
        if self._ended:
            # A reader takes RunEnded as the last word; a late gauge reading must not follow it.
            if not isinstance(event, HardwareSampled):
                logger.warning("after the end: %s", event)
            return
        if isinstance(event, RunEnded):
            self._tell_before()
        self._ended = isinstance(event, RunEnded)
        resumed = event.resumed_from if isinstance(event, RunStarted) else self._step
        self._step = getattr(event, "step", resumed)
        written = self._journal.append(event)
        self._show(event)
        if isinstance(event, RunStarted):
            self._tell_before()
        self._tell_problem(written)

    def _tell_before(self) -> None:
        """Say once how the last start ended that could not: below RunStarted, or before an end that comes sooner."""
        text, self._before = self._before, ""
        if text:
            self._record(Logged(severity="warning", message=text))

    def _show(self, event: Event) -> None:
        if len(self._waiting) == MAX_WAITING_EVENTS:
            self.missed += 1
        self._waiting.append(event)
        self.latest = {**self.latest, type(event): event}

    def _tell_problem(self, written: bool) -> None:
        problem = self._journal.problem
        if problem == self._told_problem:
            return
        self._told_problem = problem
        text = f"The journal cannot be written ({problem}); training goes on and the journal catches up when it can."
        news = Logged(severity="error", message=text)
        if not problem:
            news = Logged(severity="info", message="The journal is written again; it lacks gauge readings only.")
        logger.warning(news.message)
        # The journal keeps this line waiting behind the others, so a replay tells the same as the screen.
        self._journal.append(news)
        self._show(news)

    def _host(self) -> None:
        with contextlib.ExitStack() as leaving:
            # In this order from the bottom up, each of them whatever happens in the others.
            leaving.callback(self._log.close)
            leaving.callback(self._run_on_finish)
            leaving.callback(self._lock.release)
            leaving.callback(self._close_journal)
            leaving.callback(self._watchdog.stop)
            leaving.callback(self._sampler.stop)
            leaving.callback(self._control.close)
            self._watchdog.start()
            self._sampler.start()
            self._open_control()
            self._train()
            # The model is in reference cycles: its memory would only come back with some later collection.
            free_memory()

    def _close_journal(self) -> None:
        if not self._journal.close():
            logger.error("the last events could not be written to %s", self.run.journal)

    def _run_on_finish(self) -> None:
        """Run the user's command when the run folder is free again, so that it may start another run in it."""
        ended, command = self.outcome, self.config.run.on_finish
        if ended is None or not command:
            return
        try:
            problem = run_on_finish(command, ended, self.run)
        except Exception:
            logger.exception("run.on_finish failed")
            return
        if problem:
            logger.warning("%s", problem)

    def _open_control(self) -> None:
        try:
            self._control.start()
        except Exception as error:
            logger.warning("no control socket", exc_info=True)
            message = f"This run cannot be reached from other terminals: {plain_text(str(error))}"
            self.emit(Logged(severity="warning", message=message))

    def _train(self) -> None:
        try:
            # Before torch looks for GPUs: it takes CUDA_VISIBLE_DEVICES as it is then.
            resolve_device(self.config.train.device)
            # Imported here: torch takes seconds, and a broken torch must end the run in words.
            from lorasmith.engine.doctor.set_aside import set_aside_broken_packages

            set_aside_broken_packages(trying=False)
            from lorasmith.engine.trainer import train

            train(self.run, self.config, self)
        except BaseException as error:
            logger.exception("the run failed")
            self.emit(describe_failure(error, self._step))
        if not self._ended:
            self.emit(describe_wordless_end(self.latest, self._step, self.run.log))


def _open_log(run: RunFolder) -> RunLog:
    try:
        return RunLog(run.log)
    except OSError as error:
        why = error.strerror or os.strerror(error.errno or 0)
        raise StorageError(f"Cannot write {run.log}.", why=why, fix="Check the folder's permissions.") from error
