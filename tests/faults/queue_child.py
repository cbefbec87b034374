"""What the queue starts in place of a training: a real session whose engine is a few lines, without torch.

Arguments: run folder, device, book. Each start is written to the book as `begin DEVICE PID RUN` and, unless it is
killed, `end DEVICE PID RUN`. What the run does is said by its file `behavior`: learn, fail, crash, kill or wait.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

from lorasmith.engine.commands import Command
from lorasmith.engine.errors import EXIT_STOPPED, DatasetError, RunLockedError
from lorasmith.engine.events import RunEnded, RunStarted, StepsDone
from lorasmith.engine.journal import replay
from lorasmith.engine.session import RunFolder, Session, open_run

STEPS = 10


def train(run: RunFolder, config: Any, host: Any) -> None:
    """Do the steps that the journal lacks; each is as good as a checkpoint here."""
    done = max((event.step for event in replay(run.journal) if isinstance(event, StepsDone)), default=0)
    host.emit(RunStarted(run="r", total_steps=STEPS, resumed_from=done, config={}, versions={}, device="cpu"))
    behavior = (run.path / "behavior").read_text()
    if behavior == "fail":
        raise DatasetError("No picture can be read.")
    for step in range(done + 1, STEPS + 1):
        if Command.STOP in host.next_commands():
            host.emit(RunEnded(outcome="stopped", step=step - 1, message="Stopped.", exit_code=EXIT_STOPPED))
            return
        time.sleep(0.03)
        host.emit(StepsDone(step=step, epoch=1, losses=[1.0], learning_rate=1.0, grad_norm=1.0, seconds_per_step=1.0))
        if behavior == "kill" and step == STEPS // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        while behavior == "wait" and step == STEPS // 2:
            if host.wait_command(0.05) is Command.STOP:
                host.emit(RunEnded(outcome="stopped", step=step, message="Stopped.", exit_code=EXIT_STOPPED))
                return
    host.emit(RunEnded(outcome="finished", step=STEPS, message="Done."))


def main() -> int:
    """Run the session and return the exit code of `lorasmith train`."""
    run, device, book = open_run(Path(sys.argv[1])), sys.argv[2], os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND)
    if (run.path / "behavior").read_text() == "crash":
        print("Error: The interpreter lacks a library.", file=sys.stderr)
        return 17
    trainer = sys.modules["lorasmith.engine.trainer"] = types.ModuleType("lorasmith.engine.trainer")
    trainer.train = train  # type: ignore[attr-defined]
    session = Session(run, run.load_config().config)
    signal.signal(signal.SIGTERM, lambda number, frame: session.send(Command.STOP))
    try:
        session.start()
    except RunLockedError as error:
        return error.exit_code
    os.write(book, f"begin {device} {os.getpid()} {run.name}\n".encode())
    while not session.join(0.05):
        pass
    os.write(book, f"end {device} {os.getpid()} {run.name}\n".encode())
    return session.outcome.exit_code if session.outcome else 1


if __name__ == "__main__":
    sys.exit(main())
