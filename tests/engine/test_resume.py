"""A run that was cut continues as if nothing had happened: losses, learning rates and weights are equal bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.engine.checkpoints import Checkpoint, newest_checkpoint
from lorasmith.engine.commands import Command
from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import CheckpointError
from lorasmith.engine.events import CheckpointSaved, Logged, RunEnded, RunStarted, StepsDone
from lorasmith.engine.run_folder import RunFolder
from tests.engine.running import RecordingHost, new_run, run_training, texts, tiny_config
from tests.tiny import tiny_pictures

EVERYTHING: dict[str, dict[str, Any]] = {
    "adapter": {"dropout": 0.3, "kind": "locon", "conv_rank": 2, "text_encoder": True},
    "captions": {"shuffle": True, "dropout": 0.2},
    "dataset": {"flip": True},
    "objective": {"min_snr_gamma": 5.0, "noise_offset": 0.1},
    "schedule": {"name": "cosine_restarts", "warmup_steps": 5},
}
DATASET: dict[str, dict[str, Any]] = {
    "captions": {
        "shuffle": True,
        "dropout": 0.1,
        "tag_dropout": 0.3,
        "wildcards": True,
        "lines": "choose",
        "prefix": "{photo|picture} of",
    },
    "dataset": {
        "flip": True,
        "crop": "random",
        "buckets": False,
        "more_resolutions": [128],
        "weights": [1.0, 1.5],
        "masks": "alpha",
        "alpha_background": "checker",
    },
    "objective": {"unmasked_weight": 0.2, "prior_weight": 0.5},
}
CASES: dict[str, tuple[tuple[int, ...], dict[str, dict[str, Any]]]] = {
    "adamw, everything random, accumulation 2": (
        (1, 7, 29),
        EVERYTHING | {"train": {"steps": 30, "gradient_accumulation": 2}},
    ),
    "everything of the dataset, accumulation 3": (
        (2, 5, 17),
        DATASET | {"train": {"steps": 20, "gradient_accumulation": 3}},
    ),
    "adamw8bit, LoRA+": ((6,), {"optimizer": {"name": "adamw8bit", "lora_plus_ratio": 4.0}, "adapter": {"rank": 64}}),
    "adafactor, linear": ((7,), {"optimizer": {"name": "adafactor"}, "schedule": {"name": "linear"}}),
    "prodigy, cosine, accumulation 2": (
        (9,),
        {
            "optimizer": {"name": "prodigy", "learning_rate": 1.0},
            "schedule": {"name": "cosine"},
            "train": {"gradient_accumulation": 2},
        },
    ),
    "lion, fp16 with its loss scale": ((4,), {"optimizer": {"name": "lion"}, "train": {"precision": "fp16"}}),
}


def last_checkpoint(run: RunFolder) -> Checkpoint:
    found = newest_checkpoint(run.checkpoints, lambda path, reason: pytest.fail(f"{path}: {reason}"))
    assert found is not None
    return found


def by_step(*hosts: RecordingHost) -> list[tuple[int, float]]:
    """Return (step, loss) in the order of the events."""
    pairs = []
    for event in [event for host in hosts for event in host.of(StepsDone)]:
        first = event.step - len(event.losses) + 1
        pairs += list(zip(range(first, event.step + 1), event.losses, strict=True))
    return pairs


def rate_of(host: RecordingHost) -> dict[int, float]:
    return {event.step: event.learning_rate for event in host.of(StepsDone)}


def odd_dataset(folder: Path) -> dict[str, Any]:
    """Write two datasets and regularization pictures with captions of several lines, masks and transparency."""
    lines = ["a circle, red, {big|small}\na ball", "a ball, blue\na toy, {red|blue}, round, old"]
    tiny_pictures(folder / "pictures", 3, sizes=((160, 128), (128, 160)), captions=lines)
    more = tiny_pictures(folder / "more", 3, sizes=((300, 128),), captions=lines)
    tiny_pictures(folder / "regular", 1, sizes=((130, 140),))
    with Image.open(more[0]) as picture:
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(more[0])
    mask = Image.linear_gradient("L").rotate(90).resize((300, 128))
    mask.save(folder / "more" / "01-masklabel.png")
    return {"more_folders": [str(folder / "more")], "regularization_folder": str(folder / "regular")}


@pytest.mark.parametrize("case", CASES)
def test_a_cut_run_equals_the_uncut_one(case: str, tiny_sd15: Path, tmp_path: Path) -> None:
    cuts, sections = CASES[case]
    if sections.get("dataset", {}).get("weights"):
        sections = sections | {"dataset": sections["dataset"] | odd_dataset(tmp_path)}
    train = {"steps": 12, "log_every": 1} | sections.get("train", {})
    config = tiny_config(tiny_sd15, tmp_path, **(sections | {"train": train}))
    whole_run, whole = run_training(config)
    cut_run = new_run(config)
    hosts = []
    for cut in (*cuts, None):
        host = RecordingHost(at={} if cut is None else {cut: [Command.STOP]})
        run_training(config, host, cut_run)
        hosts.append(host)
    assert [host.of(RunStarted)[0].resumed_from for host in hosts] == [0, *cuts]
    assert by_step(*hosts) == by_step(whole)
    assert [step for step, _ in by_step(whole)] == list(range(1, config.train.steps + 1))
    assert {step: rate for host in hosts for step, rate in rate_of(host).items()} == rate_of(whole)
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        assert (last_checkpoint(cut_run).path / name).read_bytes() == (
            last_checkpoint(whole_run).path / name
        ).read_bytes()
    exports = [next(run.export.glob("*.safetensors")) for run in (whole_run, cut_run)]
    assert weights_of(exports[0]) == weights_of(exports[1])


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
