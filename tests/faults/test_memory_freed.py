"""Several runs in one process, each ended in another way, and what of them is in memory afterwards: promise 12."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MAX_GROWTH_MIB = 35.0
"""Half of the base model: what the allocator, libraries and the sessions' own events may take."""


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("rounds")
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.memory_rounds", str(folder)],
        cwd=ROOT,
        env=os.environ | {"LORASMITH_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.campaign
def test_each_run_ended_in_the_way_that_it_was_to(rounds: list[dict[str, Any]]) -> None:
    assert [(one["round"], one["outcome"], one["step"]) for one in rounds] == [
        ("finish", "finished", 3),
        ("stop", "stopped", 3),
        ("exception in a step", "failed", 2),
        ("out of memory", "failed", 2),
        ("stop while encoding", "stopped", 0),
        ("stop while drawing", "stopped", 2),
        ("stop while parked", "stopped", 2),
        ("stop again", "stopped", 3),
    ]


@pytest.mark.campaign
def test_no_network_and_no_tensor_outlives_its_run(
    rounds: list[dict[str, Any]], record: Callable[[int, str, str], None]
) -> None:
    # The session, which the wizard keeps, is held there; nothing is collected before it is looked at.
    assert {one["round"]: one["networks"] for one in rounds} == dict.fromkeys((one["round"] for one in rounds), 0)
    assert max(one["mib"] for one in rounds) < 0.1
    assert {one["frozen"] for one in rounds} == {0}
    free = sum(one["networks"] == 0 and one["mib"] < 0.1 for one in rounds)
    record(
        12, "runs in one process that left no tensor (stop, exception, memory, encoding, …)", f"{free} of {len(rounds)}"
    )


@pytest.mark.campaign
def test_the_process_does_not_grow_from_run_to_run(
    rounds: list[dict[str, Any]], record: Callable[[int, str, str], None]
) -> None:
    first, *later = [one["rss"] for one in rounds]
    assert max(later) - first < MAX_GROWTH_MIB, rounds
    record(12, "growth of the process over all rounds, model of 70 MiB", f"{max(later) - first:+.0f} MiB")
