"""Promise 1 for a whole run: killed at any file-system call, started again, it ends as if nothing had happened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.checkpoints import newest_checkpoint
from lorasmith.engine.events import RunEnded, StepsDone
from lorasmith.engine.journal import replay
from lorasmith.engine.run_folder import RunFolder, open_run
from lorasmith.engine.session import Session
from tests.engine.running import load_tiny, new_run, tiny_config
from tests.faults.fault_server import Fault, FaultServer, Spoil

Record = Callable[[int, str, str], None]
STARTS = 6
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


def moments(count: int, number: int) -> list[int]:
    """Return `number` calls spread over all `count`, the first and the last among them."""
    return sorted({1 + index * (count - 1) // (number - 1) for index in range(number)})


def test_a_run_that_is_killed_anywhere_ends_as_if_nothing_had_happened(
    faults: FaultServer, tiny_sd15: Path, tmp_path: Path, campaign: bool, record: Record
) -> None:
    faults.warm(warm_up, str(tiny_sd15))
    train = {"steps": 6, "log_every": 1}
    config = tiny_config(tiny_sd15, tmp_path, train=train, checkpoints={"every": 2, "keep": 2})
    run = new_run(config)
    shutil.copytree(run.path, tmp_path / "template")
    whole = faults.run(train_run, str(run.path))
    assert whole.error == "", whole.trace
    assert whole.value["outcome"] == "finished", whole.value
    expected = losses(run), last_weights(run)
    assert list(expected[0]) == [1, 2, 3, 4, 5, 6]
    plan = moments(whole.count, 40 if campaign else 5)
    for number in plan:
        cut = RunFolder(tmp_path / "runs" / f"cut-{number}")
        shutil.copytree(tmp_path / "template", cut.path)
        died = faults.run(train_run, str(cut.path), spoil=Spoil.kill(number))
        assert died.killed or died.count < number, died.trace
        resumed = faults.run(train_run, str(cut.path))
        assert resumed.error == "", resumed.trace
        assert resumed.value["outcome"] == "finished", resumed.value
        assert (losses(cut), last_weights(cut)) == expected, died.spoilt
        assert [event.outcome for event in replay(cut.journal) if isinstance(event, RunEnded)][-1] == "finished"
        require_no_orphans(cut)
        shutil.rmtree(cut.path)
    record(1, f"kill -9 of a whole run ({whole.count} calls)", f"ended like the uncut run {len(plan)} of {len(plan)}")


def require_no_orphans(run: RunFolder) -> None:
    names = [str(path.relative_to(run.path)) for path in run.path.rglob("*")]
    assert not [name for name in names if name.endswith(".tmp") or "/." in name or name.startswith(".")], names
    assert len(list(run.export.glob("*.safetensors"))) == 1


def test_a_run_that_is_killed_again_and_again_still_ends_the_same(
    faults: FaultServer, tiny_sd15: Path, tmp_path: Path, record: Record
) -> None:
    faults.warm(warm_up, str(tiny_sd15))
    config = tiny_config(tiny_sd15, tmp_path, train={"steps": 6, "log_every": 1}, checkpoints={"every": 1, "keep": 2})
    run = new_run(config)
    shutil.copytree(run.path, tmp_path / "template")
    whole = faults.run(train_run, str(run.path))
    expected = losses(run), last_weights(run)
    cut = RunFolder(tmp_path / "runs" / "cut")
    shutil.copytree(tmp_path / "template", cut.path)
    kills = 0
    for number in range(STARTS):
        # Each start gets a little further than a save, and dies at another call.
        kills += faults.run(train_run, str(cut.path), spoil=Spoil.kill(whole.count // 4 + 7 * number)).killed
    assert kills > 1
    assert faults.run(train_run, str(cut.path)).value["outcome"] == "finished"
    assert (losses(cut), last_weights(cut)) == expected
    require_no_orphans(cut)
    record(1, "one run killed again and again", f"ended like the uncut run after {kills} kills")
