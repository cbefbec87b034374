"""The queue goes on whatever ends: a run, its worker at any instant, the terminal, or the machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorasmith.engine.events import RunStarted, StepsDone
from lorasmith.engine.journal import replay
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_folder import RunFolder, create_run
from lorasmith.engine.run_lock import lock_holder, process_mark
from lorasmith.engine.run_queue import RunQueue, entry_state
from tests.faults.queue_child import STEPS

Record = Callable[[int, str, str], None]
ROOT = Path(__file__).parents[2]
DEADLINE = 120.0
COMMAND = [sys.executable, "-m", "tests.faults.queue_work"]


class Work:
    """A queue with its runs, and workers of it in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.queue = RunQueue(folder / "state")
        self.book = folder / "book"
        self.book.write_text("")
        self._settings = {"run": {"name": "r", "output_folder": str(folder / "runs")}}
        self.runs: list[RunFolder] = []
        self.workers: list[subprocess.Popen[str]] = []

    def add(self, *behaviors: str) -> None:
        for behavior in behaviors:
            run = create_run(resolve_config([Layer("test", self._settings)]))
            (run.path / "behavior").write_text(behavior)
            self.queue.add(run)
            self.runs.append(run)

    def start(self, *slots: str) -> subprocess.Popen[str]:
        command = [*COMMAND, str(self.queue.folder), str(self.book), *slots]
        worker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.workers.append(worker)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "works\n"
        return worker

    def call(self, *arguments: str) -> str:
        done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout

    def statuses(self) -> list[str]:
        return [entry_state(entry).status for entry in self.queue.entries()]

    def words(self) -> list[str]:
        return [entry_state(entry).words for entry in self.queue.entries()]

    def steps(self) -> list[list[int]]:
        return [[event.step for event in replay(run.journal) if isinstance(event, StepsDone)] for run in self.runs]

    def starts(self) -> list[int]:
        return [sum(isinstance(event, RunStarted) for event in replay(run.journal)) for run in self.runs]

    def end(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.communicate()
        for run in self.runs:
            holder = lock_holder(run)
            if holder:
                os.kill(holder["pid"], signal.SIGKILL)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    monkeypatch.setenv("LORASMITH_RUNTIME", str(tmp_path / "runtime"))
    found = Work(tmp_path)
    yield found
    found.end()


def until(holds: Callable[[], bool], what: str) -> None:
    pause, deadline = threading.Event(), time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < deadline, what
        pause.wait(0.02)


def out(worker: subprocess.Popen[str]) -> str:
    """Return what a worker said once it has ended."""
    assert worker.stdout is not None
    said = worker.stdout.read()
    worker.wait(DEADLINE)
    return said


def no_two_at_once(book: Path) -> int:
    """Check that no device and no run was ever worked on by two processes at once; return how many starts there were.

    A process that was killed has no end: it is over where its device is taken again, which its death allows.
    """
    by_device: dict[str, str] = {}
    by_run: dict[str, str] = {}
    begun = 0
    for line in book.read_text().splitlines():
        what, device, pid, run = line.split(" ")
        for taken, key in ((by_device, device), (by_run, run)):
            if what == "begin":
                assert process_mark(int(taken.get(key, "0"))) is None, line
                taken[key] = pid
            else:
                assert taken.pop(key) == pid, line
        begun += what == "begin"
    return begun


def test_a_run_that_fails_crashes_or_is_killed_is_marked_with_its_reason_and_blocks_nothing(
    work: Work, record: Record
) -> None:
    work.add("fail", "crash", "kill", "learn")
    worker = work.start("a")
    said = out(worker)
    assert worker.returncode == 0
    assert work.statuses() == ["failed", "failed", "failed", "finished"]
    failed, crashed, killed, _ = work.words()
    assert failed == "No picture can be read."
    assert crashed == "Its process ended with exit code 17. The interpreter lacks a library."
    assert "killed" in killed
    assert "failed: No picture can be read." in said
    # A second worker finds nothing to do, and tries none of them again.
    again = work.start("a")
    out(again)
    assert again.returncode == 0
    assert work.starts() == [1, 0, 1, 1]
    assert no_two_at_once(work.book) == 3
    record(11, "queue: failed, crashed and killed runs", "3 of 3 marked with their reason, the next one trained")


def test_a_worker_that_is_killed_at_any_instant_loses_and_doubles_nothing(
    work: Work, campaign: bool, record: Record
) -> None:
    runs, seed = (16, 11) if campaign else (5, 7)
    work.add(*["learn"] * runs)
    said = work.call("--kill", str(seed), str(work.queue.folder), str(work.book), "a", "b")
    kills = int(re.search(r"^killed (\d+)$", said, re.MULTILINE).group(1))  # type: ignore[union-attr]
    assert work.statuses() == ["finished"] * runs
    # No step was done twice, and none left out: the children outlived their workers.
    assert work.steps() == [list(range(1, STEPS + 1))] * runs
    no_two_at_once(work.book)
    assert kills >= runs
    record(11, "queue: worker killed at a random instant", f"{kills} kills, {runs} of {runs} runs finished, none twice")


def test_a_machine_that_restarts_goes_on_with_the_interrupted_runs(work: Work) -> None:
    work.add("wait", "wait", "learn")
    worker = work.start("a", "b")
    until(lambda: [len(steps) for steps in work.steps()] == [STEPS // 2, STEPS // 2, 0], "the first two work")
    holders = [lock_holder(run) for run in work.runs[:2]]
    worker.kill()
    worker.wait()
    for holder in holders:
        assert holder is not None
        os.kill(holder["pid"], signal.SIGKILL)
    until(lambda: all(lock_holder(run) is None for run in work.runs), "the locks are free")
    assert work.statuses() == ["waiting"] * 3
    for run in work.runs:
        (run.path / "behavior").write_text("learn")
    after = work.start("a", "b")
    assert "begins again after step 5" in out(after)
    assert work.statuses() == ["finished"] * 3
    assert work.steps() == [list(range(1, STEPS + 1))] * 3
    assert work.starts() == [2, 2, 1]


def test_a_worker_that_is_told_to_stop_stops_its_runs_which_go_on_with_the_next(work: Work) -> None:
    work.add("wait", "learn")
    worker = work.start("a")
    until(lambda: len(work.steps()[0]) == STEPS // 2, "the first works")
    worker.send_signal(signal.SIGTERM)
    assert "saves a checkpoint and stops" in out(worker)
    assert worker.returncode == 130
    assert work.words() == [f"waiting to go on: stopped at step {STEPS // 2} of {STEPS}", "waiting"]
    (work.runs[0].path / "behavior").write_text("learn")
    out(work.start("a"))
    assert work.statuses() == ["finished", "finished"]
    assert work.steps()[0] == list(range(1, STEPS + 1))


def test_a_run_that_somebody_stops_is_not_started_again_and_a_lost_terminal_ends_nothing(work: Work) -> None:
    work.add("wait", "learn")
    worker = work.start("a")
    until(lambda: len(work.steps()[0]) == STEPS // 2, "the first works")
    worker.send_signal(signal.SIGHUP)
    holder = lock_holder(work.runs[0])
    assert holder is not None
    os.kill(holder["pid"], signal.SIGTERM)
    out(worker)
    assert worker.returncode == 0
    assert work.statuses() == ["stopped", "finished"]
    assert work.starts() == [1, 1]


def test_a_second_worker_is_told_who_works_and_what_is_added_meanwhile_is_taken_up(work: Work) -> None:
    work.add("wait")
    first = work.start("a", "b")
    until(lambda: len(work.steps()[0]) == STEPS // 2, "the first works")
    second = work.start("a")
    assert f"Process {first.pid} on " in out(second)
    assert second.returncode == 8
    work.add("learn")
    until(lambda: work.statuses()[1] == "finished", "the second run is done")
    assert work.statuses() == ["running", "finished"]
    first.send_signal(signal.SIGINT)
    out(first)
    assert first.returncode == 130


def test_a_run_that_takes_the_machine_down_each_time_is_given_up(work: Work) -> None:
    work.add("learn", "learn")
    work.queue.update(1, starts=5)
    out(work.start("a"))
    assert work.statuses() == ["failed", "finished"]
    assert work.words()[0] == "It was started 5 times and never came further than step 0."


@pytest.mark.campaign
def test_a_real_training_begins_after_one_whose_settings_were_spoilt(
    tmp_path: Path, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from lorasmith.engine.cli import main
    from tests.engine.cli_runs import make_tiny_run

    monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("LORASMITH_RUNTIME", str(tmp_path / "runtime"))
    good, bad = (make_tiny_run(tmp_path / name, tiny_sd15, steps=2, name=name) for name in ("good", "bad"))
    assert main(["queue", "add", str(bad.run_file), str(good.run_file)]) == 0
    [stored] = bad.output.glob("bad-*/run.toml")
    stored.write_text(stored.read_text().replace("rank = 2", "rank = -2"))
    assert main(["queue", "run", "--device", "cpu"]) == 0
    states = [entry_state(entry) for entry in RunQueue().entries()]
    assert [state.status for state in states] == ["failed", "finished"]
    assert states[0].words.startswith("Its process ended with exit code 3. ")
    assert "adapter.rank" in states[0].words
    [lora] = good.output.glob("good-*/export/*.safetensors")
    assert lora.stat().st_size > 0
    said = capfd.readouterr().out
    assert "bad-" in said
    assert "finished" in said
