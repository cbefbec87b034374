"""A real session around an engine without torch, as a program: MODE FOLDER OPTIONS (JSON); see `Options`.

MODE is `headless` (what `lorasmith train` does) or `screen` (the monitor). Each step is a line in FOLDER/beats.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import sys
import threading
import time
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.engine import stopping
from lorasmith.engine.commands import Command
from lorasmith.engine.events import CheckpointSaved, RunEnded, RunStarted, StageChanged, StepsDone
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_folder import create_run
from lorasmith.engine.running_clock import running_seconds


@dataclass
class Options:
    """How the engine behaves, and what is broken."""

    steps: int = 100_000
    seconds_per_step: float = 0.02
    stage: str = "train"
    deaf: bool = False  # never looks at a command
    slow_save: float = 0.0
    idle_seconds: float = stopping.IDLE_SECONDS
    busy_seconds: float = stopping.BUSY_SECONDS
    noise: int = 0  # bytes of each kind of noise, after ten steps
    crash: str = ""  # a name of tests.faults.screen_crashes
    on_finish: str = ""


class Engine:
    """Stands for `engine.trainer`: beats, obeys, saves."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder = folder
        self.options = options
        self.beats = folder / "beats"

    def train(self, run: Any, config: Any, host: Any) -> None:
        options = self.options
        host.emit(
            RunStarted(
                run=run.path.name, total_steps=options.steps, resumed_from=0, config={}, versions={}, device="cpu"
            )
        )
        host.emit(StageChanged(stage=options.stage, label="Training"))  # type: ignore[arg-type]
        step, began = 0, running_seconds()
        while step < options.steps:
            time.sleep(options.seconds_per_step)
            step += 1
            with self.beats.open("a") as file:
                file.write(f"{step} {time.monotonic()} {running_seconds() - began}\n")
            seconds, began = running_seconds() - began, running_seconds()
            host.emit(
                StepsDone(
                    step=step, epoch=0, losses=[1.0 / step], learning_rate=1e-4, grad_norm=1.0,
                    seconds_per_step=seconds,
                )
            )  # fmt: skip
            if step == 10 and options.noise:
                make_noise(options.noise)
                (self.folder / "noisy").touch()
            commands = set() if options.deaf else set(host.next_commands())
            if commands & {Command.SAVE_NOW, Command.STOP}:
                self._save(run, host, step)
            if Command.STOP in commands:
                host.emit(RunEnded(outcome="stopped", step=step, message=f"Stopped at step {step}.", exit_code=130))
                return
        host.emit(RunEnded(outcome="finished", step=step, message="Training finished."))

    def _save(self, run: Any, host: Any, step: int) -> None:
        (self.folder / "saving").touch()
        time.sleep(self.options.slow_save)
        path = run.checkpoints / f"step-{step:08d}"
        path.mkdir(parents=True)
        host.emit(CheckpointSaved(step=step, path=str(path), bytes=1, seconds=0.0))


def make_noise(size: int) -> None:
    """Write `size` bytes in each way in which a library could reach the screen; marked NOISE."""
    line = "NOISE \x1b[2J\x1b]0;pwned\x07\x1b[31m \u202e and more of it"
    count = size // len(line) + 1
    for _ in range(count):
        print(line)
        print(line, file=sys.stderr)
        os.write(1, line.encode() + b"\n")
        os.write(2, line.encode() + b"\n")
    libc = ctypes.PyDLL(None)  # holds the interpreter's lock, as many extensions do
    for _ in range(count):
        libc.printf(b"%s\n", line.encode())
    libc.fflush(None)
    code = f"import os\nfor _ in range({count}): os.write(1, {line!r}.encode() + b'\\n')"
    subprocess.run([sys.executable, "-c", code], check=True)
    for number in range(count):
        warnings.warn(f"{line} {number}", stacklevel=1)
        logging.getLogger("diffusers.noise").warning("%s %d", line, number)
        sys.stderr.write(f"\r{number}/{count} NOISE |####      |")


def main() -> int:
    mode, folder, options = sys.argv[1], Path(sys.argv[2]), Options(**json.loads(sys.argv[3]))
    stopping.IDLE_SECONDS, stopping.BUSY_SECONDS = options.idle_seconds, options.busy_seconds
    trainer = types.ModuleType("lorasmith.engine.trainer")
    trainer.train = Engine(folder, options).train  # type: ignore[attr-defined]
    sys.modules["lorasmith.engine.trainer"] = trainer
    settings = {"run": {"output_folder": str(folder / "runs"), "on_finish": options.on_finish}}
    resolved = resolve_config([Layer("test", settings), Layer("test", {"train": {"device": "cpu"}})])
    (folder / "pid").write_text(str(os.getpid()))
    assert threading.current_thread() is threading.main_thread()
    if mode == "headless":
        from lorasmith.engine.cli.train import host_run

        return host_run(create_run(resolved), resolved.config)
    return show(folder, options, resolved)


def show(folder: Path, options: Options, resolved: Any) -> int:
    from textual.app import App

    from lorasmith.engine.session import Session
    from lorasmith.tui.screen_host import run_app
    from lorasmith.tui.screens.monitor import MonitorScreen

    session = Session(create_run(resolved), resolved.config)
    session.start()

    class Monitored(App[int]):
        def on_mount(self) -> None:
            self.push_screen(MonitorScreen(session))

    app: App[int] = Monitored()
    if options.crash:
        from tests.faults.screen_crashes import CRASHES

        app = CRASHES[options.crash](app) or app
    return run_app(app, lambda: session, folder / "screen.log")


if __name__ == "__main__":
    sys.exit(main())
