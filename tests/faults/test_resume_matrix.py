"""Promise 5: a run that was cut continues as if nothing had happened, whatever is switched on and wherever it was cut.

Losses, learning rates, gradient norms, the bytes of adapter, optimizer and average, and the exported file are those of
the uncut run. Each start has nothing from the one before but the run folder: it loads the base model anew.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorasmith.engine.config import RunConfig
from lorasmith.engine.extension import apply_extension, plan_extension
from lorasmith.engine.run_file import parse_assignments
from lorasmith.engine.run_folder import RunFolder
from tests.engine.running import new_run
from tests.faults.fault_server import FaultServer
from tests.faults.resume_scenarios import (
    EVERYTHING,
    FACTORS,
    FURTHER_OPTIMIZERS,
    OPTIMIZERS,
    STEPS,
    Row,
    Told,
    Trace,
    covering_rows,
    import_engine,
    row_of,
    settings,
    trace,
    train,
    train_in_a_process_of_its_own,
    train_whole,
    train_with_cuts,
    uncovered,
)
from tests.faults.sampling import sampled

Record = Callable[[int, str, str], None]
SAMPLE_STEPS = 6
CUTS = {STEPS: [1, 13, 29], SAMPLE_STEPS: [3]}


@pytest.fixture(autouse=True, scope="module")
def _cheap_collections() -> Iterator[None]:
    """Keep what the tests have imported out of the collector's sight: each start collects twice."""
    with pytest.MonkeyPatch.context() as patch:
        gc.collect()
        gc.freeze()
        patch.setattr("lorasmith.engine.trainer.freeze_garbage", lambda: None)
        unfreeze = gc.unfreeze
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
    unfreeze()


def rows_of(optimizer: str, *, campaign: bool) -> list[Row]:
    rows = [row for row in covering_rows() if row["optimizer"] == optimizer]
    return rows if campaign else rows[:1]


def test_any_two_values_of_two_settings_meet_in_some_configuration() -> None:
    rows = covering_rows()
    assert not uncovered(rows)
    assert uncovered(rows[:-1])
    for row in EVERYTHING.values():
        assert row.keys() - {"kind"} == FACTORS.keys()
        assert all(row[name] in values for name, values in FACTORS.items())


@pytest.mark.parametrize("optimizer", sampled(OPTIMIZERS, ("adamw", "adamw8bit", "prodigy")))
def test_cut_runs_equal_uncut_ones(
    optimizer: str, campaign: bool, record: Record, tiny_sd15: Path, tmp_path: Path
) -> None:
    steps, rows = STEPS if campaign else SAMPLE_STEPS, rows_of(optimizer, campaign=campaign)
    cuts, equal = CUTS[steps], 0
    for number, row in enumerate(rows):
        config = settings(row, tiny_sd15, tmp_path / str(number), steps)
        _, whole = train_whole(config)
        assert sorted(whole.steps) == list(range(1, steps + 1))
        _, cut = train_with_cuts(config, cuts)
        assert cut.resumed_from == [0, *cuts]
        assert not cut.differs_from(whole), row
        equal += len(cuts)
    record(5, f"cuts with {optimizer}, any two settings together", f"{equal} of {len(rows) * len(cuts)} equal")


@pytest.mark.parametrize("optimizer", sampled(FURTHER_OPTIMIZERS, ("adamw_schedulefree", "dadaptation")))
def test_cut_runs_of_further_optimizers_equal_uncut_ones(
    optimizer: str, campaign: bool, record: Record, tiny_sd15: Path, tmp_path: Path
) -> None:
    steps = STEPS if campaign else SAMPLE_STEPS
    config = settings(row_of(optimizer), tiny_sd15, tmp_path, steps)
    _, whole = train_whole(config)
    _, cut = train_with_cuts(config, CUTS[steps])
    assert cut.resumed_from == [0, *CUTS[steps]]
    assert not cut.differs_from(whole)
    record(5, f"cuts with {optimizer}", f"{len(CUTS[steps])} of {len(CUTS[steps])} equal")


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_cut_of_a_run_with_everything_on(
    name: str, campaign: bool, record: Record, tiny_sd15: Path, tmp_path: Path
) -> None:
    steps = STEPS if campaign else SAMPLE_STEPS
    often = {"checkpoints": {"every": 1, "keep": steps}}
    config = settings(EVERYTHING[name], tiny_sd15, tmp_path, steps)
    _, whole = train_whole(config)
    saved, with_saves = train_whole(settings(EVERYTHING[name], tiny_sd15, tmp_path, steps, **often))
    # Saving itself changes nothing, so that each of its checkpoints is that of a cut there.
    assert not with_saves.differs_from(whole)
    cuts = list(range(1, steps)) if campaign else [steps - 1]
    for cut in cuts:
        resumed = resume_from(saved, cut, config)
        assert resumed.resumed_from == [cut]
        assert not resumed.differs_from(whole, since=cut), f"cut at {cut}"
    record(5, f"cuts at every step, {name}", f"{len(cuts)} of {len(cuts)} equal")


def resume_from(saved: RunFolder, step: int, config: RunConfig) -> Trace:
    """Go on from one checkpoint of another run."""
    run = new_run(config)
    name = f"step-{step:08d}"
    shutil.copytree(saved.checkpoints / name, run.checkpoints / name)
    return trace(run, config, train(config, run))


@pytest.mark.campaign
def test_three_resumes_in_a_row_each_in_a_process_of_its_own(
    campaign: bool, record: Record, tiny_sd15: Path, tmp_path: Path, faults: FaultServer
) -> None:
    steps = STEPS if campaign else SAMPLE_STEPS
    config = settings(EVERYTHING["everything on, fp32"], tiny_sd15, tmp_path, steps)
    cuts = [steps // 5, steps // 2, steps - 1]
    # The server has the engine imported and forks for each start: none has seen another's memory.
    faults.warm(import_engine)
    run, starts = new_run(config), []
    for cut in (*cuts, None):
        child = faults.run(train_in_a_process_of_its_own, str(run.path), cut)
        assert not child.error, child.trace
        resumed_from, told = child.value
        starts.append(Told(resumed_from, told))
    cut_run = trace(run, run.load_config().config, *starts)
    _, whole = train_whole(config)
    assert cut_run.resumed_from == [0, *cuts]
    assert not cut_run.differs_from(whole)
    record(5, "resumes in a row, each in a fresh process", f"{len(cuts)} of {len(cuts)} equal")


ROW = EVERYTHING["everything on, fp32"] | {"accumulation": 1, "kind": "lora", "text_encoder": False}


def extend(run: RunFolder, steps: int | None, *assignments: str) -> RunConfig:
    extension = plan_extension(run, steps, parse_assignments(assignments))
    apply_extension(run, extension)
    return run.load_config().config


def test_a_longer_run_by_extension_equals_one_that_was_planned_so_where_the_rate_is_constant(
    record: Record, tiny_sd15: Path, tmp_path: Path
) -> None:
    row = ROW | {"schedule": "constant"}
    run, first = train_whole(settings(row, tiny_sd15, tmp_path, 8))
    _, longer = train_whole(settings(row, tiny_sd15, tmp_path, 12))
    config = extend(run, 12)
    extended = trace(run, config, train(config, run))
    assert extended.resumed_from == [8]
    assert first.steps.items() <= longer.steps.items()
    assert {step: values for step, values in longer.steps.items() if step > 8} == extended.steps
    assert extended.state == longer.state
    record(5, "extension of a constant rate against one long run", "equal")


def test_an_extended_run_is_resumed_bit_for_bit(record: Record, tiny_sd15: Path, tmp_path: Path) -> None:
    run, before = train_whole(settings(ROW | {"schedule": "cosine"}, tiny_sd15, tmp_path, 8))
    config = extend(run, 14, "optimizer.learning_rate=0.0005", "schedule.warmup_steps=2")
    copy = RunFolder(run.path.with_name("copy"))
    shutil.copytree(run.path, copy.path)
    whole = trace(run, config, train(config, run))
    _, cut = train_with_cuts(config, [9, 12], copy)
    assert cut.resumed_from == [8, 9, 12]
    assert not cut.differs_from(whole)
    # The rate before stays what it was, and goes on as the extension said: 2 steps up, then a cosine to step 14.
    assert sorted(before.steps) == list(range(1, 9))
    rates = [whole.steps[step][1] for step in sorted(whole.steps)]
    assert rates[:3] == pytest.approx([0.00025, 0.0005, 0.0005])
    assert rates[4] == pytest.approx(0.00025)
    record(5, "cuts after an extension", "2 of 2 equal")
