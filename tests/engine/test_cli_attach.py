"""Which run `lorasmith attach` means, and what it says where that is not clear or nothing goes on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasmith.engine import events
from lorasmith.engine.cli import attach, main
from lorasmith.engine.cli.attach import choose_run
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.journal import Journal
from lorasmith.engine.run_folder import RunFolder
from tests.engine.answering import Running
from tests.engine.beating_run import make_run, steps_done


@pytest.fixture(autouse=True)
def _own_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(prefix="ls-") as made:
        monkeypatch.setenv("LORASMITH_RUNTIME", made)
        yield


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[Running]]:
    """Three runs that are going on, none in the folder `runs`."""
    runs = [Running(tmp_path / place / name) for place, name in (("a", "cats-1"), ("b", "cats-2"), ("c", "dogs-1"))]
    yield runs
    for run in runs:
        run.end()


def journal(run: RunFolder, *told: events.Event) -> None:
    writer = Journal(run.journal)
    for event in told:
        writer.append(event)
    writer.close()


def started(resumed_from: int = 0) -> events.RunStarted:
    return events.RunStarted(
        run="cats-1", total_steps=400, resumed_from=resumed_from, config={}, versions={}, device="cpu"
    )


def test_a_run_is_found_by_folder_by_name_or_by_its_beginning_wherever_it_lives(
    three: list[Running], tmp_path: Path
) -> None:
    over = make_run(tmp_path / "runs" / "old-1")
    assert choose_run("old", Path("runs")) == over
    assert choose_run(str(tmp_path / "b" / "cats-2"), Path("runs")).name == "cats-2"
    assert choose_run("cats-2", Path("runs")).path == tmp_path / "b" / "cats-2"
    assert choose_run("dogs", Path("runs")).path == tmp_path / "c" / "dogs-1"


def test_the_only_run_that_goes_on_needs_no_name(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "old-1")
    run = Running(tmp_path / "far" / "cats-1")
    assert choose_run(None, Path("runs")).path == tmp_path / "far" / "cats-1"
    run.end()


@pytest.mark.parametrize(("text", "names"), [(None, ["cats-1", "cats-2", "dogs-1"]), ("cats", ["cats-1", "cats-2"])])
def test_several_that_fit_are_listed_with_what_they_do(
    three: list[Running], text: str | None, names: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        choose_run(text, Path("runs"))
    listed = raised.value.why.splitlines()[1:]
    assert [line.split()[0] for line in listed] == names
    assert raised.value.fix == "Name one of them."


def test_nothing_to_attach_to_is_said_in_words() -> None:
    with pytest.raises(ConfigError, match="No run of yours is going on"):
        choose_run(None, Path("runs"))
    with pytest.raises(ConfigError, match="is named cats"):
        choose_run("cats", Path("runs"))


@pytest.mark.parametrize(("outcome", "code"), [("finished", 0), ("stopped", 130), ("failed", 9)])
def test_a_run_that_is_over_is_told_shortly_with_its_exit_code(
    outcome: events.Outcome, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "runs" / "cats-1")
    told = [events.Logged(severity="info", message=f"line {number}") for number in range(100)]
    end = events.RunEnded(outcome=outcome, step=20, message="That was it.", why="So.", exit_code=code)
    journal(run, started(), *map(steps_done, range(1, 21)), *told, end)
    assert main(["attach", "cats"]) == code
    out, err = capsys.readouterr()
    assert "That was it." in (err if outcome == "failed" else out)
    assert out.splitlines()[0] == "Run cats-1 on cpu: 400 steps"
    assert f"91 earlier lines are in {run.journal}" in out
    assert "step 20/400" in out
    assert "line 99" in out
    assert len(out.splitlines()) < 16


def test_only_the_newest_start_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "runs" / "cats-1")
    first = events.RunEnded(outcome="failed", step=5, message="No.", exit_code=9)
    last = events.RunEnded(outcome="finished", step=6, message="Done.")
    journal(run, started(), steps_done(5), first, started(5), steps_done(6), last)
    assert main(["attach", "cats-1"]) == 0
    out = capsys.readouterr().out
    assert "400 steps, resumed at step 5" in out
    assert "No." not in out


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "runs" / "cats-1")
    journal(run, started(), *map(steps_done, range(1, 21)))
    assert main(["attach", "cats-1"]) == 1
    err = capsys.readouterr().err
    assert "The run cats-1 is interrupted at step 20 of 400." in err
    assert f"lorasmith train --resume {run.path}" in err


def test_a_run_that_never_began_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs" / "cats-1")
    assert main(["attach", "cats-1"]) == 1
    assert "The run cats-1 has not started." in capsys.readouterr().err


def test_a_screen_is_opened_where_there_is_one_and_lines_are_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "runs" / "cats-1")
    journal(run, started(), events.RunEnded(outcome="finished", step=0, message="Done."))
    opened: list[tuple[RunFolder, bool]] = []
    monkeypatch.setattr(attach, "open_monitor", lambda run, read_only: opened.append((run, read_only)) or 7)
    assert main(["attach", "cats-1"]) == 7
    assert main(["attach", "cats-1", "--read-only"]) == 7
    assert main(["attach", "cats-1", "--follow"]) == 0
    assert [(run.name, read_only) for run, read_only in opened] == [("cats-1", False), ("cats-1", True)]
