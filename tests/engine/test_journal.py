"""What the journal promises: strict JSON lines, whole or absent, on any disk, for any reader."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lorasmith.engine import journal as journal_module
from lorasmith.engine.errors import StorageError
from lorasmith.engine.events import (
    CheckpointSaved,
    Event,
    HardwareSampled,
    Logged,
    Progress,
    RunEnded,
    StageChanged,
    StepsDone,
)
from lorasmith.engine.journal import Follower, Journal, replay


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def steps_done(step: int, *losses: float) -> StepsDone:
    numbers = list(losses or [0.5])
    return StepsDone(step=step, epoch=1, losses=numbers, learning_rate=1e-4, grad_norm=0.1, seconds_per_step=0.2)


def gauge() -> HardwareSampled:
    return HardwareSampled(
        vram_used_gib=None,
        vram_total_gib=None,
        gpu_utilization_percent=None,
        temperature_c=None,
        power_w=None,
        ram_used_gib=1.0,
        ram_total_gib=2.0,
        process_ram_gib=0.5,
    )


def write(path: Path, *events: Event) -> None:
    journal = Journal(path)
    for event in events:
        assert journal.append(event)
    assert journal.close()


def not_json(name: str) -> None:
    raise AssertionError(f"{name} is not strict JSON")


def test_what_was_appended_is_replayed_equal_and_in_order(path: Path) -> None:
    events = [
        StageChanged(stage="load", label="Loading ünïcode \x1b[31m\n\udc80"),
        Progress(stage="cache", label="pictures", done=1, total=2),
        steps_done(1, 0.25, 1e-30),
        gauge(),
        CheckpointSaved(step=1, path="/x", bytes=5, seconds=0.1),
        RunEnded(outcome="finished", step=1, message="done"),
    ]
    write(path, *events)
    assert list(replay(path)) == events
    assert path.read_bytes().count(b"\n") == len(events) + 1
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_first_line_is_a_header_with_the_schema_version(path: Path) -> None:
    write(path)
    [header] = [json.loads(line) for line in path.read_text().splitlines()]
    assert (header["event"], header["schema"]) == ("JournalHeader", 1)


def test_losses_that_are_not_finite_survive_as_strict_json(path: Path) -> None:
    write(path, steps_done(3, math.nan, math.inf, -math.inf, 0.5))
    record = json.loads(path.read_text().splitlines()[1], parse_constant=not_json)
    assert record["losses"] == ["NaN", "Infinity", "-Infinity", 0.5]
    [event] = replay(path)
    assert isinstance(event, StepsDone)
    assert math.isnan(event.losses[0])
    assert event.losses[1:] == [math.inf, -math.inf, 0.5]


def test_a_disk_that_cannot_sync_folders_takes_a_journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    write(path, Logged(severity="info", message="x"))
    assert [event.message for event in replay(path) if isinstance(event, Logged)] == ["x"]


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_jq_reads_the_journal(path: Path) -> None:
    write(path, steps_done(3, math.nan), Logged(severity="info", message="\udcff \x00 NaN"))
    done = subprocess.run(["jq", "-c", ".event", str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['"JournalHeader"', '"StepsDone"', '"Logged"']


def test_text_that_looks_like_a_number_stays_text(path: Path) -> None:
    write(path, Logged(severity="info", message="NaN"))
    assert [event.message for event in replay(path) if isinstance(event, Logged)] == ["NaN"]


def test_numpy_numbers_in_an_event_do_not_end_a_training(path: Path) -> None:
    write(path, steps_done(1, np.float32(0.5), np.float32("nan")))  # type: ignore[arg-type]
    [event] = replay(path)
    assert isinstance(event, StepsDone)
    assert event.losses[0] == 0.5
    assert math.isnan(event.losses[1])


@pytest.mark.parametrize("torn", [b"{", b'{"event": "StepsDone", "step": 2', b"\x00" * 70_000])
def test_a_torn_last_line_is_not_read_and_is_cut_off_when_the_journal_is_opened_again(path: Path, torn: bytes) -> None:
    write(path, steps_done(1))
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(torn)
    assert [event.step for event in replay(path) if isinstance(event, StepsDone)] == [1]
    write(path, steps_done(2))
    assert path.read_bytes().startswith(whole)
    assert [event.step for event in replay(path) if isinstance(event, StepsDone)] == [1, 2]


def test_a_journal_that_was_torn_in_its_header_starts_anew(path: Path) -> None:
    path.write_bytes(b'{"event": "Journ')
    write(path, steps_done(1))
    assert json.loads(path.read_text().splitlines()[0])["event"] == "JournalHeader"
    assert len(list(replay(path))) == 1


def test_types_of_a_newer_version_are_passed_over(path: Path) -> None:
    write(path, steps_done(1))
    with path.open("a") as file:
        file.write('{"event": "Teleported", "step": 5}\n{"event": "Paused", "time": 1.0, "step": 7, "mood": "calm"}\n')
    assert [type(event).__name__ for event in replay(path)] == ["StepsDone", "Paused"]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"event": "StepsDone", "step": 5}', '{"step": 5}'])
def test_a_damaged_line_is_named_and_the_rest_is_read(path: Path, line: str) -> None:
    write(path, steps_done(1))
    with path.open("a") as file:
        file.write(line + "\n")
    write(path, steps_done(2))
    first, warning, last = replay(path)
    assert isinstance(warning, Logged)
    assert warning.severity == "warning"
    assert "line 3 is damaged" in warning.message
    assert (getattr(first, "step", 0), getattr(last, "step", 0)) == (1, 2)


def test_a_journal_of_a_newer_schema_is_refused_by_reader_and_writer(path: Path) -> None:
    path.write_text('{"event": "JournalHeader", "schema": 2, "time": 1.0}\n')
    with pytest.raises(StorageError, match="newer version"):
        list(replay(path))
    with pytest.raises(StorageError, match="newer version"):
        Journal(path)
    with pytest.raises(StorageError, match="newer version"):
        Follower(path).poll()


def test_a_missing_journal_has_no_events(path: Path) -> None:
    assert list(replay(path)) == []
    assert Follower(path).poll() == []


def test_only_the_wanted_types_are_replayed(path: Path) -> None:
    write(path, gauge(), steps_done(1), gauge(), Logged(severity="info", message="x"))
    assert [type(event).__name__ for event in replay(path, only={"StepsDone"})] == ["StepsDone"]


def test_a_journal_that_cannot_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"missing/journal\.jsonl.*No such file"):
        Journal(tmp_path / "missing" / "journal.jsonl")


def test_every_event_is_one_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    real = os.write

    def counted(fd: int, data: bytes) -> int:
        writes.append(bytes(data))
        return real(fd, data)

    journal = Journal(path)
    monkeypatch.setattr(os, "write", counted)
    journal.append(steps_done(1))
    journal.append(steps_done(2))
    monkeypatch.undo()
    journal.close()
    assert [data.count(b"\n") for data in writes] == [1, 1]
    assert all(data.endswith(b"\n") for data in writes)


def test_on_a_full_disk_events_wait_in_memory_and_are_written_in_order_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    room = [25]

    def short(fd: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, room[0] = min(room[0], len(data)), 0
        return real(fd, data[:taken])

    journal = Journal(path)
    assert journal.append(steps_done(1))
    before = path.read_bytes()
    monkeypatch.setattr(os, "write", short)
    assert journal.append(steps_done(2)) is False
    assert path.read_bytes() == before, "the part that was written is cut off"
    assert journal.append(steps_done(3)) is False
    assert journal.append(gauge()) is False
    assert journal.problem == f"disk full: {path}"
    monkeypatch.undo()
    assert journal.append(steps_done(4))
    assert journal.problem == ""
    assert journal.close()
    assert [event.step for event in replay(path) if isinstance(event, StepsDone)] == [1, 2, 3, 4]
    assert not any(isinstance(event, HardwareSampled) for event in replay(path)), "gauges are not worth the memory"


def test_waiting_events_are_written_without_a_further_event_once_there_is_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 0.02)
    journal = Journal(path)
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda fd, data: 0)
        assert journal.append(steps_done(1)) is False
    deadline = time.monotonic() + 5
    while not list(replay(path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(list(replay(path))) == 1
    assert journal.close()


def test_a_real_limit_on_the_file_leaves_whole_lines_only(path: Path) -> None:
    code = """if True:
        import resource, signal, sys
        from pathlib import Path
        from lorasmith.engine.events import Logged
        from lorasmith.engine.journal import Journal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        journal = Journal(Path(sys.argv[1]))
        results = [journal.append(Logged(severity="info", message=str(i) * 50, time=1.0)) for i in range(10)]
        print(results.index(False), journal.problem)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert journal.close()
    """
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    failed_at, _, problem = done.stdout.partition(" ")
    assert 0 < int(failed_at) < 10
    assert str(path) in problem
    messages = [event.message for event in replay(path) if isinstance(event, Logged)]
    assert messages == [str(number) * 50 for number in range(10)]


def test_a_killed_writer_loses_nothing_that_was_acknowledged(path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from lorasmith.engine.events import Paused
        from lorasmith.engine.journal import Journal
        journal = Journal(Path(sys.argv[1]))
        for step in range(10**9):
            journal.append(Paused(step=step))
            print(step, flush=True)
    """
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "200\n":
                break
        process.kill()
        rest = process.stdout.read().rpartition("\n")[0].splitlines()
    acknowledged = int(rest[-1]) if rest else 200
    steps = [getattr(event, "step", -1) for event in replay(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > acknowledged >= 200


def test_checkpoints_and_the_end_are_synced_at_once_and_not_by_the_appending_thread(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = threading.Event()
    threads: list[str] = []

    def sync(fd: int) -> None:
        threads.append(threading.current_thread().name)
        synced.set()

    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 60.0)
    monkeypatch.setattr(journal_module, "_sync_data", sync)
    journal = Journal(path)
    journal.append(steps_done(1))
    assert not synced.wait(0.1), "an ordinary event waits for the next second"
    for event in (
        CheckpointSaved(step=1, path="x", bytes=1, seconds=0.1),
        RunEnded(outcome="finished", step=1, message="done"),
    ):
        synced.clear()
        journal.append(event)
        assert synced.wait(2)
    assert set(threads) == {"journal-sync"}
    journal.close()


def test_events_are_synced_within_a_second_and_an_idle_journal_is_left_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = SimpleNamespace(count=0)

    def sync(fd: int) -> None:
        calls.count += 1

    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 0.03)
    monkeypatch.setattr(journal_module, "_sync_data", sync)
    journal = Journal(path)
    journal.append(steps_done(1))
    time.sleep(0.15)
    assert 1 <= calls.count <= 2
    journal.close()


def test_a_disk_that_fails_to_sync_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(journal_module, "_sync_data", sync)
    journal = Journal(path)
    journal.append(CheckpointSaved(step=1, path="x", bytes=1, seconds=0.1))
    deadline = time.monotonic() + 2
    while not journal.problem and time.monotonic() < deadline:
        time.sleep(0.01)
    assert journal.problem == f"Input/output error: {path}"
    journal.close()


def test_threads_may_append_at_the_same_time(path: Path) -> None:
    journal = Journal(path)

    def append(number: int) -> None:
        for step in range(200):
            journal.append(steps_done(number * 1000 + step))

    threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    steps = [getattr(event, "step", -1) for event in replay(path)]
    assert len(steps) == len(set(steps)) == 800
    assert [step for step in steps if step < 1000] == list(range(200))


def test_a_closed_journal_takes_no_events_and_closing_again_does_no_harm(path: Path) -> None:
    journal = Journal(path)
    journal.close()
    assert journal.close()
    with pytest.raises(ValueError, match="closed"):
        journal.append(gauge())


def test_a_follower_sees_each_event_once_and_no_half_line(path: Path) -> None:
    follower = Follower(path)
    assert follower.poll() == []
    journal = Journal(path)
    journal.append(steps_done(1))
    journal.append(steps_done(2))
    assert [getattr(event, "step", 0) for event in follower.poll()] == [1, 2]
    assert follower.poll() == []
    line = journal_module.encode(steps_done(3))
    with path.open("ab") as file:
        file.write(line[:20])
    assert follower.poll() == []
    with path.open("ab") as file:
        file.write(line[20:])
    assert [getattr(event, "step", 0) for event in follower.poll()] == [3]
    journal.close()


def test_a_follower_goes_on_after_a_torn_line_was_cut_off(path: Path) -> None:
    write(path, steps_done(1))
    follower = Follower(path)
    with path.open("ab") as file:
        file.write(b'{"event": "Ste')
    assert len(follower.poll()) == 1
    write(path, steps_done(2))
    assert [getattr(event, "step", 0) for event in follower.poll()] == [2]


def test_a_follower_takes_a_long_journal_in_bounded_portions(path: Path) -> None:
    write(path, *[steps_done(step) for step in range(1, 101)])
    follower = Follower(path)
    portions: list[list[int]] = []
    while portion := follower.poll(max_bytes=1000):
        portions.append([getattr(event, "step", 0) for event in portion])
    assert [step for portion in portions for step in portion] == list(range(1, 101))
    assert max(map(len, portions)) < 20


def test_a_follower_passes_a_line_longer_than_its_portion(path: Path) -> None:
    write(path, Logged(severity="info", message="x" * 5000), steps_done(1))
    follower = Follower(path)
    seen = follower.poll(max_bytes=100) + follower.poll(max_bytes=100) + follower.poll(max_bytes=100)
    assert [type(event).__name__ for event in seen] == ["Logged", "StepsDone"]


def test_a_follower_in_another_process_sees_events_as_they_come(path: Path) -> None:
    code = """if True:
        import sys, time
        from pathlib import Path
        from lorasmith.engine.journal import Follower
        follower = Follower(Path(sys.argv[1]))
        assert "torch" not in sys.modules
        while True:
            for event in follower.poll():
                print(event.step, flush=True)
            time.sleep(0.02)
    """
    journal = Journal(path)
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for step in (1, 2, 3):
            journal.append(steps_done(step))
            assert process.stdout.readline() == f"{step}\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        journal.close()
