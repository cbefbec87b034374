"""Two starts on one run folder: exactly one runs, the other names it; nothing stale ever blocks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.engine import run_lock as run_lock_module
from lorasmith.engine.errors import RunLockedError, StorageError
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_folder import RunFolder, create_run
from lorasmith.engine.run_lock import RunLock, lock_holder, process_mark

Record = Callable[[int, str, str], None]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("LORASMITH_RUNTIME", str(tmp_path / "runtime"))
    return create_run(resolve_config([Layer("test", {"run": {"name": "r", "output_folder": str(tmp_path)}})]))


def dead_process() -> int:
    """Return a number that no process has any more."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def write_record(run: RunFolder, **record: object) -> None:
    run.lock.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": 1.0} | record))


def test_of_starts_at_the_same_instant_exactly_one_runs_and_the_others_name_it(
    run: RunFolder, campaign: bool, record: Record
) -> None:
    races, starts = (100, 4) if campaign else (40, 3)
    command = [sys.executable, "-m", "tests.faults.race_server", str(run.path)]
    named = kills = 0
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        for number in range(races):
            end = "kill" if number % 2 else "stop"
            server.stdin.write(json.dumps({"starts": starts, "end": end}) + "\n")
            server.stdin.flush()
            answer = json.loads(server.stdout.readline())
            runners = [said["pid"] for said in answer["said"] if not said["refused"]]
            assert len(runners) == 1, answer
            assert answer["holder"]["pid"] == runners[0]
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(answer["holder"]["started"]))
            words = f"Process {runners[0]} on {socket.gethostname()} has worked on it since {started}."
            for said in answer["said"]:
                assert not said["refused"] or said["refused"].endswith(words)
                named += bool(said["refused"])
            # Nobody holds it the moment after, killed or not.
            assert answer["after"] is None
            codes = [answer["codes"][str(said["pid"])] for said in answer["said"] if said["pid"] != runners[0]]
            assert codes == [0] * (starts - 1)
            kills += answer["codes"][str(runners[0])] == -signal.SIGKILL
        server.stdin.close()
    assert server.returncode == 0
    assert kills == races // 2
    record(11, "races of several starts on one run folder", f"{races} of {races}: exactly one ran")
    record(11, "refused starts that named pid, host and start time", f"{named} of {races * (starts - 1)}")
    record(11, "lock free at once after kill -9", f"{kills} of {races // 2}")


def test_lookers_never_refuse_a_start(run: RunFolder) -> None:
    RunLock(run).release()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            lock_holder(run)
            time.sleep(0.0005)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(30):
            RunLock(run).release()
    finally:
        over.set()
        for looker in lookers:
            looker.join()


@pytest.mark.parametrize("content", [b"", b"{}", b"garbage\xff\x00", b"[" * 5000, b'{"pid": 1', b"x" * (1 << 20)])
def test_whatever_a_lock_file_holds_it_does_not_block(run: RunFolder, content: bytes) -> None:
    run.lock.write_bytes(content)
    assert lock_holder(run) is None
    lock = RunLock(run)
    holder = lock_holder(run)
    assert holder is not None
    assert holder["pid"] == os.getpid()
    lock.release()
    assert lock_holder(run) is None


def test_a_record_of_a_living_process_that_does_not_hold_the_lock_does_not_block(run: RunFolder) -> None:
    write_record(run, pid=os.getpid(), mark=process_mark(os.getpid()))
    assert lock_holder(run) is None
    RunLock(run).release()


@pytest.mark.parametrize("pid", ["dead", "reused"])
def test_an_old_record_is_never_taken_for_the_holders(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, pid: str
) -> None:
    """A holder may be slow between its lock and its record: until then the record of a killed one lies there."""
    monkeypatch.setattr(run_lock_module, "LOCK_SECONDS", 0.1)
    marks = {"mark": "1", "namespace": run_lock_module._pid_namespace()}
    write_record(run, pid=dead_process() if pid == "dead" else os.getppid(), **marks)
    slow = os.open(run.lock, os.O_RDWR)
    fcntl.flock(slow, fcntl.LOCK_EX)
    assert lock_holder(run) == {}
    with pytest.raises(RunLockedError, match="cannot be read from the lock"):
        RunLock(run)
    os.close(slow)
    assert lock_holder(run) is None


def test_a_holder_that_is_slow_to_write_its_record_is_waited_for(run: RunFolder) -> None:
    write_record(run, pid=dead_process(), mark="1", namespace=run_lock_module._pid_namespace())
    slow = os.open(run.lock, os.O_RDWR)
    fcntl.flock(slow, fcntl.LOCK_EX)
    own = {"mark": process_mark(os.getpid()), "namespace": run_lock_module._pid_namespace()}
    threading.Timer(0.1, write_record, [run], own).start()
    with pytest.raises(RunLockedError, match=f"Process {os.getpid()} on "):
        RunLock(run)
    os.close(slow)


def test_a_holder_on_another_machine_is_named_though_it_cannot_be_seen_from_here(run: RunFolder) -> None:
    write_record(run, pid=4242, host="gpu-server-7", started=1700000000.0)
    held = os.open(run.lock, os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(RunLockedError, match=r"Process 4242 on gpu-server-7 has worked on it since 2023-11-1\d"):
        RunLock(run)
    os.close(held)


FORKS = {
    "fork": "pid = os.fork()",
    "multiprocessing": "m = fork_context.Process(target=time.sleep, args=[60]); m.start(); pid = m.pid",
    "program": "pid = subprocess.Popen(['sleep', '60'], close_fds=False).pid",
}


@pytest.mark.parametrize("how", FORKS)
def test_a_child_that_outlives_a_killed_run_does_not_keep_it_locked(run: RunFolder, how: str) -> None:
    code = f"""if True:
        import multiprocessing, os, subprocess, sys, time
        from pathlib import Path
        from lorasmith.engine.run_folder import RunFolder
        from lorasmith.engine.run_lock import RunLock
        fork_context = multiprocessing.get_context("fork")
        lock = RunLock(RunFolder(Path({str(run.path)!r})))
        {FORKS[how]}
        if pid == 0:
            time.sleep(60)
        print(pid, flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            holder = lock_holder(run)
            assert holder is not None
            assert holder["pid"] == process.pid
            process.kill()
            process.wait()
            assert process_mark(child)
            assert lock_holder(run) is None
            RunLock(run).release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_forked_child_that_ends_leaves_the_lock_to_its_parent(run: RunFolder) -> None:
    code = f"""if True:
        import os
        from pathlib import Path
        from lorasmith.engine.run_folder import RunFolder
        from lorasmith.engine.run_lock import RunLock, lock_holder
        run = RunFolder(Path({str(run.path)!r}))
        lock = RunLock(run)
        pid = os.fork()
        if pid == 0:
            lock.release()
            raise SystemExit
        os.waitpid(pid, 0)
        assert lock_holder(run)["pid"] == os.getpid()
        lock.release()
        assert lock_holder(run) is None
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOLCK, "does not support locks"),
        (errno.EOPNOTSUPP, "does not support locks"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_file_system_without_locks_is_said_in_words(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError) as refused:
        RunLock(run)
    assert words in refused.value.why
    assert str(run.lock) in refused.value.what
    assert "local disk" in refused.value.fix
    assert lock_holder(run) is None


def test_a_full_disk_takes_the_lock_without_its_record(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_lock_module, "LOCK_SECONDS", 0.05)
    monkeypatch.setattr(os, "pwrite", full)
    lock = RunLock(run)
    assert lock_holder(run) == {}
    lock.release()
    assert lock_holder(run) is None


def test_a_lock_that_cannot_be_opened_is_said_in_words(run: RunFolder) -> None:
    run.lock.mkdir()
    with pytest.raises(StorageError, match=re.escape(str(run.lock))):
        RunLock(run)


def test_the_mark_of_a_process_is_its_own() -> None:
    assert process_mark(os.getpid()) == process_mark(os.getpid())
    assert process_mark(os.getpid()) not in ("", None)
    child = subprocess.Popen(["sleep", "60"])
    try:
        mark = process_mark(child.pid)
        assert mark
        child.kill()
        # A zombie holds nothing any more.
        while process_mark(child.pid) == mark:
            time.sleep(0.001)
        assert process_mark(child.pid) is None
    finally:
        child.kill()
        child.wait()
    assert process_mark(child.pid) is None
