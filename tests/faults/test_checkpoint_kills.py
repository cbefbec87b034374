"""Promise 1: kill -9 at every file-system call of a save, and the next start finds the newest finished checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.engine.storage import require_writable
from tests.faults.checkpoint_scenarios import Ground, newest, require_next_save_is_clean, save
from tests.faults.fault_server import KILL_AFTER, Fault, FaultServer, Outcome, Spoil

Record = Callable[[int, str, str], None]
SAMPLE = 6
"""Without --campaign every sixth call is a kill, and each rename."""


def moment_of_truth(whole: Outcome) -> int:
    """Return the number of the call that makes the new checkpoint count: the rename of the whole folder."""
    (number,) = [
        n
        for n, (name, path) in enumerate(whole.calls, 1)
        if name == "rename" and Path(path).name.startswith(".saving-")
    ]
    return number


def kills(whole: Outcome, campaign: bool) -> list[Spoil]:
    """Return a kill before each call, and after each; or a sample."""
    numbers = range(1, whole.count + 1)
    if campaign:
        return [Spoil.kill(n, after=after) for n in numbers for after in (False, True)]
    some = [n for n in numbers if n % SAMPLE == 1 or whole.calls[n - 1][0].startswith("rename")]
    return [Spoil.kill(n) for n in some] + [Spoil.kill(whole.count, after=True)]


@pytest.mark.parametrize("situation", ["a first save", "a save with pruning", "a save where a damaged one is"])
def test_a_kill_at_any_call_of_a_save_leaves_the_old_checkpoint_or_the_new_one(
    situation: str, faults: FaultServer, quick_folder: Path, campaign: bool, record: Record
) -> None:
    ground = Ground(quick_folder, situation)
    whole = faults.run(save, str(ground.fresh()), 3, 2)
    assert whole.value == "step-00000003"
    turn = moment_of_truth(whole)
    plan = kills(whole, campaign)
    survived = 0
    for spoil in plan:
        folder = ground.fresh()
        outcome = faults.run(save, str(folder), 3, 2, spoil=spoil)
        assert outcome.killed, spoil
        done = spoil.at if spoil.action == KILL_AFTER else spoil.at - 1
        assert newest(folder) == (3 if done >= turn else ground.old), (spoil, outcome.spoilt)
        require_next_save_is_clean(folder)
        survived += 1
    every = "at every call of" if campaign else "at sampled calls of"
    record(1, f"kill -9 {every} {situation} ({whole.count} calls)", f"resumed {survived} of {len(plan)}")


def try_the_folder(fault: Fault, folder: str) -> None:
    with fault.armed(folder):
        require_writable(Path(folder) / "run", 1000)


def test_a_kill_while_a_folder_is_tried_leaves_nothing_in_it(faults: FaultServer, quick_folder: Path) -> None:
    whole = faults.run(try_the_folder, str(quick_folder))
    assert whole.error == "", whole.trace
    for number in range(1, whole.count + 1):
        shutil.rmtree(quick_folder / "run", ignore_errors=True)
        assert faults.run(try_the_folder, str(quick_folder), spoil=Spoil.kill(number)).killed
        assert [path.name for path in quick_folder.rglob("*") if path.name != "run"] == []
