"""After the monitor of a finished demo the terminal tells whether the trigger works; other runs end without that."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorasmith.engine import demo_run
from lorasmith.engine.events import RunEnded, RunStarted
from lorasmith.presets import demo
from lorasmith.tui.__main__ import measure_demo
from lorasmith.tui.screens.monitor_text import summary_rows
from lorasmith.tui.state import RunState, reduce


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def session(outcome: str = "finished", model: str = "demo", folder: Path = demo.PICTURES) -> Any:
    config = SimpleNamespace(base=SimpleNamespace(model=model), dataset=SimpleNamespace(folder=str(folder)))
    return SimpleNamespace(run="the run", config=config, outcome=ended(outcome))


def ended(outcome: str) -> RunEnded:
    return RunEnded(outcome=outcome, step=3, message="Over.", exit_code=0)  # type: ignore[arg-type]


def test_a_finished_demo_prints_its_rates_and_ends_with_their_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(run: Any, config: Any, say: Callable[[str], None]) -> int:
        say(f"rates of {run}\x1b[2J")
        return 9

    monkeypatch.setattr(demo_run, "report_trigger", report)
    assert measure_demo(session()) == 9
    assert capsys.readouterr().out == "rates of the run␛[2J\n"


@pytest.mark.parametrize(
    "other", [session("stopped"), session(model="owner/name"), session(folder=Path("/my/pictures"))]
)
def test_nothing_is_measured_of_another_run_or_a_stopped_one(monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    monkeypatch.setattr(demo_run, "report_trigger", lambda *_: pytest.fail("measured"))
    assert measure_demo(other) == 0


def test_ctrl_c_leaves_the_measurement_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo_run, "report_trigger", lambda *_: signal.raise_signal(signal.SIGINT))
    assert measure_demo(session()) == 130
    assert "The LoRA is written all the same" in capsys.readouterr().out


def test_the_monitor_says_that_the_measurement_comes_next_and_only_where_it_does() -> None:
    def rows(outcome: str, folder: str, watching: bool = False) -> str:
        config = {"base": {"model": "demo"}, "dataset": {"folder": folder}}
        begun = RunStarted(run="r", total_steps=3, resumed_from=0, config=config, versions={}, device="cpu")
        state = reduce(reduce(RunState(), begun), ended(outcome))
        return "".join(text for row in summary_rows(state, watching=watching) for text, _ in row)

    assert "the demo's trigger is measured" in rows("finished", str(demo.PICTURES))
    assert "measured" not in rows("stopped", str(demo.PICTURES))
    assert "measured" not in rows("finished", "/my/pictures")
    assert "measured" not in rows("finished", str(demo.PICTURES), watching=True)
