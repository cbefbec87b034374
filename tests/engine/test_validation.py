"""Held-out pictures: which they are, that training never sees them, and that measuring them leaves no trace."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.engine.checkpoints import load_checkpoint
from lorasmith.engine.commands import Command
from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.items import Dataset, ImageItem
from lorasmith.engine.errors import DatasetError
from lorasmith.engine.events import (
    CheckpointSaved,
    DatasetReady,
    Logged,
    PreviewReady,
    StepsDone,
    Validated,
    from_record,
    to_record,
)
from lorasmith.engine.holdout import plan_held_out, require_pictures, split
from lorasmith.engine.journal import Journal, replay
from lorasmith.engine.learner import Learner
from lorasmith.engine.run_setup import read_dataset
from lorasmith.engine.validation import Validator, noise_levels
from tests.engine.running import RecordingHost, run_training, texts, tiny_config
from tests.engine.test_trainer import names, tiny_learner

VALIDATION = {"every": 2, "share": 0.4, "levels": 3}


def item(content: str, *, regularization: bool = False, copy: int = 0) -> ImageItem:
    name = f"{content}-{copy}.png"
    return ImageItem(Path(name), name, content, 64, 64, captions=(content,), regularization=regularization)


def dataset(*items: ImageItem) -> Dataset:
    return Dataset(Path("."), items, (), len(items))


def settings(**validation: Any) -> RunConfig:
    seed = validation.pop("seed", 1)
    return RunConfig.model_validate({"run": {"seed": seed}, "validation": {"every": 10, **validation}})


@given(st.integers(2, 60), st.floats(0.01, 0.5), st.integers(1, 20), st.integers(0, 5))
def test_the_share_is_held_out_and_nothing_is_in_both_parts(number: int, share: float, most: int, seed: int) -> None:
    everything = dataset(*(item(f"picture {index}") for index in range(number)))
    training, held_out = split(everything, settings(share=share, max_pictures=most, seed=seed))
    assert len(held_out) == min(max(1, round(share * number)), most, number - 1)
    assert {i.sha256 for i in held_out} | {i.sha256 for i in training.items} == {i.sha256 for i in everything.items}
    assert not {i.sha256 for i in held_out} & {i.sha256 for i in training.items}
    assert [i for i in everything.items if i in training.items] == list(training.items)


@given(st.integers(4, 60), st.integers(0, 5))
def test_a_picture_that_is_added_moves_at_most_one(number: int, seed: int) -> None:
    config = settings(share=0.25, seed=seed)
    before, after = (
        {i.sha256 for i in split(dataset(*(item(f"picture {index}") for index in range(count))), config)[1]}
        for count in (number, number + 1)
    )
    assert len(before - after) <= 1


def test_copies_are_held_out_together_and_regularization_pictures_never() -> None:
    everything = dataset(
        *(item(f"picture {index}", copy=copy) for index in range(6) for copy in range(2)),
        *(item(f"regular {index}", regularization=True) for index in range(20)),
    )
    training, held_out = split(everything, settings(share=0.5))
    assert len(held_out) == 3
    assert not any(i.regularization for i in held_out)
    assert sum(i.regularization for i in training.items) == 20
    assert len(training.items) == 20 + 6


def test_another_seed_holds_out_others_and_no_validation_none() -> None:
    everything = dataset(*(item(f"picture {index}") for index in range(40)))
    one, other = (split(everything, settings(seed=seed))[1] for seed in (1, 2))
    assert set(one) != set(other)
    assert split(everything, RunConfig()) == (everything, ())


def test_a_single_picture_is_never_held_out_and_a_run_says_so() -> None:
    everything = dataset(item("alone"), item("regular", regularization=True))
    training, held_out = split(everything, settings())
    assert training == everything
    with pytest.raises(DatasetError, match="no picture to validate on"):
        require_pictures(held_out, settings())
    require_pictures(held_out, RunConfig())


def test_held_out_pictures_are_measured_once_unmirrored_and_with_their_own_prompt() -> None:
    config = RunConfig.model_validate(
        {
            "dataset": {"flip": True, "crop": "random", "more_resolutions": [768]},
            "captions": {"trigger": "zqx", "dropout": 1.0},
            "validation": {"every": 1},
        }
    )
    wide = dataclasses.replace(item("wide"), width=700, height=512)
    held = plan_held_out((wide, item("other")), config, 8, first_index=50)
    assert [sample.index for sample in held.samples] == [50, 51]
    assert not any(sample.flipped or sample.offset != (0.5, 0.5) for sample in held.samples)
    assert held.prompts == ("zqx, other", "zqx, wide")


def test_levels_are_the_middles_of_equal_parts() -> None:
    assert noise_levels(5) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert noise_levels(1) == [0.5]


@pytest.fixture(scope="module")
def learner(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    folder = tmp_path_factory.mktemp("validation")
    return tiny_learner(
        tiny_config(
            tiny_sd15,
            folder,
            adapter={"rank": 2, "dropout": 0.5},
            optimizer={"name": "adamw_schedulefree", "learning_rate": 0.05},
            validation=VALIDATION,
        )
    )


def measured(learner: Learner) -> list[float]:
    assert learner.held_out is not None
    losses = Validator(learner, learner.held_out).measure()
    assert losses is not None
    return losses


def test_measuring_leaves_no_trace_and_gives_the_same_each_time(learner: Learner) -> None:
    state, weights = torch.get_rng_state(), learner.adapter.state_dict()
    first = measured(learner)
    assert len(set(first)) == 3
    assert measured(learner) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[key]) for key, value in learner.adapter.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.adapter.parameters())
    assert all(dropout.training for dropout in learner.adapter.dropouts)


def test_the_loss_is_that_of_each_picture_alone_with_the_weights_that_are_shown(learner: Learner) -> None:
    held = learner.held_out
    assert held is not None
    assert len(held.samples) == 2
    for step in range(3):
        learner.run_step(step)
    learner.adapter.train(False)
    expected = []
    with torch.no_grad(), learner.averaged():
        for level in noise_levels(3):
            losses = []
            for sample, prompt in zip(held.samples, held.prompts, strict=True):
                assert learner.conditionings is not None
                latents = held.latents[sample.index][None].float()
                noisy = learner.objective.at(latents, level, [int(sample.item.sha256[:15], 16)])
                text = learner.family.collate([learner.conditionings[prompt]])
                prediction = learner.family.predict(noisy.noisy, noisy.timesteps, text)
                losses.append((prediction - noisy.target).square().mean())
            expected.append(torch.stack(losses).mean().item())
    learner.adapter.train()
    assert measured(learner) == pytest.approx(expected, rel=1e-4)


def test_a_stop_ends_the_measuring(learner: Learner) -> None:
    assert learner.held_out is not None
    assert Validator(learner, learner.held_out).measure(lambda: True) is None


def test_training_never_sees_a_held_out_picture(tiny_sd15: Path, tmp_path: Path) -> None:
    host = RecordingHost()
    material = read_dataset(tiny_config(tiny_sd15, tmp_path, validation=VALIDATION), 8, host.emit)
    trained = {sample.item.sha256 for sample in material.plan.samples}
    held = {sample.item.sha256 for sample in material.held_out.samples}
    assert (len(trained), len(held)) == (3, 2)
    assert not trained & held
    assert host.of(DatasetReady)[0].images == 3
    told = texts(host.of(Logged))
    assert all(sample.item.relative in told for sample in material.held_out.samples)


def test_a_run_validates_between_save_and_preview_and_at_its_ends(tiny_sd15: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_sd15,
        tmp_path,
        validation=VALIDATION,
        checkpoints={"every": 2},
        previews={"every": 2, "prompts": ["a"], "steps": 1},
    )
    _, host = run_training(config)
    assert names(host, StepsDone, CheckpointSaved, Validated, PreviewReady) == [
        "Validated",
        *["StepsDone", "CheckpointSaved", "Validated", "PreviewReady"] * 2,
    ]
    told = host.of(Validated)
    assert [event.step for event in told] == [0, 2, 4]
    assert {(event.pictures, len(event.losses)) for event in told} == {(2, 3)}
    assert len({tuple(event.losses) for event in told}) == 3
    assert told[0].mean == pytest.approx(sum(told[0].losses) / 3)
    assert from_record(to_record(told[0])) == told[0]


def test_the_journal_keeps_validations_numbers_or_not(tmp_path: Path) -> None:
    told = Validated(step=5, levels=[0.25, 0.75], losses=[0.5, math.inf], pictures=2)
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(told)
    journal.close()
    assert list(replay(tmp_path / "journal.jsonl")) == [told]


def test_validation_changes_no_bit_of_what_is_trained_and_a_resumed_run_continues_its_curve(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    def config(**validation: Any) -> RunConfig:
        return tiny_config(
            tiny_sd15,
            tmp_path,
            validation={**VALIDATION, **validation},
            adapter={"rank": 2, "dropout": 0.3},
            optimizer={"name": "prodigy_schedulefree", "learning_rate": 1.0},
        )

    often, whole = run_training(config(every=1))
    seldom, _ = run_training(config(every=4))
    run, first = run_training(config(every=1), RecordingHost(at={2: [Command.STOP]}))
    _, second = run_training(config(every=1), run=run)
    for name in ("adapter", "optimizer", "ema"):
        kept = [load_checkpoint(each.checkpoints, 4).tensors(name) for each in (often, seldom, run)]
        assert all(torch.equal(value, other[key]) for other in kept[1:] for key, value in kept[0].items())
    curve = {event.step: event.losses for host in (first, second) for event in host.of(Validated)}
    assert curve == {event.step: event.losses for event in whole.of(Validated)}
    assert sorted(curve) == [0, 1, 2, 3, 4]


def test_a_validation_that_fails_is_a_warning(tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Validator, "measure", fail)
    _, host = run_training(tiny_config(tiny_sd15, tmp_path, validation={"every": 4}))
    assert "No validation at step 4, training goes on: no memory" in texts(host.of(Logged))
    assert not host.of(Validated)
    assert host.losses()
