"""A start that ended without a word: the next one says how far it was, what probably ended it, and what is repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import sudden_end
from lorasmith.engine.events import Event, HardwareSampled, Logged, RunEnded, RunStarted, StepsDone
from lorasmith.engine.journal import Journal, replay
from lorasmith.engine.kill_evidence import killed_by_kernel, memory_kills
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import RunLock, lock_holder
from lorasmith.engine.session import Session
from lorasmith.engine.sudden_end import describe_sudden_end

Record = Callable[[int, str, str], None]
ROOT = Path(__file__).parents[2]
DIES = """
import ctypes, os, sys, time
from lorasmith.engine.events import RunStarted, StepsDone
from lorasmith.engine.journal import Journal
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import RunLock
from lorasmith.engine.run_log import RunLog
from pathlib import Path
run = RunFolder(Path(sys.argv[1]))
lock, log, journal = RunLock(run), RunLog(run.log), Journal(run.journal)
journal.append(RunStarted(run="r", total_steps=9, resumed_from=0, config={}, versions={}, device="cpu"))
journal.append(StepsDone(step=5, epoch=1, losses=[1.0], learning_rate=1.0, grad_norm=1.0, seconds_per_step=1.0))
print("ready", flush=True)
how = sys.stdin.readline().strip()
if how == "crash":
    ctypes.string_at(0)
if how == "abort":
    os.abort()
time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def _silent_system(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The counters and the log of this machine are none of a test's business, unless it says so."""
    if "real_system" not in request.fixturenames:
        monkeypatch.setattr(sudden_end, "killed_by_kernel", lambda *_: False)


@pytest.fixture
def real_system() -> None:
    """Read this machine's own evidence."""


def started(resumed_from: int = 0, **values: Any) -> RunStarted:
    return RunStarted(
        run="r", total_steps=300, resumed_from=resumed_from, config={}, versions={}, device="cpu", **values
    )


def steps(step: int, **values: Any) -> StepsDone:
    return StepsDone(step=step, epoch=1, losses=[1.0], learning_rate=1.0, grad_norm=1.0, seconds_per_step=1.0, **values)


def gauges(used: float, total: float = 24.0) -> HardwareSampled:
    return HardwareSampled(
        vram_used_gib=None, vram_total_gib=None, gpu_utilization_percent=None, temperature_c=None, power_w=None,
        ram_used_gib=used, ram_total_gib=total, process_ram_gib=used / 2,
    )  # fmt: skip


def vanished(run: RunFolder, *events: Event, torn: bool = False, **record: Any) -> None:
    """Leave `run` as a process leaves it that is killed after `events`."""
    journal = Journal(run.journal)
    for event in events:
        journal.append(event)
    journal.close()
    if torn:
        with run.journal.open("ab") as file:
            file.write(b'{"event": "StepsDone", "time": 17')
    lock = RunLock(run)
    held = json.loads(run.lock.read_bytes())
    lock.release()
    run.lock.write_text(json.dumps(held | record))


def test_a_start_that_said_how_it_ended_needs_no_more_words(run: RunFolder) -> None:
    assert describe_sudden_end(run) == ""
    vanished(run, started(), steps(3), RunEnded(outcome="stopped", step=3, message="Stopped."))
    assert describe_sudden_end(run) == ""


def test_a_run_that_somebody_works_on_has_not_ended(run: RunFolder) -> None:
    vanished(run, started(), steps(3))
    lock = RunLock(run)
    assert lock_holder(run) is not None
    assert describe_sudden_end(run) == ""
    lock.release()
    assert describe_sudden_end(run) != ""


def test_step_process_times_and_repeated_steps_are_told(run: RunFolder) -> None:
    (run.checkpoints / "step-00000050").mkdir()
    (run.checkpoints / "step-00000100").mkdir()
    now = time.time()
    vanished(run, started(time=now - 9), steps(120, time=now), torn=True, pid=123, started=now - 10)
    clock = time.strftime("%H:%M", time.localtime(now))
    since = time.strftime("%H:%M", time.localtime(now - 10))
    text = describe_sudden_end(run)
    assert text.startswith(f"The last start (process 123 since {since}")
    assert f"ended without a word after step 120 at {clock}" in text
    assert text.endswith("Training goes on from the checkpoint of step 100; 20 steps are repeated.")
    assert "nothing on this machine says why" in text


def test_without_a_checkpoint_training_begins_anew(run: RunFolder) -> None:
    vanished(run, started(), steps(7))
    assert describe_sudden_end(run).endswith("It had saved no checkpoint, so training begins anew.")


def test_only_the_last_start_counts(run: RunFolder) -> None:
    vanished(run, started(), steps(7), RunEnded(outcome="failed", step=7, message="Failed."), started(4))
    assert "after step 4" in describe_sudden_end(run)


def test_a_long_journal_is_read_from_its_end(run: RunFolder) -> None:
    many = [steps(number) for number in range(1, 3000)]
    vanished(run, started(), gauges(1.0), *many)
    assert run.journal.stat().st_size > 4 * sudden_end._TAIL_BYTES
    assert "after step 2999" in describe_sudden_end(run)


def test_memory_that_was_nearly_full_is_probably_the_cause(run: RunFolder) -> None:
    vanished(run, started(), steps(5), gauges(12.0), gauges(23.6))
    text = describe_sudden_end(run)
    assert "memory was 23.6 of 24.0 GiB full, so the system probably ended it for lack of memory" in text
    assert "lower train.batch_size" in text


def test_memory_that_was_not_full_is_not_blamed(run: RunFolder) -> None:
    vanished(run, started(), steps(5), gauges(23.6), gauges(12.0))
    assert "lack of memory" not in describe_sudden_end(run)


def test_the_kernels_log_is_certain(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sudden_end, "killed_by_kernel", lambda pid, since: pid == 77)
    vanished(run, started(), steps(5), pid=77, namespace=sudden_end.INITIAL_PID_NAMESPACE)
    assert "ended it for lack of memory, says the kernel's log" in describe_sudden_end(run)
    # In a container the numbers of processes are others than those in the kernel's log.
    vanished(run, pid=77, namespace=1)
    assert "kernel's log" not in describe_sudden_end(run)


def test_a_counter_of_the_control_group_that_grew_is_evidence(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sudden_end, "memory_kills", lambda: ("group", 3))
    vanished(run, started(), steps(5), kills=["group", 2])
    assert "container or service for lack of memory, probably this one" in describe_sudden_end(run)
    for other in (["group", 3], ["another group", 2], None):
        vanished(run, kills=other)
        assert "lack of memory" not in describe_sudden_end(run)


def test_a_restart_of_the_machine_is_told(run: RunFolder) -> None:
    vanished(run, started(), steps(5), gauges(23.9), boot="another boot")
    text = describe_sudden_end(run)
    assert "The machine has been restarted since." in text
    assert "lack of memory" not in text


def test_of_another_machine_nothing_is_claimed(run: RunFolder) -> None:
    vanished(run, started(), steps(5), host="elsewhere", boot="another boot")
    assert "It ran on elsewhere; why it ended cannot be seen" in describe_sudden_end(run)


def test_an_unreadable_journal_is_no_trouble(run: RunFolder) -> None:
    run.journal.mkdir()
    assert describe_sudden_end(run) == ""


@pytest.mark.parametrize(
    ("how", "said"),
    [("crash", "It crashed: Segmentation fault"), ("abort", "It crashed: Aborted"), ("kill", "killed from outside or")],
)
def test_a_process_that_really_dies(how: str, said: str, run: RunFolder, record: Record) -> None:
    command = [sys.executable, "-c", DIES, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if how == "kill":
            process.kill()
        else:
            process.stdin.write(f"{how}\n")
            process.stdin.close()
        assert process.wait(60) < 0
    text = describe_sudden_end(run)
    assert f"process {process.pid} since" in text
    assert "after step 5" in text
    assert said in text
    # What a later start writes to the log ends the claim.
    with run.log.open("a") as log:
        log.write("2030-01-01 10:00:00,000 WARNING lorasmith: later\n")
    assert "crashed:" not in describe_sudden_end(run)
    record(9, f"told after a real end by {how}", "1 of 1")


# The system's own evidence.


def test_the_counter_of_both_versions_of_control_groups_is_read(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/user.slice/a.scope\n")
    group = tmp_path / "user.slice" / "a.scope"
    group.mkdir(parents=True)
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n")
    new = memory_kills(tmp_path, membership)
    assert new is not None
    assert new[1] == 1
    membership.write_text("4:memory:/box\n0::/\n")
    (tmp_path / "memory" / "box").mkdir(parents=True)
    (tmp_path / "memory" / "box" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
    old = memory_kills(tmp_path, membership)
    assert old is not None
    assert old[1] == 4
    assert old[0] != new[0]
    membership.unlink()
    assert memory_kills(tmp_path, membership) is None


def test_the_kernels_log_is_searched_for_the_process(tmp_path: Path) -> None:
    seconds = time.monotonic() - 10
    log = tmp_path / "kmsg"
    log.write_text(
        f"6,1,{int(seconds * 1e6)},-;Memory cgroup out of memory: Killed process 30459 (python3) total-vm:630984kB\n"
        f"6,2,{int(seconds * 1e6)},-;something about process 30460\n"
    )
    now = time.time()
    assert killed_by_kernel(30459, now - 60, log)
    assert not killed_by_kernel(30459, now, log)
    assert not killed_by_kernel(30460, now - 60, log)
    assert not killed_by_kernel(30459, 0, tmp_path / "none")


# Real lack of memory.


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of this test's own with a memory limit, of either version."""
    parents = {Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes", Path("/sys/fs/cgroup"): "memory.max"}
    for parent, limit in parents.items():
        path = parent / f"lorasmith-test-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        if (path / limit).exists():
            (path / limit).write_text(str(1 << 30))
            yield path
            path.rmdir()
            return
        path.rmdir()
    pytest.skip("memory control groups cannot be made here: that takes root, and a memory controller")


def program(base: Path, folder: Path, *how: str, group: Path | None = None) -> tuple[int, str]:
    """Run `tests.faults.short_of_memory` to its end, in `group`; return its exit status and all that it printed."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "LORASMITH_RUNTIME": str(folder / "runtime")}
    command = [sys.executable, "-m", "tests.faults.short_of_memory", str(base), str(folder), *how]
    if group is not None:
        enter = f'echo $$ > {group}/cgroup.procs; exec "$@"'
        command = ["sh", "-c", enter, "sh", *command]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=170, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.campaign
def test_a_process_that_the_memory_killer_ended_is_told_about_and_goes_on(
    tiny_sd15: Path, tmp_path: Path, group: Path, real_system: None, record: Record
) -> None:
    status, _ = program(tiny_sd15, tmp_path, "grow", group=group)
    assert status in (-signal.SIGKILL, 128 + signal.SIGKILL)
    [folder] = (tmp_path / "runs").iterdir()
    text = describe_sudden_end(RunFolder(folder))
    assert "after step 2" in text
    session = Session(RunFolder(folder), RunFolder(folder).load_config().config)
    session.start()
    assert session.join(150)
    assert session.outcome is not None
    assert session.outcome.outcome == "finished"
    told = [event.message for event in replay(folder / "journal.jsonl") if isinstance(event, Logged)]
    [said] = [message for message in told if "without a word" in message]
    assert "lack of memory" in said
    assert said.endswith("Training goes on from the checkpoint of step 2; no step is repeated.")
    assert any(isinstance(event, Logged) and event.message == said for event in session.drain())
    record(9, "told after the system's memory killer in a control group", "1 of 1")


@pytest.fixture
def large_pictures(tmp_path: Path) -> Path:
    from tests.tiny import tiny_pictures

    tiny_pictures(tmp_path / "pictures", 8, sizes=((256, 256),))
    return tmp_path


@pytest.mark.campaign
def test_an_address_space_that_is_really_too_small_ends_in_words(
    tiny_sd15: Path, large_pictures: Path, record: Record
) -> None:
    status, printed = program(tiny_sd15, large_pictures, "limit", str(8 << 20))
    assert status == 6, printed
    assert "one picture is taken at a time" in printed
    assert "Traceback" not in printed
    assert "This machine ran out of memory" in printed
    assert "ulimit -v" in printed
    assert "dataset.resolution (now 256)" in printed
    record(9, "address space really limited: ended with words and exit code 6", "1 of 1")


@pytest.mark.campaign
def test_an_address_space_that_is_really_tight_is_got_by_with(
    tiny_sd15: Path, large_pictures: Path, record: Record
) -> None:
    for left in range(32, 80, 8):
        status, printed = program(tiny_sd15, large_pictures, "limit", str(left << 20))
        if status in (-signal.SIGSEGV, -signal.SIGABRT):
            # A library's own code took the missing memory for granted; then the next start has the words.
            newest = max((large_pictures / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
            assert "It crashed: " in describe_sudden_end(RunFolder(newest))
            continue
        assert status in (0, 6), printed
        if status == 0:
            break
    assert "gradient checkpointing is on" in printed
    assert "Training finished after 4 steps" in printed
    record(9, "address space really limited: finished with less", "1 of 1")
