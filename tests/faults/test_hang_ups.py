"""Promise 6, first half: a closed terminal, a dead shell, a lost connection end the output, never the training."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.events import Logged, RunEnded
from tests.faults.hosted import HostedRun, read_beats, wait_until
from tests.tui.terminal_program import ROOT, TerminalProgram
from tests.tui.tmux import TMUX

MODES = ["headless", "screen"]
Start = Callable[..., HostedRun]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[HostedRun] = []

    def begin(mode: str, **options: Any) -> HostedRun:
        runs.append(HostedRun(tmp_path, mode, **options))
        return runs[-1].wait_for_steps()

    yield begin
    for run in runs:
        run.close()


def longest_gap(beats: list[tuple[float, float]]) -> float:
    return max(after[0] - before[0] for before, after in itertools.pairwise(beats))


@pytest.mark.parametrize("mode", MODES)
def test_a_closed_terminal_ends_the_output_and_the_training_goes_on_without_a_gap(
    start: Start, mode: str, record: Callable[[int, str, str], None]
) -> None:
    run = start(mode, steps=200)
    run.hang_up()
    assert wait_until(lambda: "The terminal is gone" in run.said())
    begun, used = time.monotonic(), run.main_thread_seconds()
    assert wait_until(lambda: len(run.beats()) > 150)
    share = (run.main_thread_seconds() - used) / (time.monotonic() - begun)
    assert run.process.wait(30) == 0

    assert len(run.beats()) == 200
    assert longest_gap(run.beats()) < 1.0
    assert share < 0.02
    (told,) = [event for event in run.journal() if isinstance(event, Logged) and "is gone" in event.message]
    assert f"`lorasmith attach {run.run}` shows it again" in told.message
    assert "The terminal is gone" in run.log()
    assert isinstance(run.journal()[-1], RunEnded)
    record(6, f"CPU of the main thread after the terminal was closed ({mode})", f"{share:.2%}")
    record(6, f"longest gap between steps of 20 ms, terminal closed ({mode})", f"{longest_gap(run.beats()):.3f} s")


@pytest.mark.parametrize("mode", MODES)
def test_a_run_without_its_terminal_takes_further_hang_ups_and_ends_by_sigterm_with_a_checkpoint(
    start: Start, mode: str
) -> None:
    run = start(mode)
    run.hang_up()
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGCONT, signal.SIGHUP):
        run.signal(number)
        run.wait_for_steps()
    run.signal(signal.SIGTERM)
    assert run.process.wait(10) == 130
    assert len(run.saved()) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_hang_up_signal_by_hand_leaves_the_terminal_usable_and_the_training_running(start: Start, mode: str) -> None:
    run = start(mode)
    run.signal(signal.SIGHUP)
    assert run.wait_for(lambda: "hang-up signal came" in run.text(), 10), run.text()
    run.wait_for_steps(20) if mode == "headless" else None
    if mode == "screen":
        assert run.modes() == run.modes_before
        assert "lorasmith attach" in run.text()
        assert wait_until(lambda: len(run.beats()) > 30)
    run.signal(signal.SIGINT)
    assert run.wait() == 130
    assert "Stopped at step" in run.text()


@pytest.mark.parametrize("mode", MODES)
def test_the_shell_in_between_may_die_too(tmp_path: Path, mode: str) -> None:
    bash = TerminalProgram(["-c", "import os; os.execvp('bash', ['bash', '--norc', '--noprofile', '-i'])"])
    try:
        bash.type(f"{sys.executable} -m tests.faults.hosted_run {mode} {tmp_path} '{{}}'\n")
        assert bash.wait_for(lambda: len(read_beats(tmp_path)) > 5), bash.text()
        bash.hang_up()
        assert bash.process.wait(10) is not None
        seen = len(read_beats(tmp_path))
        assert wait_until(lambda: len(read_beats(tmp_path)) > seen + 50)
        assert longest_gap(read_beats(tmp_path)) < 1.0
    finally:
        end_orphan(tmp_path, bash)


def end_orphan(folder: Path, parent: TerminalProgram | None = None) -> None:
    """End the run of `folder`, which is no child of this process, by SIGTERM: it saves and goes."""
    if parent is not None:
        parent.close()
    pid = int((folder / "pid").read_text())
    os.kill(pid, signal.SIGTERM)
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text(), 15)
    (run,) = (folder / "runs").iterdir()
    assert len(list((run / "checkpoints").iterdir())) == 1


@pytest.mark.skipif(TMUX is None, reason="tmux is not installed")
@pytest.mark.parametrize("mode", MODES)
def test_killing_the_tmux_session_leaves_the_training_running(tmp_path: Path, mode: str) -> None:
    socket = f"lorasmith-{secrets.token_hex(6)}"

    def tmux(*arguments: str) -> None:
        subprocess.run([str(TMUX), "-L", socket, "-f", "/dev/null", *arguments], check=True, cwd=ROOT)

    run = [sys.executable, "-m", "tests.faults.hosted_run", mode, str(tmp_path), "{}"]
    tmux("new-session", "-d", "-s", "lora", "-x", "80", "-y", "24", *run)
    assert wait_until(lambda: len(read_beats(tmp_path)) > 20)
    tmux("kill-session", "-t", "lora")
    seen = len(read_beats(tmp_path))
    assert wait_until(lambda: len(read_beats(tmp_path)) > seen + 50)
    assert longest_gap(read_beats(tmp_path)) < 1.0
    end_orphan(tmp_path)


def test_a_pipe_whose_reader_leaves_does_not_end_the_training(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.hosted_run", "headless", str(tmp_path), '{"steps": 150}']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT) as process:
        assert process.stdout is not None
        assert b"Run my-lora" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 0
    assert len(read_beats(tmp_path)) == 150


def test_a_pipe_that_nobody_reads_holds_nothing_up(tmp_path: Path) -> None:
    options = '{"steps": 60, "noise": 200000}'
    command = [sys.executable, "-m", "tests.faults.hosted_run", "headless", str(tmp_path), options]
    reader, writer = os.pipe()
    fill(writer)
    with subprocess.Popen(command, stdout=writer, stderr=writer, cwd=ROOT) as process:
        try:
            assert wait_until(lambda: len(read_beats(tmp_path)) == 60, 40)
            os.close(writer)
            with os.fdopen(reader, "rb") as late:
                assert b"Training finished." in late.read()
            assert process.wait(10) == 0
        finally:
            process.kill()


def fill(pipe: int) -> None:
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"full " * 1000)
    os.set_blocking(pipe, True)
