"""What a list of runs says of each: told by the lock and the journal, since nothing ever stores "running"."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lorasmith.engine.events import (
    Event,
    Parked,
    Paused,
    Resumed,
    RunEnded,
    RunStarted,
    Stalled,
    StallEnded,
    StepsDone,
)
from lorasmith.engine.journal import Journal
from lorasmith.engine.resume import settings_before
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.engine.run_folder import RunFolder, create_run
from lorasmith.engine.run_lock import RunLock
from lorasmith.engine.run_summary import SILENT_SECONDS, RunSummary, summarize_run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(resolve_config([Layer("test", {"run": {"name": "r", "output_folder": str(tmp_path)}})]))


@pytest.fixture
def held(run: RunFolder) -> Iterator[RunFolder]:
    lock = RunLock(run)
    yield run
    lock.release()


START = RunStarted(run="r", total_steps=10, resumed_from=0, config={}, versions={}, device="cpu")
STEPS = StepsDone(step=7, epoch=1, losses=[0.5], learning_rate=1e-4, grad_norm=0.1, seconds_per_step=0.1)
FULL = Paused(step=7, reason="The disk is full.")
PARKED = Parked(step=7, freed_gib=6.25)
STALLED = Stalled(step=7, seconds=130.0, where="reading pictures", stacks="stacks-1.txt")


def tell(run: RunFolder, *events: Event) -> RunSummary:
    journal = Journal(run.journal)
    for event in events:
        journal.append(event)
    journal.close()
    return summarize_run(run)


def clock(moment: float) -> str:
    today = time.localtime(moment)[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if today else "%Y-%m-%d %H:%M", time.localtime(moment))


@pytest.mark.parametrize(
    ("events", "state", "words", "message"),
    [
        ([START, STEPS], "running", "running at step 7 of 10", ""),
        ([START, STEPS, FULL], "paused", f"paused at step 7 of 10 since {clock(FULL.time)}", "The disk is full."),
        ([START, STEPS, FULL, Resumed(step=7)], "running", "running at step 7 of 10", ""),
        (
            [START, STEPS, Paused(step=7), PARKED],
            "parked",
            f"parked at step 7 of 10 since {clock(PARKED.time)}",
            "6.2 GiB of the card are free for others.",
        ),
        (
            [START, STEPS, STALLED],
            "stalled",
            f"stalled at step 7 of 10 since {clock(STALLED.time - 130)}",
            "reading pictures",
        ),
        ([START, STEPS, STALLED, StallEnded(step=7, seconds=140)], "running", "running at step 7 of 10", ""),
        (
            [START, FULL, RunEnded(outcome="failed", step=7, message="x"), START],
            "running",
            "running at step 0 of 10",
            "",
        ),
        ([START, STEPS, FULL, START], "running", "running at step 0 of 10", ""),
    ],
)
def test_what_a_living_run_does_is_read_from_its_journal(
    held: RunFolder, events: list[Event], state: str, words: str, message: str
) -> None:
    summary = tell(held, *events)
    assert (summary.state, summary.describe(), summary.message) == (state, words, message)
    assert (summary.live, summary.process) == (True, os.getpid())


@pytest.mark.parametrize("waiting", [Paused(step=7), PARKED, STALLED])
def test_a_run_whose_process_died_while_it_waited_is_interrupted(run: RunFolder, waiting: Event) -> None:
    summary = tell(run, START, STEPS, waiting)
    assert (summary.state, summary.live, summary.process) == ("interrupted", False, None)
    assert summary.describe() == "interrupted at step 7 of 10"


def test_a_held_run_that_writes_nothing_any_more_shows_no_sign_of_life(held: RunFolder) -> None:
    tell(held, START, STEPS, FULL)
    quiet_since = time.time() - SILENT_SECONDS - 5
    for path in (held.journal, held.lock):
        os.utime(path, (quiet_since, quiet_since))
    summary = summarize_run(held)
    assert (summary.state, summary.since) == ("silent", pytest.approx(quiet_since, abs=0.01))
    assert summary.describe() == f"no sign of life at step 7 of 10 since {clock(quiet_since)}"


def test_a_run_that_was_just_taken_up_again_is_not_silent(run: RunFolder) -> None:
    tell(run, START, STEPS)
    long_ago = time.time() - 86400
    for path in (run.journal, run.lock):
        if path.exists():
            os.utime(path, (long_ago, long_ago))
    lock = RunLock(run)
    assert summarize_run(run).state == "running"
    lock.release()


def test_a_finished_run_that_was_extended_waits_to_go_on(run: RunFolder) -> None:
    assert tell(run, START, RunEnded(outcome="finished", step=10, message="Done.")).state == "finished"
    settings_before(run.path, 10).write_text("")
    summary = summarize_run(run)
    assert (summary.state, summary.describe()) == ("stopped", "stopped at step 10")
    assert "extended" in summary.message
    again = [replace(START, resumed_from=10, total_steps=15), RunEnded(outcome="finished", step=15, message="Done.")]
    assert tell(run, *again).describe() == "finished"
