"""A run without torch, as a program: it locks, journals, answers on its socket and obeys. PATH STEPS [SECONDS]."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from lorasmith.engine import events
from lorasmith.engine.commands import Command
from lorasmith.engine.control import ControlServer
from lorasmith.engine.journal import Journal
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import RunLock

READY = "ready\n"


class BeatingRun:
    """Steps of `seconds` each; pause, park, resume, save and stop do what they say, as the trainer tells it."""

    def __init__(self, run: RunFolder, steps: int, seconds: float, *, first: int = 0) -> None:
        self.run, self.steps, self.seconds, self.step = run, steps, seconds, first
        self.commands: SimpleQueue[Command] = SimpleQueue()
        self.waiting = False

    def train(self) -> None:
        with self._host() as journal:
            self.journal = journal
            self.tell(
                events.RunStarted(
                    run=self.run.name, total_steps=self.steps, resumed_from=self.step, config={}, versions={},
                    device="cpu",
                ),
                events.StageChanged(stage="train", label="Training"),
            )  # fmt: skip
            print(READY, end="", flush=True)
            stopped = False
            while not stopped and (self.step < self.steps or self.waiting):
                stopped = self.beat()
            outcome: events.Outcome = "stopped" if stopped else "finished"
            self.tell(
                events.RunEnded(outcome=outcome, step=self.step, message="It ended.", exit_code=130 if stopped else 0)
            )

    def beat(self) -> bool:
        try:
            command = self.commands.get(timeout=self.seconds)
        except Empty:
            if not self.waiting:
                self.step += 1
                self.tell(steps_done(self.step))
            return False
        self.tell(events.CommandReceived(command=command.value, step=self.step))
        match command:
            case Command.PAUSE:
                self.tell(events.Paused(step=self.step))
                self.waiting = True
            case Command.PARK:
                self.tell(events.Parked(step=self.step, freed_gib=7.9))
                self.waiting = True
            case Command.RESUME:
                self.tell(events.Resumed(step=self.step))
                self.waiting = False
            case Command.SAVE_NOW | Command.STOP:
                path = str(self.run.checkpoints / f"step-{self.step:08}")
                self.tell(events.CheckpointSaved(step=self.step, path=path, bytes=1, seconds=0.1))
        return command is Command.STOP

    def tell(self, *told: events.Event) -> None:
        for event in told:
            self.journal.append(event)

    @contextmanager
    def _host(self) -> Iterator[Journal]:
        lock = RunLock(self.run)
        journal = Journal(self.run.journal)
        server = ControlServer(self.run, self.commands.put, lambda: {"step": self.step})
        server.start()
        yield journal
        journal.close()
        server.close()
        lock.release()


def steps_done(step: int) -> events.StepsDone:
    return events.StepsDone(
        step=step, epoch=0, losses=[1.0 / step], learning_rate=1e-4, grad_norm=0.5, seconds_per_step=0.5
    )


def make_run(path: Path) -> RunFolder:
    path.mkdir(parents=True)
    (path / "run.toml").touch()
    return RunFolder(path)


if __name__ == "__main__":
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 0.02
    first = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    BeatingRun(RunFolder(Path(sys.argv[1])), int(sys.argv[2]), seconds, first=first).train()
