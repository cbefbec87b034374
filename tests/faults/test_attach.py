"""A run whose terminal is gone is attached to, parked and finished elsewhere; no end of a monitor touches a run."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import events
from lorasmith.engine.control import ask, running_runs
from lorasmith.engine.journal import replay
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import lock_holder
from tests.engine.beating_run import READY, make_run
from tests.engine.cli_runs import make_tiny_run
from tests.tui.terminal_program import ROOT, TerminalProgram
from tests.tui.tmux import TMUX, TmuxPane

Record = Callable[[int, str, str], None]
STEPS = 120


@pytest.fixture(autouse=True)
def _own_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / "state"))
    with tempfile.TemporaryDirectory(prefix="ls-") as made:
        monkeypatch.setenv("LORASMITH_RUNTIME", made)
        yield


def wait_until(seen: Callable[[], bool], words: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end, words
        time.sleep(0.05)


def status(run: RunFolder) -> dict[str, Any]:
    return ask(run, {"request": "status"}, timeout=20)


def told(run: RunFolder) -> list[events.Event]:
    return list(replay(run.journal))


def losses(run: RunFolder) -> list[float]:
    """The loss of every step in order; a step that was told twice fails the test."""
    found: dict[int, float] = {}
    for event in told(run):
        if isinstance(event, events.StepsDone):
            for back, loss in enumerate(reversed(event.losses)):
                assert event.step - back not in found
                found[event.step - back] = loss
    assert sorted(found) == list(range(1, len(found) + 1))
    return [found[step] for step in sorted(found)]


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.skipif(TMUX is None, reason="tmux is not installed")
def test_a_run_whose_terminal_was_killed_is_parked_and_finished_from_another_tmux_session(
    tmp_path: Path, tiny_sd15: Path, record: Record
) -> None:
    quiet = make_tiny_run(tmp_path / "quiet", tiny_sd15, steps=STEPS)
    program = [sys.executable, "-m", "lorasmith.tui", *quiet.args()]
    undisturbed = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert undisturbed.wait(120) == 0

    (tmp_path / "here").mkdir()
    tiny = make_tiny_run(tmp_path / "here" / "tiny", tiny_sd15, steps=STEPS)
    first = TmuxPane(tmp_path / "here", *tiny.args())
    wait_until(lambda: any(status(run)["step"] for run in running_runs()), "no step is done")
    (run,) = running_runs()
    holder = lock_holder(run)
    first.kill_terminal()
    # However quick the machine is, the run is not over before the other terminal is there.
    ask(run, {"request": "pause"}, 20)

    (tmp_path / "there").mkdir()
    second = TmuxPane(tmp_path / "there", "attach")
    try:
        second.wait_for(lambda text: "PAUSED" in text and "k Park" in text, 60)
        second.press("k")
        second.wait_for("Park at step")
        second.press("y")
        second.wait_for("PARKED")
        parked = status(run)
        assert 0 < parked["step"] < STEPS
        assert holder is not None
        assert parked["pid"] == holder["pid"]
        second.press("p")
        second.wait_for("FINISHED", 90)
        second.press("q")
        assert second.exit_code() == 0
    finally:
        second.close()
        first.close()
    (other,) = (path for path in quiet.output.iterdir())
    assert len(losses(run)) == STEPS
    assert losses(run) == losses(RunFolder(other))
    kinds = [type(event).__name__ for event in told(run)]
    assert (kinds.count("RunStarted"), kinds.count("Parked"), kinds.count("RunEnded")) == (1, 1, 1)
    assert running_runs() == []
    equal = sum(a == b for a, b in zip(losses(run), losses(RunFolder(other)), strict=True))
    record(6, "terminal killed, attached elsewhere, parked, finished: losses equal to an undisturbed run's",
           f"{equal} of {STEPS}")  # fmt: skip


Start = Callable[[], tuple[RunFolder, "subprocess.Popen[str]"]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a run without torch in a process of its own."""
    processes: list[subprocess.Popen[str]] = []

    def begin() -> tuple[RunFolder, subprocess.Popen[str]]:
        run = make_run(tmp_path / "runs" / "cats-1")
        arguments = ["-m", "tests.engine.beating_run", str(run.path), "1000000"]
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == READY
        return run, process

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


CRASHING = (
    "import sys; from lorasmith.tui.__main__ import main; from lorasmith.tui.screens.monitor import MonitorScreen;"
    "MonitorScreen.action_log_y = lambda self: {}['a mistake'];"
    "sys.exit(main(['attach']))"
)
ENDS: dict[str, Callable[[TerminalProgram], None]] = {
    "q": lambda program: program.type("q"),
    "closed terminal": TerminalProgram.hang_up,
    "SIGKILL": lambda program: program.signal(signal.SIGKILL),
    "crash": lambda program: program.type("l"),
    "ctrl+q": lambda program: program.type("\x11"),
    "SIGHUP": lambda program: program.signal(signal.SIGHUP),
    "SIGTERM": lambda program: program.signal(signal.SIGTERM),
    "SIGINT": lambda program: program.signal(signal.SIGINT),
}
SAMPLE = 4


def test_no_end_of_a_monitor_touches_the_run_or_the_other_monitors(
    start: Start, campaign: bool, record: Record
) -> None:
    run, process = start()
    ways = list(ENDS)[: None if campaign else SAMPLE]
    programs = {
        way: TerminalProgram(["-c", CRASHING] if way == "crash" else ["-m", "lorasmith.tui", "attach"]) for way in ways
    }
    stays = TerminalProgram(["-m", "lorasmith.tui", "attach", "--read-only"])
    for program in programs.values():
        assert program.wait_for(lambda program=program: "p Pause" in program.text(), 90), program.text()
    for way, program in programs.items():
        ENDS[way](program)
        code = program.wait()
        if way in ("q", "ctrl+q", "crash"):
            words = "The run goes on; attach again with: lorasmith attach cats-1"
            assert program.wait_for(lambda program=program: words in program.text(), 10), program.text()  # noqa: B023
            assert code == (1 if way == "crash" else 0)
    goes_on(run, process)
    step = status(run)["step"]
    assert stays.wait_for(lambda: shown_step(stays) >= step), stays.text()
    for program in (*programs.values(), stays):
        program.close()
    record(6, "ways to end a monitor, the run untouched", f"{len(ways)} of {len(ways)}")


def shown_step(program: TerminalProgram) -> int:
    found = re.search(r"Step (\d+)/", program.text())
    return int(found[1]) if found else -1


def goes_on(run: RunFolder, process: subprocess.Popen[str]) -> None:
    before = len(told(run))
    wait_until(lambda: len(told(run)) > before + 5, "the run stands still")
    assert process.poll() is None
    assert not [event for event in told(run) if isinstance(event, events.CommandReceived | events.RunEnded)]
    assert ask(run, {"request": "ping"})["pid"] == process.pid


@pytest.fixture
def attach() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `lorasmith attach` without a terminal."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "lorasmith.tui", "attach", *arguments],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, cwd=ROOT,
            )
        )  # fmt: skip
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        with process:
            process.wait()


Attach = Callable[..., "subprocess.Popen[str]"]


def first_line(follower: subprocess.Popen[str]) -> str:
    assert follower.stdout is not None
    return follower.stdout.readline()


def test_plain_lines_follow_a_run_to_its_end_and_return_its_exit_code(start: Start, attach: Attach) -> None:
    run, _ = start()
    follower = attach("--follow")
    assert first_line(follower).startswith("Run cats-1 on cpu: 1000000 steps")
    ask(run, {"request": "park"}, 20)
    ask(run, {"request": "resume"}, 20)
    ask(run, {"request": "stop"}, 20)
    out, err = follower.communicate(timeout=60)
    assert re.search(r"Parked at step \d+: 7.9 GiB of the card are free", out)
    assert "goes on at step" in out
    assert out.endswith(f"It ended. Run folder: {run.path}\n")
    assert (follower.returncode, err) == (130, "")


def test_plain_lines_say_that_the_process_died(start: Start, attach: Attach) -> None:
    run, process = start()
    follower = attach()
    assert first_line(follower).startswith("Run cats-1")
    process.kill()
    process.wait()
    _, err = follower.communicate(timeout=60)
    assert follower.returncode == 1
    assert re.search(r"The run cats-1 is interrupted at step \d+ of 1000000", err)
    assert f"lorasmith train --resume {run.path}" in err


def test_ctrl_c_leaves_plain_lines_and_not_the_run(start: Start, attach: Attach) -> None:
    run, process = start()
    follower = attach("cats")
    assert first_line(follower).startswith("Run cats-1")
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert "The run goes on; attach again with: lorasmith attach cats-1" in err
    goes_on(run, process)


def test_a_reader_that_goes_away_is_no_error(start: Start, attach: Attach) -> None:
    run, process = start()
    follower = attach(str(run.path))
    first_line(follower)
    assert follower.stdout is not None
    assert follower.stderr is not None
    follower.stdout.close()
    assert follower.wait(60) == 130
    assert follower.stderr.read() == ""
    goes_on(run, process)
