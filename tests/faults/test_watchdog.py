"""A stall is told with its place and all stacks; what only looks like one is not."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import watchdog as watchdog_module
from lorasmith.engine.commands import Command
from lorasmith.engine.events import (
    Event,
    HardwareSampled,
    Logged,
    Progress,
    RunEnded,
    StageChanged,
    Stalled,
    StallEnded,
)
from lorasmith.engine.journal import Journal, replay
from lorasmith.engine.run_summary import summarize_run
from lorasmith.engine.watchdog import (
    LIMIT_SECONDS,
    MAX_STACK_FILES,
    TICK_SECONDS,
    UNKNOWN_PACE_SECONDS,
    StackFiles,
    Watchdog,
)
from tests.faults.hosting import Host, hosting, steps, stop, wait_for

Record = Callable[[int, str, str], None]
GAUGES = HardwareSampled(
    vram_used_gib=None,
    vram_total_gib=None,
    gpu_utilization_percent=None,
    temperature_c=None,
    power_w=None,
    ram_used_gib=1,
    ram_total_gib=2,
    process_ram_gib=1,
)


class Watched:
    """A watchdog whose clock is the test's; the watched thread is the test's own."""

    def __init__(self, folder: Path) -> None:
        self.told: list[Event] = []
        self.now = 0.0
        self.dog = Watchdog(self.told.append, folder, lambda: 7)
        self.dog._engine = threading.get_ident()

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + TICK_SECONDS)
            self.dog.tick(self.now)

    def stalls(self) -> list[Stalled]:
        return [event for event in self.told if isinstance(event, Stalled)]


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "stacks")


def test_silence_past_the_limit_is_told_once_and_its_end_too(watched: Watched) -> None:
    watched.dog.note(steps(7, 0.5))
    watched.pass_time(LIMIT_SECONDS - TICK_SECONDS)
    assert watched.told == []
    watched.pass_time(2 * TICK_SECONDS)
    [stall] = watched.stalls()
    assert LIMIT_SECONDS <= stall.seconds <= LIMIT_SECONDS + 2 * TICK_SECONDS
    assert stall.step == 7
    assert Path(stall.stacks).parent.stat().st_mode & 0o777 == 0o700
    watched.pass_time(LIMIT_SECONDS / 2)
    assert len(watched.told) == 1
    watched.dog.beat()
    watched.pass_time(TICK_SECONDS)
    ended = watched.told[-1]
    assert isinstance(ended, StallEnded)
    assert ended.seconds == pytest.approx(1.5 * LIMIT_SECONDS, abs=4 * TICK_SECONDS)
    watched.pass_time(LIMIT_SECONDS / 2)
    assert len(watched.told) == 2


def test_a_stall_that_goes_on_is_told_again_each_time_it_has_doubled(watched: Watched) -> None:
    watched.dog.note(steps(7, 0.5))
    watched.pass_time(16 * LIMIT_SECONDS + 100)
    seconds = [round(stall.seconds / LIMIT_SECONDS) for stall in watched.stalls()]
    assert seconds == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("step_seconds", "limit"), [([], UNKNOWN_PACE_SECONDS), ([0.1], 120.0), ([20.0], 200.0), ([1, 2, 60, 60, 61], 600)]
)
def test_the_limit_follows_the_pace_of_the_steps(watched: Watched, step_seconds: list[float], limit: float) -> None:
    watched.dog.note(StageChanged(stage="train", label="Training"))
    for seconds in step_seconds:
        watched.dog.note(steps(7, seconds))
    assert watched.dog.limit() == limit
    watched.pass_time(limit - TICK_SECONDS)
    assert watched.told == []
    watched.pass_time(2 * TICK_SECONDS)
    assert len(watched.stalls()) == 1


def test_gauges_and_lines_of_other_threads_are_no_sign_of_life_but_a_download_is(watched: Watched) -> None:
    progress = Progress(stage="load", label="Downloading", done=1, total=2)
    warning = Logged(severity="warning", message="A client sent nonsense.")

    def from_another_thread(event: Event) -> None:
        thread = threading.Thread(target=watched.dog.note, args=[event])
        thread.start()
        thread.join()

    for event in (progress, GAUGES, warning):
        for _ in range(4):
            watched.pass_time(0.5 * LIMIT_SECONDS)
            from_another_thread(event)
        assert bool(watched.told) == (event is not progress)
        watched.dog.beat()
        watched.pass_time(TICK_SECONDS)
        watched.told.clear()


def test_a_stopped_process_or_a_sleeping_machine_is_no_stall(watched: Watched) -> None:
    for away in (3600.0, LIMIT_SECONDS, -7200.0, 86400.0):
        watched.now += away
        watched.dog.tick(watched.now)
    assert watched.told == []
    watched.pass_time(LIMIT_SECONDS)
    assert len(watched.stalls()) == 1


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("load", "loading or downloading the base model; a slow disk or network can take this long"),
        ("train", "training"),
    ],
)
def test_a_stall_says_in_words_where_the_engine_is(watched: Watched, stage: Any, words: str) -> None:
    watched.dog.note(StageChanged(stage=stage, label="x"))
    watched.pass_time(UNKNOWN_PACE_SECONDS + TICK_SECONDS)
    where = watched.stalls()[0].where
    assert re.fullmatch(re.escape(words) + r" \(in Watchdog\._tell, engine\.watchdog line \d+\)", where)


def test_foreign_code_that_the_engine_waits_in_is_named() -> None:
    where: list[str] = []

    class Stream:
        def write(self, text: str) -> None:
            where.append(watchdog_module.describe_frame(sys._getframe()))

    foreign = {"__name__": "torch.nn", "stream": Stream()}
    exec("def forward(): stream.write('')", foreign)
    ours = {"__name__": "lorasmith.engine.learner", "forward": foreign["forward"]}
    exec("def run_step():\n    forward()\nrun_step()", ours)
    assert where == ["in run_step, engine.learner line 2, waiting in torch"]


def test_the_newest_stacks_are_kept_and_other_files_left_alone(tmp_path: Path) -> None:
    files = StackFiles(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    names = [Path(files.write()).name for _ in range(MAX_STACK_FILES + 4)]
    assert names[-1] == f"stacks-{MAX_STACK_FILES + 4}.txt"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[-MAX_STACK_FILES:], "notes.txt"])
    assert "test_the_newest_stacks_are_kept" in (tmp_path / names[-1]).read_text()
    # A later start counts on.
    assert Path(StackFiles(tmp_path).write()).name == f"stacks-{MAX_STACK_FILES + 5}.txt"


def test_a_disk_that_refuses_the_stacks_does_not_hide_the_stall(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    watched = Watched(tmp_path / "file" / "stacks")
    watched.pass_time(LIMIT_SECONDS + TICK_SECONDS)
    assert [stall.stacks for stall in watched.stalls()] == [""]


def test_a_disk_that_hangs_under_the_stacks_does_not_hide_the_stall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = threading.Event()
    monkeypatch.setattr(watchdog_module, "WRITE_SECONDS", 0.05)
    monkeypatch.setattr(watchdog_module.faulthandler, "dump_traceback", lambda *a, **k: disk.wait(30))
    watched = Watched(tmp_path / "stacks")
    before = threading.active_count()
    watched.pass_time(8 * LIMIT_SECONDS + 100)
    assert [stall.stacks for stall in watched.stalls()] == [""] * 4
    assert threading.active_count() == before + 1
    disk.set()


# In a real session


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "LIMIT_SECONDS", 0.4)
    monkeypatch.setattr(watchdog_module, "UNKNOWN_PACE_SECONDS", 0.4)
    monkeypatch.setattr(watchdog_module, "TICK_SECONDS", 0.05)


@pytest.fixture
def hosted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with hosting(tmp_path, monkeypatch) as host:
        yield host


@pytest.mark.usefixtures("quick")
def test_a_hanging_engine_is_told_in_journal_and_list_and_its_end_too(hosted: Host, record: Record) -> None:
    go_on = threading.Event()

    def train(run: Any, config: Any, host: Any) -> None:
        host.emit(StageChanged(stage="train", label="Training"))
        host.emit(steps(7))
        go_on.wait(30)
        host.next_commands()
        wait_for(session, StallEnded)
        stop(host)

    session = hosted(train)
    stalled = wait_for(session, Stalled)
    assert stalled.where.startswith("training (in Session._train, engine.session line ")
    assert "wait" in Path(stalled.stacks).read_text()
    summary = summarize_run(session.run)
    assert (summary.state, summary.message) == ("stalled", stalled.where)
    go_on.set()
    assert session.join(20)
    kinds = [type(event) for event in replay(session.run.journal) if isinstance(event, Stalled | StallEnded | RunEnded)]
    assert kinds[0] is Stalled
    assert kinds[-2:] == [StallEnded, RunEnded]
    record(10, "stalled engine", f"told after {stalled.seconds:.1f} s at a limit of 0.4 s, with place and stacks")


@pytest.mark.usefixtures("quick")
def test_pausing_and_looking_for_commands_are_signs_of_life(
    hosted: Host,
) -> None:
    def train(run: Any, config: Any, host: Any) -> None:
        for _ in range(12):
            host.wait_command(0.1)
        while Command.STOP not in host.next_commands():
            pass
        stop(host)

    session = hosted(train)
    threading.Event().wait(1.5)
    session.send(Command.STOP)
    assert session.join(20)
    assert Stalled not in session.latest


@pytest.mark.usefixtures("quick")
def test_a_disk_that_hangs_under_the_journal_is_told_on_the_screen(
    hosted: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasmith.engine import session as session_module

    disk, append = threading.Event(), Journal.append
    monkeypatch.setattr(session_module, "STUCK_SECONDS", 0.1)

    def slow_append(journal: Journal, event: Event) -> bool:
        if isinstance(event, StageChanged):
            disk.wait(30)
        return append(journal, event)

    monkeypatch.setattr(Journal, "append", slow_append)

    def train(run: Any, config: Any, host: Any) -> None:
        host.emit(StageChanged(stage="train", label="Training"))
        stop(host)

    session = hosted(train)
    stalled = wait_for(session, Stalled)
    assert "Session." in stalled.where
    disk.set()


def test_a_process_that_was_stopped_for_long_is_not_stalled(tmp_path: Path, record: Record) -> None:
    """The real thing: SIGSTOP for several limits, then SIGCONT; the engine goes on and nothing is told."""
    code = f"""if True:
        import time
        from pathlib import Path
        from lorasmith.engine import watchdog
        watchdog.LIMIT_SECONDS, watchdog.TICK_SECONDS = 0.4, 0.05
        told = []
        dog = watchdog.Watchdog(told.append, Path({str(tmp_path)!r}), lambda: 0)
        dog.start()
        print("watching", flush=True)
        for _ in range(30):
            time.sleep(0.02)
            dog.beat()
        print(len(told), "stalls")
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"
        process.send_signal(signal.SIGSTOP)
        threading.Event().wait(2.0)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "0 stalls\n"
    assert process.returncode == 0
    record(10, "process stopped for five limits", "no false alarm")
