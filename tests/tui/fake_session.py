"""Sessions without torch: one that a test feeds by hand, and one whose thread really runs and obeys commands."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from types import SimpleNamespace

from lorasmith.engine import events
from lorasmith.engine.commands import Command


class HandFedSession:
    """A test appends to `waiting` and reads `sent`."""

    def __init__(self, *waiting: events.Event) -> None:
        self.waiting = list(waiting)
        self.sent: list[Command] = []
        self.finished = False

    def drain(self) -> list[events.Event]:
        taken, self.waiting = self.waiting, []
        return taken

    def send(self, command: Command) -> None:
        self.sent.append(command)

    def join(self, timeout: float | None = None) -> bool:
        return self.finished


class BeatingSession(HandFedSession):
    """A thread that "trains": each step appends a line to `beats`, so that a test outside sees whether it goes on."""

    def __init__(self, folder: Path, steps: int, seconds_per_step: float = 0.02) -> None:
        super().__init__()
        self.folder = folder
        self.run = SimpleNamespace(path=folder, log=folder / "run.log")
        self.latest: dict[type[events.Event], events.Event] = {}
        self.beats = folder / "beats"
        self._steps = steps
        self._seconds = seconds_per_step
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine")

    def start(self) -> None:
        self._thread.start()

    def send(self, command: Command) -> None:
        self._commands.put(command)

    def emit(self, event: events.Event) -> None:
        """As `Session.emit`; the "journal" is the name of each event and its message."""
        with (self.folder / "journal").open("a") as file:
            file.write(f"{type(event).__name__} {getattr(event, 'message', '')}\n")
        self.latest = {**self.latest, type(event): event}
        self.waiting.append(event)

    @property
    def outcome(self) -> events.RunEnded | None:
        ended = self.latest.get(events.RunEnded)
        return ended if isinstance(ended, events.RunEnded) else None

    def join(self, timeout: float | None = None) -> bool:
        self._thread.join(timeout)
        return self.finished

    def _run(self) -> None:
        self.emit(
            events.RunStarted(
                run="beats", total_steps=self._steps, resumed_from=0, config={}, versions={}, device="cpu"
            )
        )
        self.emit(events.StageChanged(stage="train", label="Training"))
        step, stopped = 0, False
        while step < self._steps and not stopped:
            step += 1
            time.sleep(self._seconds)
            with self.beats.open("a") as file:
                file.write(f"{step} {time.monotonic()}\n")
            self.emit(
                events.StepsDone(
                    step=step, epoch=0, losses=[1.0 / step], learning_rate=1e-4, grad_norm=1.0,
                    seconds_per_step=self._seconds,
                )
            )  # fmt: skip
            stopped = self._obey(step)
        self._end(step, stopped)

    def _obey(self, step: int) -> bool:
        try:
            command = self._commands.get_nowait()
        except Empty:
            return False
        self.emit(events.CommandReceived(command=command, step=step))
        return command is Command.STOP

    def _end(self, step: int, stopped: bool) -> None:
        if stopped:
            (self.folder / "checkpoint").write_text(str(step))
            self.emit(events.CheckpointSaved(step=step, path=str(self.folder), bytes=1, seconds=0.0))
        self.emit(
            events.RunEnded(
                outcome="stopped" if stopped else "finished",
                step=step,
                message="Stopped." if stopped else "Training finished.",
                exit_code=130 if stopped else 0,
            )
        )
        (self.folder / "ended").write_text("stopped" if stopped else "finished")
        self.finished = True
