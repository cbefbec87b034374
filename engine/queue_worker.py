"""Works on the queue: one process a run, one run at a time on each device, whatever becomes of each.

The worker may be killed at any instant: the runs go on, since each is a session of its own, and the next worker finds
them by their locks. It never trains itself, and needs no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from lorasmith.engine.errors import EXIT_STOPPED, HardwareError, RunLockedError
from lorasmith.engine.hardware import snapshot
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import RunLock, lock_holder, process_mark
from lorasmith.engine.run_queue import Entry, EntryState, RunQueue, entry_state
from lorasmith.engine.sudden_end import describe_sudden_end

POLL_SECONDS = 0.5
MAX_STARTS = 5
"""How often a run is started without coming further: one that takes the machine down must not do so for ever."""
STOP_SECONDS = 60.0
CONSOLE_BYTES = 2000

Say = Callable[[str], None]
Command = Callable[[RunFolder, str], list[str]]
"""The command line that trains a run on a device ("" for the one of its settings)."""


def train_command(run: RunFolder, device: str) -> list[str]:
    """Return the command line that begins or resumes `run`."""
    command = [sys.executable, "-m", "lorasmith.engine.cli", "train", f"--resume={run.path}"]
    return [*command, "--set", f"train.device={device}"] if device else command


def choose_slots(devices: Sequence[str]) -> list[str]:
    """Return the devices to work on: UUIDs of GPUs, `cpu`, or "" for what each run's own settings say.

    `all` stands for every GPU. Raises HardwareError where there is no such GPU.
    """
    if not devices:
        return [""]
    reading = snapshot()
    known = {gpu.uuid.lower(): gpu.uuid for gpu in reading.gpus}
    chosen: list[str] = []
    for device in devices:
        if device == "all" and known:
            chosen += known.values()
        elif device == "cpu" or device.startswith("MIG-"):
            chosen.append(device)
        elif device.lower() in known:
            chosen.append(known[device.lower()])
        else:
            raise HardwareError(
                f"--device {device} is no GPU of this machine.",
                why=f"It has {', '.join(known.values())}." if known else reading.note,
                fix="Give cpu, all, or one of the GPUs that `lorasmith doctor` lists.",
            )
    return list(dict.fromkeys(chosen))


@dataclasses.dataclass
class _Working:
    """A run that is being trained: by a child of this worker, or (`child` None) by a process that was there before."""

    entry: Entry
    slot: str
    child: subprocess.Popen[bytes] | None = None

    def code(self) -> int | None:
        return None if self.child is None else self.child.poll()

    def over(self) -> bool:
        if self.child is not None:
            return self.child.poll() is not None
        return lock_holder(self.entry.folder) is None and not self.entry.process_lives()


class QueueWorker:
    """Trains the runs of `queue` on `slots` (see `choose_slots`) and tells what happens through `say`.

    `stop` may be called from a signal handler.
    """

    def __init__(self, queue: RunQueue, slots: Sequence[str], say: Say, command: Command = train_command) -> None:
        self._queue = queue
        self._slots = list(slots)
        self._say = say
        self._command = command
        self._working: dict[int, _Working] = {}
        self._over: set[Entry] = set()
        self._asked_to_stop = 0

    def stop(self) -> None:
        """Ask for a checkpoint and the end of all runs, which go on with the next worker; twice: wait for none."""
        self._asked_to_stop += 1

    def run(self) -> int:
        """Work until nothing waits and nothing runs, and return the exit code.

        Raises RunLockedError naming the process that works on the queue already.
        """
        # A folder that cannot be made is said by the lock.
        with contextlib.suppress(OSError):
            self._queue.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            lock = RunLock(self._queue.work)
        except RunLockedError as error:
            why = error.why
            raise RunLockedError(
                "Another `lorasmith queue run` works on the queue.",
                why=why,
                fix="It takes up what is added meanwhile; there is nothing to do.",
            ) from None
        try:
            while not self._asked_to_stop:
                if not self.tick():
                    return 0
                time.sleep(POLL_SECONDS)
            self._stop_all()
            return EXIT_STOPPED
        finally:
            lock.release()

    def tick(self) -> bool:
        """Settle what is over and begin what can begin; return whether anything runs or may still begin."""
        for working in [working for working in self._working.values() if working.over()]:
            self._settle(working)
        waiting = self._look()
        for entry, state in waiting:
            free = [slot for slot in self._slots if slot not in self._busy()]
            if not free:
                break
            self._begin(entry, state, free[0])
        return bool(self._working)

    def _look(self) -> list[tuple[Entry, EntryState]]:
        """Return the entries that wait, in order; those that somebody else trains are taken note of."""
        waiting = []
        for entry in self._queue.entries():
            # A long journal takes a moment to read, which must not be spent twice a second on what is over.
            if entry.number in self._working or entry in self._over:
                continue
            state = entry_state(entry)
            if state.status == "running":
                self._working[entry.number] = _Working(entry, entry.slot)
                self._say(f"{entry.number}  {entry.folder.name} is being trained already; it is waited for.")
            elif state.status == "waiting":
                waiting.append((entry, state))
            else:
                self._over.add(entry)
        return waiting

    def _busy(self) -> set[str]:
        return {working.slot for working in self._working.values()}

    def _begin(self, entry: Entry, state: EntryState, slot: str) -> None:
        step = state.summary.step if state.summary else 0
        starts = 1 if step > entry.step else entry.starts + 1
        if starts > MAX_STARTS:
            self._fail(entry, f"It was started {MAX_STARTS} times and never came further than step {step}.")
            return
        # Before the process begins: whoever comes after a kill between the two finds no process, and starts it again.
        self._queue.update(entry.number, slot=slot, held=False, starts=starts, step=step, pid=0)
        try:
            with _console(entry.folder) as console:
                child = subprocess.Popen(  # noqa: S603  (lorasmith itself)
                    self._command(entry.folder, slot),
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    # Neither Ctrl-C nor the end of this terminal reaches it.
                    start_new_session=True,
                )
        except OSError as error:
            self._fail(entry, f"Its process could not be started: {error.strerror or error}.")
            return
        mark = process_mark(child.pid) or ""
        entry = dataclasses.replace(entry, slot=slot, pid=child.pid, mark=mark, host=socket.gethostname())
        self._queue.update(entry.number, pid=entry.pid, mark=mark, host=entry.host)
        self._working[entry.number] = _Working(entry, slot, child)
        on = f" on {slot}" if slot else ""
        self._say(f"{entry.number}  {entry.folder.name} begins{f' again after step {step}' if step else ''}{on}.")

    def _settle(self, working: _Working) -> None:
        entry, code = working.entry, working.code()
        del self._working[entry.number]
        if code == RunLockedError.exit_code:
            # Somebody else was faster with this run; the next look finds out.
            return
        state = entry_state(dataclasses.replace(entry, pid=0))
        if state.status == "waiting":
            # Ended without a word of its own.
            self._fail(entry, _sudden_end(entry.folder, code))
        elif state.status == "failed":
            self._fail(entry, state.words)
        elif state.status != "running":
            self._say(f"{entry.number}  {entry.folder.name}: {state.words}.")

    def _fail(self, entry: Entry, reason: str) -> None:
        self._queue.update(entry.number, failed=reason, pid=0)
        self._say(f"{entry.number}  {entry.folder.name} failed: {reason}")

    def _stop_all(self) -> None:
        for working in self._working.values():
            # First the mark, then the signal: a worker that dies between the two leaves a run that goes on.
            self._queue.update(working.entry.number, held=True)
            self._say(f"{working.entry.number}  {working.entry.folder.name} saves a checkpoint and stops.")
            _terminate(working)
        deadline = time.monotonic() + STOP_SECONDS
        while self._asked_to_stop < 2 and time.monotonic() < deadline:
            if all(working.over() for working in self._working.values()):
                return
            time.sleep(0.05)
        self._say("Not all runs have ended yet; they end by themselves when their checkpoint is saved.")


def _terminate(working: _Working) -> None:
    if working.child is not None:
        working.child.terminate()
        return
    holder = lock_holder(working.entry.folder) or {}
    here = holder.get("host") == socket.gethostname() and process_mark(int(holder.get("pid", 0))) == holder.get("mark")
    pid = int(holder["pid"]) if here else working.entry.pid if working.entry.process_lives() else 0
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _console(run: RunFolder) -> IO[bytes]:
    """Open the file for what a run's process prints; a disk that refuses it does not keep the run from starting."""
    try:
        return (run.path / "console.log").open("ab")
    except OSError:
        return Path(os.devnull).open("ab")


def _sudden_end(run: RunFolder, code: int | None) -> str:
    """Say why a process ended that left no word in the journal."""
    if (code is None or code < 0) and (known := describe_sudden_end(run)):
        return known
    if code == -signal.SIGKILL:
        return "Its process was killed (signal 9); the machine may have run out of memory."
    if code is not None and code < 0:
        return f"Its process was ended by signal {-code} ({signal.Signals(-code).name})."
    if code is None:
        return "Its process ended without a word; it may have been killed, or the machine run out of memory."
    try:
        with (run.path / "console.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - CONSOLE_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    said = next((line for line in lines if line.startswith("Error:")), lines[-1] if lines else "")
    return f"Its process ended with exit code {code}. {said.removeprefix('Error:').strip()}".strip()
