"""Promise 1 for a whole run: killed at any file-system call, started again, it ends as if nothing had happened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.engine.checkpoints import newest_checkpoint
from lorasmith.engine.events import RunEnded, StepsDone
from lorasmith.engine.journal import replay
from lorasmith.engine.run_folder import RunFolder, open_run
from lorasmith.engine.session import Session
from tests.engine.running import load_tiny, new_run, tiny_config
from tests.faults.fault_server import Fault, FaultServer, Spoil

Record = Callable[[int, str, str], None]
SECONDS = 150.0


def train_run(fault: Fault, path: str) -> dict[str, Any]:
    """Start or resume the run as the program does: with its lock, its journal and a thread for the engine."""
    run = open_run(Path(path))
    session = Session(run, run.load_config().config)
    with fault.armed(run.path):
        session.start()
        ended = session.join(SECONDS)
    assert ended, "the run hangs"
    assert session.outcome is not None
    return {"outcome": session.outcome.outcome, "message": f"{session.outcome.message} {session.outcome.why}"}


def warm_up(base: str) -> None:
    """Import what a training imports."""
    import lorasmith.engine.trainer  # noqa: F401

    Image.init()
    load_tiny(Path(base))


def losses(run: RunFolder) -> dict[int, float]:
    """Return the loss of each step in the journal; a step that was done twice must have had the same one twice."""
    found: dict[int, float] = {}
    for event in replay(run.journal):
        if not isinstance(event, StepsDone):
            continue
        for step, loss in enumerate(event.losses, event.step - len(event.losses) + 1):
            assert found.setdefault(step, loss) == loss, f"step {step} had another loss after a resume"
    return found


def last_weights(run: RunFolder) -> tuple[bytes, bytes]:
    checkpoint = newest_checkpoint(run.checkpoints, lambda path, reason: pytest.fail(f"{path}: {reason}"))
    assert checkpoint is not None
    assert checkpoint.step == 6
    return (checkpoint.path / "adapter.safetensors").read_bytes(), (
        checkpoint.path / "optimizer.safetensors"
    ).read_bytes()


@dataclass(frozen=True)
class Uncut:
    """A run that nothing disturbed: its folder before the start, the calls of it, and what it learnt."""

    template: Path
    calls: list[tuple[str, str]]
    learnt: tuple[dict[int, float], tuple[bytes, bytes]]

    def copy(self, name: str) -> RunFolder:
        run = RunFolder(self.template.parent / name)
        shutil.copytree(self.template, run.path)
        return run


@pytest.fixture(scope="module")
def uncut(faults: FaultServer, tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Uncut:
    faults.warm(warm_up, str(tiny_sd15))
    folder = tmp_path_factory.mktemp("uncut")
    train = {"steps": 6, "log_every": 1}
    run = new_run(tiny_config(tiny_sd15, folder, train=train, checkpoints={"every": 2, "keep": 2}))
    shutil.copytree(run.path, folder / "template")
    whole = faults.run(train_run, str(run.path))
    assert whole.error == "", whole.trace
    assert whole.value["outcome"] == "finished", whole.value
    learnt = losses(run), last_weights(run)
    assert list(learnt[0]) == [1, 2, 3, 4, 5, 6]
    return Uncut(folder / "template", whole.calls, learnt)


def require_finish(faults: FaultServer, run: RunFolder, uncut: Uncut) -> None:
    """Start the run once more, and compare it with the one that nothing disturbed."""
    resumed = faults.run(train_run, str(run.path))
    assert resumed.error == "", resumed.trace
    assert resumed.value["outcome"] == "finished", resumed.value
    assert (losses(run), last_weights(run)) == uncut.learnt
    assert [event.outcome for event in replay(run.journal) if isinstance(event, RunEnded)][-1] == "finished"
    names = [str(path.relative_to(run.path)) for path in run.path.rglob("*")]
    assert not [name for name in names if name.endswith(".tmp") or "/." in name or name.startswith(".")], names
    assert len(list(run.export.glob("*.safetensors"))) == 1


def last_removal(uncut: Uncut) -> int:
    """Return the call in the middle of the last pruning: no later save cleans up behind that one."""
    return max(n for n, (name, path) in enumerate(uncut.calls, 1) if name == "unlinkat" and ".removing-" in path)


def moments(uncut: Uncut, number: int) -> list[int]:
    """Return `number` calls in the middle of as many equal parts of all, and one in the last pruning."""
    count = len(uncut.calls)
    return [*(1 + (2 * index + 1) * count // (2 * number) for index in range(number)), last_removal(uncut)]


def test_a_run_that_is_killed_anywhere_ends_as_if_nothing_had_happened(
    faults: FaultServer, uncut: Uncut, campaign: bool, record: Record
) -> None:
    plan = moments(uncut, 30 if campaign else 2)
    kills = 0
    for number in plan:
        run = uncut.copy(f"cut-{number}")
        died = faults.run(train_run, str(run.path), spoil=Spoil.kill(number))
        assert died.killed or died.count < number, died.trace
        kills += died.killed
        require_finish(faults, run, uncut)
        shutil.rmtree(run.path)
    assert kills >= len(plan) - 1
    record(1, f"kill -9 of a whole run of {len(uncut.calls)} calls", f"{kills} of {kills} ended like the uncut run")


def test_a_run_that_is_killed_again_and_again_still_ends_the_same(
    faults: FaultServer, uncut: Uncut, campaign: bool, record: Record
) -> None:
    run = uncut.copy("cut")
    kills = 0
    for number in range(6 if campaign else 2):
        # Late enough that the next start finds a newer checkpoint, and each time at another call.
        spoil = Spoil.kill(len(uncut.calls) // 2 + 7 * number)
        kills += faults.run(train_run, str(run.path), spoil=spoil).killed
    assert kills > 1
    require_finish(faults, run, uncut)
    record(1, "one run killed again and again", f"ended like the uncut run after {kills} kills")
