"""Promise 7: whatever fails in the screen, the training goes on, and the terminal says so in plain lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.events import Logged
from tests.faults.hosted import HostedRun, wait_until
from tests.faults.sampling import sampled
from tests.faults.screen_crashes import CRASHES
from tests.faults.test_signals import require_given_back
from tests.tui.terminal_program import TerminalProgram

SAMPLE = ("key", "fold-and-words")
Crash = Callable[..., HostedRun]


@pytest.fixture
def crash(tmp_path: Path) -> Iterator[Crash]:
    runs: list[HostedRun] = []

    def begin(name: str, **options: Any) -> HostedRun:
        runs.append(HostedRun(tmp_path, "screen", crash=name, **options))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.mark.parametrize("name", sampled(CRASHES, SAMPLE))
def test_a_crash_of_the_screen_leaves_the_training_running_and_says_how_to_see_it(
    crash: Crash, name: str, record: Callable[[int, str, str], None]
) -> None:
    run = crash(name, steps=150)
    if name == "key":
        run.wait_for_steps()
        run.type("?")
    assert run.wait_for(lambda: run.process.poll() is not None, 40), run.text()
    assert run.process.wait() == 0
    assert len(run.beats()) == 150

    shown = "".join(run.text().split())
    told = [event for event in run.journal() if isinstance(event, Logged) and "training goes on" in event.message]
    assert len(told) == 1
    assert f"`lorasmith attach {run.run}`" in told[0].message
    assert str(run.run / "run.log") in told[0].message or "no longer be drawn" in told[0].message
    assert name == "fold-and-words" or "traininggoesonwithoutit" in shown
    assert b"\x1b[2J[red]" not in run.output
    require_given_back(run)
    assert "Traceback" in run.log()
    record(7, f"crash in {name}", "survived")


def test_after_a_crash_ctrl_c_saves_and_library_output_stays_off_the_terminal(crash: Crash) -> None:
    run = crash("timer", noise=2000)
    assert run.wait_for(lambda: "traininggoeson" in "".join(run.text().split())), run.text()
    assert run.wait_for(lambda: (run.folder / "noisy").exists())
    seen = len(run.beats())
    assert run.wait_for(lambda: len(run.beats()) > seen + 10)
    assert b"NOISE" not in run.output
    run.type("\x03")
    assert run.wait() == 130
    assert "Stopped at step" in run.text()
    assert len(run.saved()) == 1


def test_a_terminal_that_closes_after_the_crash_does_not_end_the_training_either(crash: Crash) -> None:
    run = crash("timer", steps=200)
    assert run.wait_for(lambda: "traininggoeson" in "".join(run.text().split())), run.text()
    run.hang_up()
    assert run.process.wait(30) == 0
    assert len(run.beats()) == 200
    assert wait_until(lambda: "Training finished." in (run.folder / "screen.log").read_text())


def test_a_crash_before_there_is_a_run_is_told_in_words_with_the_log(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from textual.app import App
from lorasmith.tui.screen_host import run_app
class Broken(App):
    def on_mount(self):
        secret = "hf_" + "a" * 30
        raise RuntimeError("a mistake\\x1b[2J")
raise SystemExit(run_app(Broken(), lambda: None, Path({str(tmp_path / "wizard.log")!r})))
"""
    program = TerminalProgram(["-c", code])
    try:
        assert program.wait() == 1
        program.read(0.3)
        shown = "".join(program.text().split())
        assert "Thescreenfailed:RuntimeError:amistake␛[2J." in shown
        assert str(tmp_path / "wizard.log") in shown
        assert "Traceback" in (tmp_path / "wizard.log").read_text()
        # The values of variables are nobody's business: a token may be among them.
        assert b"aaaaaaaa" not in program.output
        assert "aaaaaaaa" not in (tmp_path / "wizard.log").read_text()
        require_given_back(program)
    finally:
        program.close()
