"""Promise 6, second half: what each signal means, with a screen and without one."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import re
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.events import RunEnded
from tests.faults.hosted import HostedRun, read_beats, wait_until
from tests.faults.sampling import sampled
from tests.tui.terminal_program import TerminalProgram

MODES = ["headless", "screen"]
LEFT_ON = (b"1049", b"1000", b"1002", b"1003", b"1006", b"1004", b"2004", b"2048")
"""Modes of the terminal that no shell wants: alternate screen, mouse, focus, paste and resize reports."""
Start = Callable[..., HostedRun]
Record = Callable[[int, str, str], None]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[HostedRun] = []

    def begin(mode: str, **options: Any) -> HostedRun:
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        runs.append(HostedRun(folder, mode, **options))
        return runs[-1].wait_for_steps()

    yield begin
    for run in runs:
        run.close()


def require_given_back(program: TerminalProgram) -> None:
    """The terminal is as it was: its flags, main screen, no reports, a cursor."""
    program.read(0.3)
    assert program.modes() == program.modes_before
    for mode in LEFT_ON:
        on, off = program.output.rfind(b"\x1b[?" + mode + b"h"), program.output.rfind(b"\x1b[?" + mode + b"l")
        assert off >= on, mode
    assert not program.screen.cursor.hidden
    assert program.output.rfind(b"\x1b[?25h") >= program.output.rfind(b"\x1b[?25l")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_gives_the_terminal_back_and_exits_130(
    start: Start, mode: str, number: int
) -> None:
    run = start(mode)
    assert run.modes() != run.modes_before or mode == "headless"
    begun = time.monotonic()
    run.signal(number)
    assert run.wait() == 130
    assert time.monotonic() - begun < 10
    assert len(run.saved()) == 1
    require_given_back(run)
    assert "Stopped at step" in run.text()


def test_ctrl_c_typed_on_the_terminal_of_lorasmith_train_is_such_a_signal(start: Start) -> None:
    run = start("headless")
    run.type("\x03")
    assert run.wait() == 130
    assert len(run.saved()) == 1


@pytest.mark.parametrize("mode", MODES)
def test_the_second_signal_ends_at_once_and_gives_the_terminal_back(start: Start, mode: str) -> None:
    run = start(mode, slow_save=60)
    run.signal(signal.SIGTERM)
    assert run.wait_for(lambda: "Once more ends at once" in run.text() and (run.folder / "saving").exists())
    run.signal(signal.SIGTERM)
    assert run.wait(5) == 130
    assert run.saved() == []
    require_given_back(run)


@pytest.mark.parametrize(
    ("mode", "stage"),
    sampled(itertools.product(MODES, ["scan", "load", "cache"]), [("headless", "load"), ("screen", "cache")]),
)
def test_what_cannot_be_interrupted_before_training_is_left_behind_in_time_and_nothing_is_lost(
    start: Start, mode: str, stage: str, campaign: bool
) -> None:
    run = start(mode, stage=stage, deaf=True, **({} if campaign else {"idle_seconds": 1.0}))
    begun = time.monotonic()
    run.signal(signal.SIGTERM)
    assert run.wait(15) == 130
    assert time.monotonic() - begun < 10
    ended = run.journal()[-1]
    assert isinstance(ended, RunEnded)
    assert (ended.outcome, ended.exit_code) == ("stopped", 130)
    assert "nothing is lost" in ended.message
    require_given_back(run)


def test_a_step_that_never_ends_is_left_behind_and_the_journal_says_which_checkpoint_counts(start: Start) -> None:
    run = start("headless", deaf=True, busy_seconds=1.0)
    run.signal(signal.SIGTERM)
    assert run.wait(15) == 130
    ended = run.journal()[-1]
    assert isinstance(ended, RunEnded)
    assert "did not end within 1 s" in ended.message
    assert "no checkpoint was written" in ended.message


def test_ctrl_z_stops_lorasmith_train_and_fg_goes_on_with_right_times(tmp_path: Path) -> None:
    bash = TerminalProgram(["-c", "import os; os.execvp('bash', ['bash', '--norc', '--noprofile', '-i'])"])
    try:
        bash.type(f"{sys.executable} -m tests.faults.hosted_run headless {tmp_path} '{{}}'\n")
        assert bash.wait_for(lambda: len(read_beats(tmp_path)) > 5), bash.text()
        bash.type("\x1a")
        assert bash.wait_for(lambda: "Stopped" in bash.text()), bash.text()
        assert not bash.screen.cursor.hidden
        seen = len(read_beats(tmp_path))
        time.sleep(1.5)  # what is measured is that nothing happens
        assert len(read_beats(tmp_path)) == seen
        bash.type("fg\n")
        assert bash.wait_for(lambda: len(read_beats(tmp_path)) > seen + 20)
        beats = read_beats(tmp_path)
        assert beats[seen][0] - beats[seen - 1][0] > 1.4
        assert sum(length for _, length in beats[seen - 1 : seen + 2]) < 1.0
        bash.type("\x03")
        assert bash.wait_for(lambda: "Run folder:" in bash.text())
    finally:
        bash.close()


def test_ctrl_z_and_sigtstp_do_not_stop_a_training_with_a_screen(start: Start) -> None:
    run = start("screen")
    run.signal(signal.SIGTSTP)
    run.wait_for_steps(10)
    run.type("\x1a")
    run.wait_for_steps(10)
    assert run.state() != "T"


def test_a_stray_sigcont_paints_the_screen_anew(start: Start) -> None:
    run = start("screen")
    run.type(" ")  # the chart stands still: it would not be painted again by itself
    assert run.wait_for(lambda: "charts" in run.text().lower())
    run.stream.feed(b"\x1b[2J")
    run.read(1.0)
    assert "Loss" not in run.text()
    run.signal(signal.SIGCONT)
    assert run.wait_for(lambda: "Loss" in run.text() and "Previews" in run.text(), 10), run.text()


@pytest.mark.parametrize("mode", MODES)
def test_a_storm_of_resizes_ends_in_a_screen_of_the_last_size(start: Start, mode: str) -> None:
    run = start(mode)
    dice = random.Random(5)
    for _ in range(200):
        resize(run, dice.randint(20, 200), dice.randint(5, 60))
        run.read(0.001)
    resize(run, 120, 36)
    run.wait_for_steps(20)
    if mode == "screen":
        run.screen.resize(36, 120)
        run.signal(signal.SIGCONT)
        assert run.wait_for(lambda: re.search(r"Step \d+/", run.text()) and "learning rate" in run.text(), 10)
    run.signal(signal.SIGTERM)
    assert run.wait() == 130
    require_given_back(run)


def resize(run: HostedRun, columns: int, rows: int) -> None:
    fcntl.ioctl(run.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@pytest.mark.parametrize("mode", MODES)
def test_sigusr1_saves_a_checkpoint_and_sigusr2_writes_all_stacks_to_the_log(start: Start, mode: str) -> None:
    run = start(mode)
    run.signal(signal.SIGUSR1)
    assert run.wait_for(lambda: len(run.saved()) == 1)
    run.signal(signal.SIGUSR2)
    assert run.wait_for(lambda: "in train" in run.log() and "Thread 0x" in run.log())
    run.wait_for_steps()


@pytest.mark.parametrize("mode", MODES)
def test_a_storm_of_a_hundred_random_signals_changes_nothing(
    start: Start, mode: str, campaign: bool, record: Record
) -> None:
    rounds = 10 if campaign else 1
    for seed in range(rounds):
        run = start(mode)
        sent = storm(run, random.Random(seed))
        before = len(run.beats())
        run.signal(signal.SIGCONT)
        assert run.wait_for(lambda run=run, before=before: len(run.beats()) > before + 20)
        run.signal(signal.SIGINT)
        assert run.wait() == 130
        assert sent == 100
        ended = run.journal()[-1]
        assert isinstance(ended, RunEnded)
        assert ended.outcome == "stopped"
        assert f"step-{ended.step:08d}" == run.saved()[-1].name
        require_given_back(run)
    record(6, f"storms of 100 random signals survived ({mode})", f"{rounds} of {rounds}")


@pytest.mark.parametrize("mode", MODES)
def test_asking_for_all_stacks_a_hundred_times_disturbs_nothing(start: Start, mode: str) -> None:
    run = start(mode)
    for _ in range(100):
        run.signal(signal.SIGUSR2)
        run.read(0.001)
    before = len(run.beats())
    assert run.wait_for(lambda: len(run.beats()) > before + 20)
    assert run.process.poll() is None


def storm(run: HostedRun, dice: random.Random) -> int:
    """Send 100 signals whose default would end or stop the process, and return how many reached it."""
    numbers = [signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH, signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2]
    sent = 0
    for _ in range(100):
        number = dice.choice(numbers)
        run.signal(number)
        if number == signal.SIGTSTP:
            run.read(0.01)
            run.signal(signal.SIGCONT)
        run.read(dice.choice([0.0, 0.001, 0.02]))
        sent += run.process.poll() is None
    return sent


@pytest.mark.parametrize("mode", MODES)
def test_a_hang_up_in_the_middle_of_a_storm_changes_nothing_either(start: Start, mode: str) -> None:
    run = start(mode)
    dice = random.Random(11)
    for number in dice.choices([signal.SIGHUP, signal.SIGWINCH, signal.SIGPIPE, signal.SIGUSR1, signal.SIGCONT], k=20):
        run.signal(number)
    run.hang_up()
    for number in dice.choices([signal.SIGHUP, signal.SIGWINCH, signal.SIGPIPE, signal.SIGUSR1, signal.SIGCONT], k=20):
        os.kill(run.process.pid, number)
    seen = len(run.beats())
    assert wait_until(lambda: len(run.beats()) > seen + 20)
    run.signal(signal.SIGTERM)
    assert run.process.wait(10) == 130
