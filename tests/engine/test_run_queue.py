"""The queue as a list: what it holds, what became of each run, and several processes that change it at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.engine import queue_worker, run_queue
from lorasmith.engine.cli import main
from lorasmith.engine.errors import ConfigError, HardwareError, StorageError
from lorasmith.engine.events import Event, RunEnded, RunStarted, StepsDone
from lorasmith.engine.journal import Journal
from lorasmith.engine.nvml import GpuReading
from lorasmith.engine.queue_worker import choose_slots
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_folder import RunFolder, create_run
from lorasmith.engine.run_lock import RunLock, process_mark
from lorasmith.engine.run_queue import RunQueue, entry_state
from tests.engine.cli_runs import TinyRun, make_tiny_run

START = RunStarted(run="r", total_steps=9, resumed_from=0, config={}, versions={}, device="cpu")
STEPS = StepsDone(step=4, epoch=1, losses=[1.0], learning_rate=1.0, grad_norm=1.0, seconds_per_step=1.0)


def ended(outcome: str, message: str = "x") -> RunEnded:
    return RunEnded(outcome=outcome, step=4, message=message)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / "state"))


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[[str], RunFolder]:
    def make(name: str) -> RunFolder:
        settings = {"run": {"name": name, "output_folder": str(tmp_path / "runs")}}
        return create_run(resolve_config([Layer("test", settings)]))

    return make


@pytest.fixture
def queue() -> RunQueue:
    return RunQueue()


@pytest.fixture
def tiny(tmp_path: Path, tiny_sd15: Path) -> TinyRun:
    return make_tiny_run(tmp_path / "work", tiny_sd15)


def tell(run: RunFolder, *events: Event) -> None:
    journal = Journal(run.journal)
    for event in events:
        journal.append(event)
    journal.close()


def numbers(queue: RunQueue) -> list[int]:
    return [entry.number for entry in queue.entries()]


def test_the_queue_is_private_and_lies_in_the_state_folder(
    queue: RunQueue, new_run: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    assert queue.entries() == []
    assert not queue.folder.exists()
    queue.add(new_run("a"))
    assert queue.file == tmp_path / "state" / "queue.json"
    assert queue.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in queue.folder.iterdir()} == {0o600}


def test_numbers_stay_with_their_runs_and_are_never_given_twice(
    queue: RunQueue, new_run: Callable[[str], RunFolder]
) -> None:
    for name in "abc":
        queue.add(new_run(name))
    queue.move(3, 1)
    assert numbers(queue) == [3, 1, 2]
    queue.move(3, 2)
    assert numbers(queue) == [1, 2, 3]
    assert queue.remove(3).folder.name.startswith("c-")
    queue.add(new_run("d"))
    assert numbers(queue) == [1, 2, 4]
    with pytest.raises(ConfigError, match=r"no number 3.*has 1, 2, 4"):
        queue.remove(3)


@pytest.mark.parametrize(
    ("events", "status", "words"),
    [
        ([], "waiting", "waiting"),
        ([START, STEPS], "waiting", "waiting to go on: interrupted at step 4 of 9"),
        ([START, STEPS, ended("finished")], "finished", "finished"),
        ([START, STEPS, ended("failed", "The disk is full.")], "failed", "The disk is full."),
        ([START, STEPS, ended("stopped")], "stopped", "stopped at step 4 of 9 by the user"),
    ],
)
def test_what_became_of_a_run_is_told_by_its_folder(
    queue: RunQueue, new_run: Callable[[str], RunFolder], events: list[Event], status: str, words: str
) -> None:
    run = new_run("a")
    queue.add(run)
    tell(run, *events)
    state = entry_state(queue.entries()[0])
    assert (state.status, state.words) == (status, words)


@pytest.mark.parametrize("outcome", ["failed", "stopped"])
def test_a_run_that_failed_or_was_stopped_can_be_added_again(
    queue: RunQueue, new_run: Callable[[str], RunFolder], outcome: str
) -> None:
    run = new_run("a")
    tell(run, START, STEPS, ended(outcome))
    queue.add(run)
    assert entry_state(queue.entries()[0]).status == "waiting"
    with pytest.raises(ConfigError, match="already, as number 1"):
        queue.add(run)
    tell(run, START, STEPS, ended("failed"))
    assert queue.add(run).number == 2


def test_a_run_that_was_stopped_with_the_queue_goes_on_with_it(
    queue: RunQueue, new_run: Callable[[str], RunFolder]
) -> None:
    run = new_run("a")
    queue.add(run)
    tell(run, START, STEPS, ended("stopped"))
    queue.update(1, held=True)
    assert entry_state(queue.entries()[0]).words == "waiting to go on: stopped at step 4 of 9"


def test_a_run_folder_that_is_gone_is_a_failure_in_words(queue: RunQueue, new_run: Callable[[str], RunFolder]) -> None:
    run = new_run("a")
    queue.add(run)
    run.path.rename(run.path.with_name("elsewhere"))
    state = entry_state(queue.entries()[0])
    assert (state.status, state.words) == ("failed", f"its run folder {run.path} is gone")


def test_what_is_being_trained_stays_in_the_queue(queue: RunQueue, new_run: Callable[[str], RunFolder]) -> None:
    runs = [new_run(name) for name in "abc"]
    for run in runs:
        queue.add(run)
    tell(runs[1], START, ended("finished"))
    lock = RunLock(runs[0])
    with pytest.raises(ConfigError, match="Number 1 is being trained"):
        queue.remove(1)
    assert [entry.number for entry in queue.clear(ended_only=True)] == [2]
    assert [entry.number for entry in queue.clear()] == [3]
    assert numbers(queue) == [1]
    lock.release()


def test_a_process_that_is_still_starting_counts_and_a_stranger_with_its_number_does_not(
    queue: RunQueue, new_run: Callable[[str], RunFolder]
) -> None:
    queue.add(new_run("a"))
    host = os.uname().nodename
    queue.update(1, pid=os.getpid(), mark=process_mark(os.getpid()), host=host)
    assert entry_state(queue.entries()[0]).words == "starting"
    queue.update(1, mark="1")
    assert entry_state(queue.entries()[0]).status == "waiting"
    queue.update(1, mark=process_mark(os.getpid()), host="another-machine")
    assert entry_state(queue.entries()[0]).status == "waiting"


def test_processes_that_add_at_the_same_time_lose_nothing(queue: RunQueue, new_run: Callable[[str], RunFolder]) -> None:
    runs = [str(new_run(f"r{number}").path) for number in range(12)]
    code = "import sys; from pathlib import Path; from lorasmith.engine.run_queue import *\n"
    code += "for path in sys.argv[1:]: RunQueue().add(RunFolder(Path(path)))"
    children = [subprocess.Popen([sys.executable, "-c", code, *runs[part::3]]) for part in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    assert sorted(entry.run for entry in queue.entries()) == sorted(runs)
    assert numbers(queue) == list(range(1, 13))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": 1, "next": 2, "entries": [{"number": 1}]}', '"x"'])
def test_a_damaged_queue_is_named_and_left_as_it_is(
    queue: RunQueue, new_run: Callable[[str], RunFolder], content: str
) -> None:
    queue.folder.mkdir(parents=True)
    queue.file.write_text(content)
    with pytest.raises(ConfigError, match=r"queue\.json is damaged.*Move that file away"):
        queue.add(new_run("a"))
    assert queue.file.read_text() == content


def test_a_queue_of_a_newer_version_is_not_touched(queue: RunQueue) -> None:
    queue.folder.mkdir(parents=True)
    queue.file.write_text('{"version": 99, "entries": "of another form"}')
    with pytest.raises(ConfigError, match="newer version"):
        queue.clear()


def test_a_queue_that_somebody_else_holds_or_a_folder_that_cannot_be_made_is_said(
    queue: RunQueue, new_run: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run_queue, "LOCK_SECONDS", 0.05)
    run = new_run("a")
    with queue._locked(), pytest.raises(StorageError, match=r"Another process holds .*queue\.lock"):
        RunQueue().add(run)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot use the queue's file"):
        RunQueue(tmp_path / "file" / "state").add(run)


# Devices


def test_without_devices_each_run_takes_that_of_its_settings() -> None:
    assert choose_slots([]) == [""]
    assert choose_slots(["cpu"]) == ["cpu"]


def test_devices_are_chosen_by_uuid_and_an_unknown_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasmith.engine.hardware import HardwareSnapshot, Memory
    from lorasmith.engine.nvml import Gpu

    gpus = [Gpu(f"GPU-{name}", 0, "H", None, None, None, None, None, None, None, ()) for name in ("aa", "bb")]
    found = HardwareSnapshot(tuple(gpus), "", None, Memory(1, 1), (), "cpu", 1)
    monkeypatch.setattr(queue_worker, "snapshot", lambda: found)
    assert choose_slots(["all"]) == ["GPU-aa", "GPU-bb"]
    assert choose_slots(["gpu-BB", "all", "MIG-x"]) == ["GPU-bb", "GPU-aa", "MIG-x"]
    with pytest.raises(HardwareError, match=r"GPU-cc is no GPU of this machine\. It has GPU-aa, GPU-bb"):
        choose_slots(["GPU-cc"])
    none = HardwareSnapshot((), GpuReading((), "No driver.").note, None, Memory(1, 1), (), "cpu", 1)
    monkeypatch.setattr(queue_worker, "snapshot", lambda: none)
    with pytest.raises(HardwareError, match=r"No driver\."):
        choose_slots(["all"])


# The commands


def test_added_settings_are_kept_whatever_happens_to_the_file(
    tiny: TinyRun, queue: RunQueue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny.root)
    assert main(["queue", "add", "run.toml", "--set", "train.steps=7"]) == 0
    tiny.run_file.unlink()
    monkeypatch.chdir("/")
    [entry] = queue.entries()
    config = entry.folder.load_config().config
    assert (config.train.steps, config.dataset.folder) == (7, str(tiny.pictures))
    assert "lorasmith queue run" in capsys.readouterr().out


def test_one_run_that_cannot_start_adds_none(
    tiny: TinyRun, queue: RunQueue, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tiny.root / "bad.toml"
    bad.write_text(tiny.run_file.read_text().replace(str(tiny.pictures), str(tiny.root / "nowhere")))
    assert main(["queue", "add", str(tiny.run_file), str(bad)]) == 5
    assert "nowhere" in capsys.readouterr().err
    assert queue.entries() == []
    assert not tiny.output.exists()


def test_a_run_folder_can_be_added_but_not_with_other_settings(
    new_run: Callable[[str], RunFolder], tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorasmith.engine.run_file import load_run_file

    run = create_run(resolve_config([load_run_file(tiny.run_file)]))
    assert main(["queue", "add", str(run.path), "--set", "train.steps=7"]) == 2
    assert main(["queue", "add", str(run.path)]) == 0
    assert main(["queue", "add", str(run.path)]) == 3
    assert "already, as number 1" in capsys.readouterr().err


def test_the_list_says_what_became_of_each_run(
    queue: RunQueue, new_run: Callable[[str], RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        queue.add(new_run(name))
    queue.update(2, failed="Its process was killed (signal 9).")
    assert main(["queue", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "1"
    assert lines[0].endswith("waiting")
    assert lines[1].endswith("failed: Its process was killed (signal 9).")
    assert main(["queue", "list", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["worker"] is None
    assert [(entry["number"], entry["status"]) for entry in document["entries"]] == [(1, "waiting"), (2, "failed")]
    assert main(["queue", "move", "2", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("2 ")
    assert main(["queue", "remove", "1"]) == 0
    assert "its folder stays" in capsys.readouterr().out
    assert main(["queue", "clear", "--ended"]) == 0
    assert capsys.readouterr().out == "1 run taken out; the run folders stay.\n"
    assert main(["queue", "list"]) == 0
    assert capsys.readouterr().out.startswith("The queue is empty")


def test_working_on_a_queue_that_was_never_used_ends_at_once(queue: RunQueue) -> None:
    assert main(["queue", "run"]) == 0
    assert queue.folder.stat().st_mode & 0o777 == 0o700


def test_a_state_folder_that_cannot_be_made_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / "file" / "state"))
    assert main(["queue", "run"]) == 7
    assert "queue-worker.lock" in capsys.readouterr().err
