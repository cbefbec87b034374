"""A clock that jumps changes nothing: not the order of checkpoints and events, no duration, no list, no alarm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import events
from lorasmith.engine.events import Logged, RunStarted
from lorasmith.engine.journal import Journal
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_folder import create_run
from lorasmith.engine.run_lock import RunLock
from lorasmith.engine.run_summary import SILENT_SECONDS, list_runs, summarize_run

Record = Callable[[int, str, str], None]
HERE = Path(__file__).parent
START = {"run": "r", "total_steps": 10, "resumed_from": 0, "config": {}, "versions": {}, "device": "cpu"}


@pytest.fixture(scope="module")
def jumped(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path) -> dict[str, Any]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler for the moved clock, or no LD_PRELOAD")
    folder = tmp_path_factory.mktemp("clock")
    library, offsets = folder / "fake_clock.so", folder / "offsets"
    command = [compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), str(HERE / "fake_clock.c"), "-ldl"]
    subprocess.run(command, check=True)
    offsets.write_bytes(bytes(16))
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "FAKE_CLOCK": str(offsets),
        "LORASMITH_RUNTIME": str(folder / "runtime"),
        "LORASMITH_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.clock_jumps", str(tiny_sd15), str(folder), str(offsets)],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    # Else the test would prove nothing: the process did see its clock jump.
    moves = [later - earlier for earlier, later in zip(told["wall"], told["wall"][1:], strict=False)]
    assert sum(abs(move) > 3000 for move in moves) == told["jumps"]
    return told


@pytest.mark.campaign
def test_a_training_learns_and_resumes_the_same_whatever_the_clock_does(jumped: dict[str, Any], record: Record) -> None:
    assert jumped["losses"] == jumped["calm"]
    assert jumped["outcome"] == "finished"
    began, resumed = jumped["resumed_from"]
    assert jumped["stopped"] == f"stopped at step {resumed} of {2 * jumped['jumps']}"
    assert began == 0
    assert jumped["jumps"] <= resumed < 2 * jumped["jumps"]
    record(10, "clock jumps within one training", f"{jumped['jumps']}, up to 20 years: losses and resume unchanged")


@pytest.mark.campaign
def test_the_newest_checkpoints_are_kept_not_those_with_the_latest_time(jumped: dict[str, Any]) -> None:
    last = 2 * jumped["jumps"]
    assert jumped["checkpoints"] == [f"step-{step:08d}" for step in (last - 2, last - 1, last)]


@pytest.mark.campaign
def test_event_times_only_grow_and_tell_true_durations(jumped: dict[str, Any]) -> None:
    times = jumped["times"]
    assert times == sorted(times)
    # One jump is a machine asleep for nine hours: those are part of the time that passed.
    assert times[-1] - times[0] - 9 * 3600 == pytest.approx(jumped["took"], abs=5)


@pytest.mark.campaign
def test_step_times_and_with_them_the_time_left_know_nothing_of_the_jumps(jumped: dict[str, Any]) -> None:
    assert all(0 < pace < jumped["took"] for pace in jumped["paces"])


@pytest.mark.campaign
def test_no_jump_is_a_stall(jumped: dict[str, Any]) -> None:
    assert "Stalled" not in jumped["kinds"]


def test_events_of_one_process_keep_their_order_when_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Logged(severity="info", message="x")
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real - 7200)
    after = Logged(severity="info", message="x")
    assert 0 <= after.time - before.time < 60
    assert events.now() >= after.time


def test_a_clock_that_was_set_ahead_while_a_run_worked_does_not_keep_it_on_top_of_the_list(tmp_path: Path) -> None:
    resolved = resolve_config([Layer("test", {"run": {"name": "r", "output_folder": str(tmp_path)}})])
    first, second = create_run(resolved), create_run(resolved)
    for run, moment in ((first, 1000.0), (second, 2000.0)):
        journal = Journal(run.journal)
        journal.append(RunStarted(**START, time=moment))
        journal.close()
    ahead = time.time() + 86400
    for path in (first.path, first.journal):
        os.utime(path, (ahead, ahead))
    assert [summary.run for summary in list_runs(tmp_path)] == [second, first]


@pytest.mark.parametrize("set_back", [True, False])
def test_a_living_run_is_silent_by_the_clock_of_the_disk_for_a_second_at_most(tmp_path: Path, set_back: bool) -> None:
    run = create_run(resolve_config([Layer("test", {"run": {"name": "r", "output_folder": str(tmp_path)}})]))
    lock, journal = RunLock(run), Journal(run.journal)
    journal.append(RunStarted(**START))
    moved = time.time() + (86400 if set_back else -86400)
    for path in (run.journal, run.lock):
        os.utime(path, (moved, moved))
    assert abs(time.time() - run.journal.stat().st_mtime) > SILENT_SECONDS
    assert summarize_run(run).state == ("running" if set_back else "silent")
    # The next line, a second later, is written by the new clock.
    journal.append(Logged(severity="info", message="gauges"))
    assert summarize_run(run).state == "running"
    journal.close()
    lock.release()
