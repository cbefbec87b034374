"""Promise 6: the real training stops with a checkpoint from whatever it does, and asking twice damages nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import step_meter
from lorasmith.engine.commands import Command
from lorasmith.engine.events import (
    CheckpointSaved,
    Event,
    Parked,
    Paused,
    PreviewReady,
    Progress,
    RunEnded,
    StageChanged,
)
from lorasmith.engine.running_clock import clock_stopped, running_seconds
from tests.engine.cli_runs import make_tiny_run
from tests.engine.running import RecordingHost, run_training, tiny_config
from tests.tui.terminal_program import ROOT

Record = Callable[[int, str, str], None]


def is_stage(name: str) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, StageChanged) and event.stage == name


WHILE: dict[str, Callable[[Event], bool]] = {
    "loading": is_stage("load"),
    "encoding": lambda event: isinstance(event, Progress) and event.stage == "cache",
    "training": is_stage("train"),
    "saving": lambda event: isinstance(event, CheckpointSaved),
    "drawing": lambda event: isinstance(event, PreviewReady),
    "paused": lambda event: isinstance(event, Paused),
    "parked": lambda event: isinstance(event, Parked),
}


@pytest.mark.parametrize("moment", list(WHILE))
def test_a_stop_is_obeyed_in_time_whatever_the_training_does(tiny_sd15: Path, tmp_path: Path, moment: str) -> None:
    asked: list[float] = []

    def stop(event: Event) -> None:
        if WHILE[moment](event) and not asked:
            asked.append(time.monotonic())
            host.waiting.append(Command.STOP)

    commands = {"paused": [Command.PAUSE], "parked": [Command.PAUSE, Command.PARK]}.get(moment, [])
    host = RecordingHost(at={2: commands}, on_event=stop)
    settings: dict[str, Any] = {"train": {"steps": 200, "batch_size": 2, "log_every": 1, "device": "cpu"}}
    config = tiny_config(tiny_sd15, tmp_path, **settings, checkpoints={"every": 3}, previews={"every": 4, "steps": 2})
    run, _ = run_training(config, host)
    assert asked
    assert time.monotonic() - asked[0] < 10
    (ended,) = host.of(RunEnded)
    assert (ended.outcome, ended.exit_code) == ("stopped", 130)
    assert ended.step < 200
    if moment not in ("loading", "encoding"):
        assert (run.checkpoints / f"step-{ended.step:08d}").is_dir()


@pytest.mark.campaign
def test_sigterm_twice_at_random_instants_never_costs_a_checkpoint(
    tiny_sd15: Path, tmp_path: Path, campaign: bool, record: Record
) -> None:
    trials = 51 if campaign else 4
    tiny = make_tiny_run(tmp_path, tiny_sd15, steps=100_000)
    text = tiny.run_file.read_text().replace("[checkpoints]\nevery = 0", "[checkpoints]\nevery = 1")
    assert "every = 1" in text
    tiny.run_file.write_text(text)
    command = [sys.executable, "-m", "tests.faults.sigterm_twice", str(tiny.run_file), str(trials), "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == trials
    newest = 0
    for trial in told:
        assert trial["code"] == 130, trial
        assert trial["damaged"] == [], trial
        assert trial["resumed_from"] == newest, told
        newest = trial["newest"]
    assert newest > 0
    record(6, "SIGTERM twice at random instants: checkpoint whole, next start resumes", f"{trials - 1} of {trials - 1}")


def test_time_in_which_the_process_was_stopped_is_no_time_of_a_step() -> None:
    before, real = running_seconds(), time.monotonic()
    with clock_stopped():
        held = running_seconds()
        while time.monotonic() - real < 0.3:
            assert running_seconds() == held
    assert running_seconds() - before < 0.2
    assert step_meter.running_seconds is running_seconds
