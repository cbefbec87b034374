"""`lorasmith runs`: listed with state and size, resumed, extended, renamed and deleted."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from lorasmith.engine.cli import main
from lorasmith.engine.events import Paused, RunEnded, RunStarted, StepsDone
from lorasmith.engine.journal import Journal
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import RunLock
from tests.engine.cli_runs import make_tiny_run

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps."""
    tiny = make_tiny_run(tmp_path_factory.mktemp("runs"), tiny_sd15)
    assert main(tiny.args()) == 0
    return next(tiny.output.iterdir())


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(trained, tmp_path / "runs" / trained.name))


def interrupt(run: RunFolder) -> None:
    """Make the journal that of a run whose process vanished at step 3 of 4."""
    run.journal.unlink()
    journal = Journal(run.journal)
    journal.append(
        RunStarted(run=run.name, total_steps=4, resumed_from=0, config={}, versions={}, device="cpu"),
    )
    journal.append(StepsDone(step=3, epoch=1, losses=[1.0] * 3, learning_rate=1.0, grad_norm=1.0, seconds_per_step=1.0))
    journal.close()


@pytest.mark.parametrize("arguments", [["runs", "{}"], ["runs", "--folder", "{}"], ["runs", "list", "{}"]])
def test_the_output_folder_may_be_given_in_each_way(run: RunFolder, capsys: Captured, arguments: list[str]) -> None:
    assert main([argument.format(run.path.parent) for argument in arguments]) == 0
    assert f"{run.name}  finished" in capsys.readouterr().out


def test_the_list_says_where_an_interrupted_run_stands_and_how_to_go_on(run: RunFolder, capsys: Captured) -> None:
    interrupt(run)
    assert main(["runs", str(run.path.parent)]) == 0
    out = capsys.readouterr().out
    assert "interrupted at step 3 of 4" in out
    assert "lorasmith runs resume RUN" in out


def test_the_list_says_why_a_run_failed(run: RunFolder, capsys: Captured) -> None:
    journal = Journal(run.journal)
    journal.append(RunStarted(run=run.name, total_steps=4, resumed_from=0, config={}, versions={}, device="cpu"))
    journal.append(RunEnded(outcome="failed", step=2, message="The disk is full.", exit_code=7))
    journal.close()
    assert main(["runs", str(run.path.parent)]) == 0
    out = capsys.readouterr().out
    assert "failed at step 2 of 4" in out
    assert f"{run.name}: The disk is full." in out


def test_the_list_says_why_a_living_run_waits(run: RunFolder, capsys: Captured) -> None:
    journal = Journal(run.journal)
    journal.append(RunStarted(run=run.name, total_steps=4, resumed_from=0, config={}, versions={}, device="cpu"))
    journal.append(Paused(step=2, reason="The disk is full: cannot write x."))
    journal.close()
    lock = RunLock(run)
    try:
        assert main(["runs", str(run.path.parent), "--json"]) == 0
    finally:
        lock.release()
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["state"], record["message"]) == ("paused", "The disk is full: cannot write x.")


def test_sizes_are_told_by_what_they_are(run: RunFolder, capsys: Captured) -> None:
    assert main(["runs", str(run.path.parent), "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    sizes = record["bytes"]
    assert sizes["export"] == (run.export / "tiny.safetensors").stat().st_size
    assert sizes["total"] == sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    assert sizes["checkpoints"] > 0


def test_a_run_is_resumed_by_a_beginning_of_its_name(run: RunFolder, capsys: Captured) -> None:
    (run.export / "tiny.safetensors").unlink()
    assert main(["runs", "resume", "tiny-", "--folder", str(run.path.parent)]) == 0
    assert (run.export / "tiny.safetensors").is_file()


def test_a_run_is_extended_after_saying_how_and_resumed_to_the_new_end(run: RunFolder, capsys: Captured) -> None:
    assert main(["runs", "extend", str(run.path), "--steps", "6", "--yes"]) == 0
    out = capsys.readouterr().out
    assert "6" in out
    assert f"lorasmith runs resume {run.path}" in out
    assert main(["runs", "resume", str(run.path)]) == 0
    assert "Training finished after 6 steps." in capsys.readouterr().out


@pytest.mark.parametrize("action", [["extend", "--steps", "6"], ["delete"]])
def test_without_a_terminal_nothing_is_done_unless_yes_is_said(
    run: RunFolder, capsys: Captured, action: list[str]
) -> None:
    before = run.run_file.read_bytes()
    assert main(["runs", action[0], str(run.path), *action[1:]]) == 2
    assert "--yes" in capsys.readouterr().err
    assert run.run_file.read_bytes() == before


@pytest.mark.parametrize(("answer", "deleted"), [("y", True), ("", False), ("no", False)])
def test_on_a_terminal_the_person_is_asked(
    run: RunFolder, capsys: Captured, monkeypatch: pytest.MonkeyPatch, answer: str, deleted: bool
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    assert main(["runs", "delete", str(run.path)]) == 0
    assert run.path.exists() != deleted
    assert ("Nothing was changed." in capsys.readouterr().out) != deleted


def test_a_deletion_names_the_lora_and_the_sizes_that_go(run: RunFolder, capsys: Captured) -> None:
    assert main(["runs", "delete", str(run.path), "--yes"]) == 0
    out = capsys.readouterr().out
    assert "tiny.safetensors" in out
    assert "checkpoints " in out
    assert list(run.path.parent.iterdir()) == []


def test_a_run_that_is_worked_on_is_not_deleted(run: RunFolder, capsys: Captured) -> None:
    lock = RunLock(run)
    try:
        assert main(["runs", "delete", str(run.path), "--yes"]) == 8
    finally:
        lock.release()
    assert "Another process trains in" in capsys.readouterr().err
    assert run.journal.exists()


def test_a_renamed_run_is_resumed_under_its_new_name(run: RunFolder, capsys: Captured) -> None:
    assert main(["runs", "rename", str(run.path), "Käse cat"]) == 0
    renamed = next(run.path.parent.iterdir())
    assert renamed.name == run.name.replace("tiny", "Käse-cat")
    (renamed / "export" / "tiny.safetensors").unlink()
    assert main(["runs", "resume", "Käse", "--folder", str(renamed.parent)]) == 0
    assert [path.name for path in (renamed / "export").iterdir()] == ["Käse cat.safetensors"]
