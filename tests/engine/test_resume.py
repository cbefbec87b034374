"""What a resumed run may have different and what not; `tests/faults/test_resume_matrix.py` has its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.engine.commands import Command
from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import CheckpointError
from lorasmith.engine.events import CheckpointSaved, Logged, RunEnded, RunStarted, StepsDone
from lorasmith.engine.run_folder import RunFolder
from tests.engine.running import RecordingHost, run_training, texts, tiny_config
from tests.tiny import tiny_pictures


def by_step(*hosts: RecordingHost) -> list[tuple[int, float]]:
    """Return (step, loss) in the order of the events."""
    pairs = []
    for event in [event for host in hosts for event in host.of(StepsDone)]:
        first = event.step - len(event.losses) + 1
        pairs += list(zip(range(first, event.step + 1), event.losses, strict=True))
    return pairs


def weights_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def stopped_run(base: Path, folder: Path, **sections: dict[str, Any]) -> tuple[RunFolder, RunConfig]:
    config = tiny_config(base, folder, train={"steps": 6, "log_every": 1}, **sections)
    run, _ = run_training(config, RecordingHost(at={4: [Command.STOP]}))
    return run, config


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    values = config.model_dump()
    for name, section in sections.items():
        values[name] |= section
    return RunConfig.model_validate(values)


def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_used(tiny_sd15: Path, tmp_path: Path) -> None:
    run, config = stopped_run(tiny_sd15, tmp_path, checkpoints={"every": 2})
    damaged = run.checkpoints / "step-00000004" / "adapter.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    _, host = run_training(config, run=run)
    assert host.of(RunStarted)[0].resumed_from == 2
    warning = texts([event for event in host.of(Logged) if event.severity == "warning"])
    assert "step-00000004" in warning
    assert "SHA-256 differs" in warning
    assert host.of(RunEnded)[0].outcome == "finished"
    # Saved again where the damaged one was, which was moved aside.
    assert [event.step for event in host.of(CheckpointSaved)] == [4, 6]


def test_where_every_checkpoint_is_damaged_nothing_begins_anew_unasked(tiny_sd15: Path, tmp_path: Path) -> None:
    run, config = stopped_run(tiny_sd15, tmp_path)
    (run.checkpoints / "step-00000004" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="Every checkpoint"):
        run_training(config, run=run)


def test_settings_that_alter_training_are_refused_with_their_names(tiny_sd15: Path, tmp_path: Path) -> None:
    run, config = stopped_run(tiny_sd15, tmp_path)
    other = changed(config, optimizer={"learning_rate": 2e-3}, train={"steps": 9})
    with pytest.raises(CheckpointError, match="other settings") as caught:
        run_training(other, run=run)
    assert "optimizer.learning_rate (0.001 → 0.002)" in caught.value.why
    assert "train.steps (6 → 9)" in caught.value.why


def test_settings_that_do_not_alter_training_may_change(tiny_sd15: Path, tmp_path: Path) -> None:
    run, config = stopped_run(tiny_sd15, tmp_path)
    other = changed(
        config, train={"log_every": 2}, checkpoints={"every": 1}, previews={"seeds": [5]}, export={"precision": "fp32"}
    )
    _, host = run_training(other, run=run)
    assert [step for step, _ in by_step(host)] == [5, 6]


def test_a_changed_mask_is_a_changed_dataset(tiny_sd15: Path, tmp_path: Path) -> None:
    tiny_config(tiny_sd15, tmp_path)
    mask = tmp_path / "pictures" / "00-masklabel.png"
    Image.new("L", (64, 64), 200).save(mask)
    run, config = stopped_run(tiny_sd15, tmp_path)
    Image.new("L", (64, 64), 100).save(mask)
    with pytest.raises(CheckpointError, match="dataset has changed"):
        run_training(config, run=run)


def test_further_datasets_may_move_too(tiny_sd15: Path, tmp_path: Path) -> None:
    tiny_pictures(tmp_path / "here" / "more", 2)
    run, config = stopped_run(tiny_sd15, tmp_path, dataset={"more_folders": [str(tmp_path / "here" / "more")]})
    (tmp_path / "here").rename(tmp_path / "there")
    moved = changed(config, dataset={"more_folders": [str(tmp_path / "there" / "more")]})
    _, host = run_training(moved, run=run)
    assert host.of(RunEnded)[0].outcome == "finished"


def test_a_changed_dataset_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    run, config = stopped_run(tiny_sd15, tmp_path)
    (tmp_path / "pictures" / "00.txt").write_text("another caption")
    with pytest.raises(CheckpointError, match="dataset has changed"):
        run_training(config, run=run)


def test_a_dataset_that_only_moved_is_accepted(tiny_sd15: Path, tmp_path: Path) -> None:
    run, config = stopped_run(tiny_sd15, tmp_path)
    (tmp_path / "pictures").rename(tmp_path / "moved")
    tiny_pictures(tmp_path / "pictures", 1)
    _, host = run_training(changed(config, dataset={"folder": str(tmp_path / "moved")}), run=run)
    assert host.of(RunEnded)[0].outcome == "finished"


def test_a_finished_run_only_exports_again(tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_sd15, tmp_path)
    run, first = run_training(config)
    before = next(run.export.iterdir()).read_bytes()
    _, second = run_training(config, run=run)
    assert not second.of(StepsDone)
    assert weights_of(next(run.export.iterdir())) == before[8 + int.from_bytes(before[:8], "little") :]
    assert second.of(RunEnded)[0].step == first.of(RunEnded)[0].step == 4
