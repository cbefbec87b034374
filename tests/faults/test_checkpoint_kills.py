"""Promise 1: kill -9 at every file-system call of a save, and the next start finds the newest finished checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lorasmith.engine.checkpoints import Checkpoint, newest_checkpoint, prune_checkpoints, save_checkpoint
from tests.faults.checkpoint_scenarios import save, state_of, tensors_of
from tests.faults.fault_server import KILL_AFTER, FaultServer, Outcome, Spoil

Record = Callable[[int, str, str], None]
SAMPLE = 4
"""Without --campaign every fourth call is a kill, and each rename."""


@pytest.fixture
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of saves would wait for the disk otherwise."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="lorasmith-", dir=parent) as folder:
        yield Path(folder)


def nothing_yet(folder: Path) -> None:
    pass


def two_older_ones(folder: Path) -> None:
    for step in (1, 2):
        save_checkpoint(folder, step, tensors_of(step), state_of(step))


def a_damaged_one_of_that_step(folder: Path) -> None:
    two_older_ones(folder)
    path = save_checkpoint(folder, 3, tensors_of(99), state_of(99))
    os.truncate(path / "optimizer.safetensors", 40)


SITUATIONS: dict[str, tuple[Callable[[Path], None], int | None]] = {
    "a first save": (nothing_yet, None),
    "a save with pruning": (two_older_ones, 2),
    "a save where a damaged one is": (a_damaged_one_of_that_step, 2),
}
"""What is there before the save of step 3, and the newest checkpoint that can be used."""


def require_whole(checkpoint: Checkpoint) -> None:
    """Compare every byte with what was saved for that step: no mix of two checkpoints passes."""
    assert checkpoint.state == state_of(checkpoint.step)
    for name, group in tensors_of(checkpoint.step).items():
        found = checkpoint.tensors(name)
        assert found.keys() == group.keys()
        assert all(torch.equal(found[key], value) for key, value in group.items())


def newest(folder: Path) -> int | None:
    checkpoint = newest_checkpoint(folder, lambda path, reason: None)
    if checkpoint is None:
        return None
    require_whole(checkpoint)
    return checkpoint.step


def require_next_save_is_clean(folder: Path) -> None:
    save_checkpoint(folder, 4, tensors_of(4), state_of(4))
    prune_checkpoints(folder, 2)
    assert newest(folder) == 4
    names = [path.name for path in folder.iterdir()]
    assert not [name for name in names if name.startswith(".")], names
    assert sorted(name for name in names if "damaged" not in name)[-1] == "step-00000004"


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


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_kill_at_any_call_of_a_save_leaves_the_old_checkpoint_or_the_new_one(
    situation: str, faults: FaultServer, quick_folder: Path, campaign: bool, record: Record
) -> None:
    prepare, old = SITUATIONS[situation]
    template = quick_folder / "template"
    prepare(template)

    def fresh() -> Path:
        folder = quick_folder / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        if template.exists():
            shutil.copytree(template, folder)
        return folder

    whole = faults.run(save, str(fresh()), 3, 2)
    assert whole.value == "step-00000003"
    turn = moment_of_truth(whole)
    plan = kills(whole, campaign)
    survived = 0
    for spoil in plan:
        folder = fresh()
        outcome = faults.run(save, str(folder), 3, 2, spoil=spoil)
        assert outcome.killed, spoil
        done = spoil.at if spoil.action == KILL_AFTER else spoil.at - 1
        assert newest(folder) == (3 if done >= turn else old), (spoil, outcome.spoilt)
        require_next_save_is_clean(folder)
        survived += 1
    every = "at every call of" if campaign else "at sampled calls of"
    record(1, f"kill -9 {every} {situation} ({whole.count} calls)", f"resumed {survived} of {len(plan)}")
