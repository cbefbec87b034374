"""The loader: any micro-batch by its number alone, and no picture left out at the end of an epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.buckets import BucketPlan, plan_buckets
from lorasmith.engine.dataset.items import ImageItem
from lorasmith.engine.dataset.loader import Loader


def make_config(**sections: object) -> RunConfig:
    return RunConfig.model_validate({"captions": {"trigger": "zqx"}, **sections})


def make_plan(config: RunConfig, repeats: list[int], regularization: int = 0) -> BucketPlan:
    items = [
        ImageItem(
            path=Path(f"{number}.png"),
            relative=f"{number:03}.png",
            sha256=f"{number:064}",
            width=512 if number % 3 else 1024,
            height=512,
            repeats=count,
            captions=(f"tag{number}, a, b, c",),
            regularization=number < regularization,
        )
        for number, count in enumerate(repeats)
    ]
    return plan_buckets(items, config.dataset)


def make_loader(config: RunConfig, repeats: list[int], regularization: int = 0) -> Loader:
    plan = make_plan(config, repeats, regularization)
    latents = {
        sample.index: torch.full((4, sample.bucket.height // 8, sample.bucket.width // 8), float(sample.index))
        for sample in plan.samples
    }
    return Loader(plan, latents, config)


@settings(max_examples=60, deadline=None)
@given(
    repeats=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    batch_size=st.integers(1, 7),
    accumulation=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_every_picture_is_used_exactly_its_repeats_at_any_batch_size_and_accumulation(
    repeats: list[int], batch_size: int, accumulation: int, seed: int
) -> None:
    config = make_config(run={"seed": seed}, train={"batch_size": batch_size, "gradient_accumulation": accumulation})
    loader = Loader(make_plan(config, repeats), dict.fromkeys(range(len(repeats)), torch.zeros(1, 1, 1)), config)
    epochs = 3
    steps = -(-epochs * loader.batches_per_epoch // accumulation)
    used: list[Counter[int]] = [Counter() for _ in range(epochs + accumulation)]
    for step in range(steps):
        for part in range(accumulation):
            micro = step * accumulation + part
            used[loader.epoch_of(micro)].update(loader.batch(micro).indices)
    assert used[:epochs] == [Counter(dict(enumerate(repeats)))] * epochs
    assert (loader.steps_per_epoch - 1) * accumulation < loader.batches_per_epoch
    assert loader.batches_per_epoch <= loader.steps_per_epoch * accumulation


def test_a_batch_holds_the_latents_prompts_and_weights_of_its_samples() -> None:
    config = make_config(train={"batch_size": 4}, objective={"prior_weight": 0.5})
    loader = make_loader(config, [1] * 9, regularization=3)
    seen = set()
    for micro in range(loader.batches_per_epoch):
        batch = loader.batch(micro)
        assert batch.latents.dtype == batch.weights.dtype == torch.float32
        assert len(batch.latents) == len(batch.captions) == len(batch.indices) == len(batch.weights)
        assert batch.latents[:, 0, 0, 0].tolist() == [float(index) for index in batch.indices]
        for index, caption, weight in zip(batch.indices, batch.captions, batch.weights.tolist(), strict=True):
            item = loader._samples[index].item
            assert weight == (0.5 if item.regularization else 1.0)
            assert caption == (item.caption if item.regularization else f"zqx, {item.caption}")
            seen.add(index)
    assert seen == set(range(9))


def test_latents_of_half_precision_become_float32() -> None:
    config = make_config()
    loader = Loader(make_plan(config, [1]), {0: torch.ones(4, 8, 8, dtype=torch.bfloat16)}, config)
    assert loader.batch(0).latents.dtype == torch.float32


def test_a_batch_depends_on_its_number_alone() -> None:
    config = make_config(captions={"trigger": "zqx", "shuffle": True, "dropout": 0.2}, train={"batch_size": 2})
    ahead, jumping = make_loader(config, [2] * 7), make_loader(config, [2] * 7)
    numbers = list(range(40))
    expected = [(ahead.batch(number).indices, ahead.batch(number).captions) for number in numbers]
    for number in [*numbers[::-1], 3, 39, 0]:
        batch = jumping.batch(number)
        assert (batch.indices, batch.captions) == expected[number]


def test_epochs_differ_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        loader = make_loader(make_config(run={"seed": seed}), [1] * 20)
        return [loader.batch(epoch * loader.batches_per_epoch + number).indices for number in range(20)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_repeats_of_a_picture_are_captioned_anew() -> None:
    config = make_config(captions={"trigger": "zqx", "shuffle": True})
    loader = make_loader(config, [30])
    assert len({loader.batch(micro).captions[0] for micro in range(30)}) > 3


@pytest.mark.parametrize("captions", [{}, {"dropout": 0.5}, {"shuffle": True}])
@pytest.mark.parametrize("num_micro", [1, 5, 40])
def test_all_captions_are_exactly_those_that_the_batches_ask_for(captions: dict[str, object], num_micro: int) -> None:
    config = make_config(captions={"trigger": "zqx", **captions}, train={"batch_size": 2})
    loader = make_loader(config, [1] * 11, regularization=2)
    asked = {caption for micro in range(num_micro) for caption in loader.batch(micro).captions}
    assert loader.epochs.all_captions(num_micro) == asked
