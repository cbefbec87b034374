"""Extending a run is an action of its own: it says how the schedule goes on, and changes nothing of what was learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from lorasmith.engine import extension
from lorasmith.engine.checkpoints import newest_checkpoint, save_checkpoint
from lorasmith.engine.config import RunConfig, ScheduleSettings
from lorasmith.engine.errors import CheckpointError, ConfigError, RunLockedError
from lorasmith.engine.extension import Extension, apply_extension, plan_extension
from lorasmith.engine.lr_schedules import lr_factor
from lorasmith.engine.resume import find_checkpoint, settings_before
from lorasmith.engine.run_file import Layer, parse_assignments, resolve_config
from lorasmith.engine.run_folder import RunFolder, create_run
from lorasmith.engine.run_lock import RunLock

COSINE: dict[str, Any] = {"schedule": {"name": "cosine"}, "train": {"steps": 1000}}


def run_at(folder: Path, *steps: int, **sections: dict[str, Any]) -> RunFolder:
    """Make a run with an intact checkpoint, without tensors, at each of `steps`."""
    values = {"run": {"output_folder": str(folder)}, **COSINE}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    run = create_run(resolve_config([Layer("test", values)]))
    for step in steps:
        save(run, step)
    return run


def save(run: RunFolder, step: int) -> Path:
    config = run.load_config().config.model_dump(mode="json")
    return save_checkpoint(run.checkpoints, step, {"adapter": {}}, {"config": config})


def plan(run: RunFolder, steps: int | None = None, *assignments: str) -> Extension:
    return plan_extension(run, steps, parse_assignments(assignments) if assignments else None)


def no_warning(message: str) -> None:
    raise AssertionError(message)


def starts_at(run: RunFolder) -> int:
    """Return the step that the next start of the run begins after."""
    checkpoint = find_checkpoint(run.checkpoints, run.load_config().config, no_warning)
    assert checkpoint is not None
    return checkpoint.step


def rates(config: RunConfig) -> list[float]:
    return [
        config.optimizer.learning_rate * lr_factor(config.schedule, step, config.train.steps)
        for step in range(config.train.steps)
    ]


def test_a_finished_run_is_told_in_plain_sentences_how_it_goes_on(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1000)
    (run.export / "my-lora.safetensors").write_bytes(b"")
    assert plan(run, 1500).words == [
        "Steps 1 to 1000 stay as they were; weights and optimizer go on from the checkpoint of step 1000.",
        "From step 1001 the cosine begins anew at 0.0001 and ends at step 1500; until now the rate ended at 2.5e-10 at "
        "step 1000.",
        "The rate goes from 2.47e-10 in step 1000 to 0.0001 in step 1001.",
        f"At the end my-lora.safetensors in {run.export} is written anew; copy it to keep what it is now.",
    ]


def test_a_stopped_run_is_told_what_its_schedule_would_have_done(tmp_path: Path) -> None:
    words = " ".join(plan(run_at(tmp_path, 500), 1500).words)
    assert "From step 501 the cosine begins anew at 0.0001 and ends at step 1500" in words
    assert "until now the rate would have ended at 2.5e-10 at step 1000" in words
    assert "from 5.02e-05 in step 500 to 0.0001 in step 501" in words


def test_a_constant_rate_simply_goes_on(tmp_path: Path) -> None:
    words = plan(run_at(tmp_path, 500, schedule={"name": "constant", "warmup_steps": 50}), 1500).words
    assert words[1:] == [
        "From step 501 the rate is constant at 0.0001 and ends at step 1500; until now the rate was to stay at 0.0001 "
        "to step 1000.",
        "There is no warm-up, since the rate does not rise (schedule.warmup_steps was 50).",
    ]


def test_a_lower_learning_rate_needs_no_more_steps(tmp_path: Path) -> None:
    run = run_at(tmp_path, 900, schedule={"name": "constant", "warmup_steps": 200})
    extension = plan(run, None, "optimizer.learning_rate=5e-5")
    assert (extension.config.train.steps, extension.config.schedule.warmup_steps) == (1000, 0)
    apply_extension(run, extension)
    assert starts_at(run) == 900
    assert run.load_config().config == extension.config


def test_the_planned_schedule_is_the_one_that_is_trained(tmp_path: Path) -> None:
    before = rates(run_at(tmp_path, 600).load_config().config)
    after = rates(plan(run_at(tmp_path, 600), 900, "schedule.name=linear", "schedule.warmup_steps=30").config)
    assert after[600:630] == pytest.approx([1e-4 * (i + 1) / 30 for i in range(30)])
    assert after[630] == 1e-4
    assert after[899] == pytest.approx(1e-4 / 270)
    assert len(after) == 900
    assert before[599] < 1e-4


def test_a_warm_up_that_does_not_fit_any_more_is_shortened(tmp_path: Path) -> None:
    extension = plan(run_at(tmp_path, 1000, schedule={"warmup_steps": 100}), 1050)
    assert extension.config.schedule.warmup_steps == 5
    assert "The warm-up is shortened from 100 to 5 of the 50 steps that are left." in extension.words


def test_a_warm_up_that_was_asked_for_is_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps \(60\) must be smaller than the 50 steps after"):
        plan(run_at(tmp_path, 1000), 1050, "schedule.warmup_steps=60")


def test_planning_writes_nothing_and_applying_keeps_the_old_run_file(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1000)
    before = run.run_file.read_text()
    extension = plan(run, 1500)
    assert run.run_file.read_text() == before
    apply_extension(run, extension)
    assert settings_before(run.path, 1000).read_text() == before
    after = run.run_file.read_text()
    changed = [(old, new) for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    origin = "# from the extension at step 1000"
    assert [new for _, new in changed] == [f"start_step = 1000 {origin}", f"steps = 1500 {origin}"]
    assert [path.stat().st_mode & 0o777 for path in (run.run_file, settings_before(run.path, 1000))] == [0o600] * 2


def test_a_second_plan_for_the_same_step_replaces_the_first(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1000)
    original = run.run_file.read_text()
    apply_extension(run, plan(run, 1500))
    apply_extension(run, plan(run, 1200, "optimizer.learning_rate=1e-5"))
    assert settings_before(run.path, 1000).read_text() == original
    assert starts_at(run) == 1000
    assert run.load_config().config.train.steps == 1200


def test_a_run_is_extended_again_and_again(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1000)
    for step, more in ((1000, 1500), (1500, 1800)):
        apply_extension(run, plan(run, more))
        assert starts_at(run) == step
        save(run, more)
    assert "until now the rate ended at 2.7e-09 at step 1800" in plan(run, 2000).words[1]
    assert sorted(path.name for path in run.path.glob("run.toml.*")) == ["run.toml.before-1000", "run.toml.before-1500"]


def test_what_was_learnt_cannot_be_learnt_otherwise_afterwards(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1000)
    for key, value in (
        ("adapter.rank", "8"),
        ("train.ema_decay", "0.9"),
        ("optimizer.name", "lion"),
        ("run.seed", "1"),
    ):
        with pytest.raises(ConfigError, match=f"cannot change {key}"):
            plan(run, 1500, f"{key}={value}")
    with pytest.raises(ConfigError, match="not yours to set"):
        plan(run, 1500, "schedule.start_step=3")


def test_other_settings_that_change_are_named(tmp_path: Path) -> None:
    words = plan(run_at(tmp_path, 10), None, "optimizer.weight_decay=0.1", "train.precision=fp32").words
    assert words[-2:] == [
        "optimizer.weight_decay changes from 0.01 to 0.1.",
        "train.precision changes from auto to fp32.",
    ]


def test_an_extension_needs_steps_to_train(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1000)
    for steps in (None, 1000, 400):
        with pytest.raises(ConfigError, match="reached step 1000 already"):
            plan(run, steps)


def test_a_run_without_a_checkpoint_cannot_be_extended(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    with pytest.raises(CheckpointError, match="nothing to extend") as caught:
        plan(run, 1500)
    assert caught.value.why == "None was saved yet."
    (save(run, 5) / "state.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        plan(run, 1500)
    assert "step-00000005 (state.json is missing)" in caught.value.why


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_extended(tmp_path: Path) -> None:
    run = run_at(tmp_path, 750, 1000)
    damage(run, 1000)
    extension = plan(run, 1500)
    assert extension.checkpoint_step == 750
    assert "step-00001000" in extension.words[0]
    assert "is damaged and is not used" in extension.words[0]
    assert extension.words[1].startswith("Steps 1 to 750 stay as they were")


def damage(run: RunFolder, step: int) -> None:
    state = run.checkpoints / f"step-{step:08d}" / "state.json"
    state.write_bytes(state.read_bytes()[:-1] + b" ")


def test_an_extension_whose_starting_checkpoint_is_damaged_is_refused(tmp_path: Path) -> None:
    run = run_at(tmp_path, 750, 1000)
    apply_extension(run, plan(run, 1500))
    damage(run, 1000)
    with pytest.raises(CheckpointError, match="extended at step 1000, but its checkpoint of that step is damaged") as e:
        find_checkpoint(run.checkpoints, run.load_config().config, lambda warning: None)
    assert "of step 750, is from before" in e.value.why
    assert f"lorasmith runs extend {run.path}" in e.value.fix
    # Both ways out work.
    apply_extension(run, plan(run, 1500))
    warnings: list[str] = []
    checkpoint = find_checkpoint(run.checkpoints, run.load_config().config, warnings.append)
    assert checkpoint is not None
    assert checkpoint.step == 750
    assert "step-00001000" in warnings[0]
    settings_before(run.path, 1000).replace(run.run_file)
    checkpoint = find_checkpoint(run.checkpoints, run.load_config().config, warnings.append)
    assert checkpoint is not None
    assert checkpoint.step == 750


def test_an_extended_run_without_its_checkpoints_does_not_begin_anew_unasked(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1000)
    apply_extension(run, plan(run, 1500))
    checkpoint = newest_checkpoint(run.checkpoints, lambda *_: None)
    assert checkpoint is not None
    checkpoint.path.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint any more"):
        find_checkpoint(run.checkpoints, run.load_config().config, no_warning)


def test_a_checkpoint_that_was_damaged_between_plan_and_start_is_refused(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1000)
    extension = plan(run, 1500)
    damage(run, 1000)
    before = run.run_file.read_text()
    with pytest.raises(CheckpointError, match="step-00001000 cannot be used"):
        apply_extension(run, extension)
    assert run.run_file.read_text() == before


def test_a_run_that_somebody_trains_is_not_extended(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1000)
    extension = plan(run, 1500)
    lock = RunLock(run)
    with pytest.raises(RunLockedError):
        apply_extension(run, extension)
    lock.release()
    apply_extension(run, extension)
    assert starts_at(run) == 1000


def test_a_run_file_that_changed_since_the_plan_is_not_overwritten(tmp_path: Path) -> None:
    run = run_at(tmp_path, 1000)
    extension = plan(run, 1500)
    run.run_file.write_text(run.run_file.read_text() + "# mine\n")
    with pytest.raises(ConfigError, match="changed meanwhile"):
        apply_extension(run, extension)


def test_a_run_that_was_rolled_back_to_its_very_start_may_get_another_rate(tmp_path: Path) -> None:
    run = run_at(tmp_path, 0, schedule={"warmup_steps": 10})
    extension = plan(run, None, "optimizer.learning_rate=1e-5")
    assert extension.words[0] == "Nothing was learnt yet: the run begins at step 1."
    assert extension.config.schedule.warmup_steps == 10
    apply_extension(run, extension)
    assert starts_at(run) == 0


def test_checkpoints_of_older_versions_without_the_new_settings_are_resumed(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    old = run.load_config().config.model_dump(mode="json")
    del old["train"]["ema_decay"], old["schedule"]["start_step"], old["run"]["on_finish"]
    save_checkpoint(run.checkpoints, 40, {"adapter": {}}, {"config": old})
    assert starts_at(run) == 40
    apply_extension(run, plan(run, 2000))
    assert starts_at(run) == 40


def test_every_schedule_has_words_for_how_it_goes_on() -> None:
    assert set(extension._SHAPES) == set(get_args(ScheduleSettings.model_fields["name"].annotation))
