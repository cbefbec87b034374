"""The loader: any micro-batch by its number alone, and no picture left out at the end of an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.buckets import BucketPlan, plan_buckets
from lorasmith.engine.dataset.captions import sample_prompts
from lorasmith.engine.dataset.epochs import Epochs, epoch_batches
from lorasmith.engine.dataset.items import ImageItem
from lorasmith.engine.dataset.loader import Loader
from lorasmith.engine.objectives import mask_weights


def make_config(**sections: object) -> RunConfig:
    return RunConfig.model_validate({"captions": {"trigger": "zqx"}, **sections})


def make_plan(config: RunConfig, repeats: Sequence[float], regularization: int = 0) -> BucketPlan:
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
    return plan_buckets(items, config.dataset, seed=config.run.seed)


def make_loader(config: RunConfig, repeats: Sequence[float], regularization: int = 0) -> Loader:
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


CAPTIONS: list[dict[str, object]] = [
    {},
    {"dropout": 0.5},
    {"shuffle": True},
    {"tag_dropout": 0.5},
    {"prefix": "photo of", "suffix": "{red|blue}", "wildcards": True},
    {"prefix": "photo of", "suffix": "{red|blue}"},
]


@pytest.mark.parametrize("captions", CAPTIONS)
@pytest.mark.parametrize("num_micro", [1, 5, 40])
def test_all_captions_are_exactly_those_that_the_batches_ask_for(captions: dict[str, object], num_micro: int) -> None:
    config = make_config(captions={"trigger": "zqx", **captions}, train={"batch_size": 2})
    loader = make_loader(config, [1] * 11, regularization=2)
    asked = {caption for micro in range(num_micro) for caption in loader.batch(micro).captions}
    assert loader.epochs.all_captions(num_micro) == asked
    assert loader.epochs.all_captions(num_micro, len(asked)) == asked
    assert loader.epochs.all_captions(num_micro, len(asked) - 1) is None


@settings(max_examples=60, deadline=None)
@given(
    repeats=st.lists(st.sampled_from([1, 1.5, 2.25, 3, 1.1]), min_size=1, max_size=10),
    batch_size=st.integers(1, 5),
    crop=st.sampled_from(["center", "random"]),
    start=st.integers(0, 900),
)
def test_epochs_of_different_length_follow_one_another_without_a_gap(
    repeats: list[float], batch_size: int, crop: str, start: int
) -> None:
    config = make_config(train={"batch_size": batch_size}, dataset={"crop": crop, "buckets": False})
    plan = make_plan(config, repeats)
    expected = [(epoch, batch) for epoch in range(400) for batch in epoch_batches(plan, batch_size, 42, epoch)]
    epochs = Epochs(plan, config)
    # From any place, as a resumed run starts, and one after the other.
    for micro in range(start % len(expected), min(len(expected), start + 30)):
        assert (epochs.epoch_of(micro), epochs.micro_batch(micro).indices) == expected[micro]
    assert (epochs.epoch_of(0), epochs.micro_batch(0).indices) == expected[0]


def test_far_ahead_epochs_are_found_too() -> None:
    config = make_config(train={"batch_size": 2})
    plan = make_plan(config, [1.5, 1, 2.2])
    epochs = Epochs(plan, config)
    epoch = 3000
    before = sum(
        -(-sum(len(view.uses(e)) for view in plan.views if view.samples[0].bucket == bucket) // 2)
        for e in range(epoch)
        for bucket in {view.samples[0].bucket for view in plan.views}
    )
    assert (epochs.epoch_of(before - 1), epochs.epoch_of(before)) == (epoch - 1, epoch)
    assert epochs.micro_batch(before).indices == epoch_batches(plan, 2, 42, epoch)[0]


def test_uses_of_a_picture_are_counted_over_its_repeats_mirrors_resolutions_and_crops() -> None:
    config = make_config(dataset={"flip": True, "crop": "random", "buckets": False, "more_resolutions": [256]})
    epochs = Epochs(make_plan(config, [3, 1]), config)
    uses: dict[str, list[int]] = {}
    micro = 0
    while epochs.epoch_of(micro) == 0:
        batch = epochs.micro_batch(micro)
        for index, use in zip(batch.indices, batch.uses, strict=True):
            uses.setdefault(epochs._plan.samples[index].item.relative, []).append(use)
        micro += 1
    assert uses == {"000.png": list(range(3 * 2 * 2)), "001.png": list(range(2 * 2))}


def test_the_first_prompt_of_a_picture_is_its_sample_prompt() -> None:
    config = make_config(captions={"trigger": "zqx", "shuffle": True, "tag_dropout": 0.3}, train={"batch_size": 3})
    loader = make_loader(config, [2] * 7, regularization=2)
    items = [sample.item for sample in loader._samples]
    samples = {item.relative: text for item, text in sample_prompts(items, config.captions, config.run.seed, 7)}
    first: dict[str, str] = {}
    for micro in range(loader.batches_per_epoch):
        batch = loader.batch(micro)
        for index, caption in zip(batch.indices, batch.captions, strict=True):
            first.setdefault(items[index].relative, caption)
    assert first == samples


def test_the_order_of_captions_does_not_hang_on_the_batch_size() -> None:
    def prompts(batch_size: int) -> set[tuple[str, str]]:
        config = make_config(captions={"trigger": "zqx", "shuffle": True}, train={"batch_size": batch_size})
        loader = make_loader(config, [2] * 9)
        found = set()
        for micro in range(loader.batches_per_epoch):
            batch = loader.batch(micro)
            found |= {(loader._samples[i].item.relative, c) for i, c in zip(batch.indices, batch.captions, strict=True)}
        return found

    assert prompts(1) == prompts(4)


def test_masks_become_pixel_weights_and_pictures_without_one_count_everywhere() -> None:
    config = make_config(dataset={"buckets": False}, train={"batch_size": 4}, objective={"unmasked_weight": 0.2})
    plan = make_plan(config, [1] * 4)
    latents = {index: torch.zeros(4, 4, 4) for index in range(4)}
    half = torch.zeros(1, 4, 4, dtype=torch.uint8)
    half[:, :2] = 255
    batch = Loader(plan, latents, config, {2: half}).batch(0)
    assert batch.pixel_weights is not None
    assert batch.pixel_weights.shape == (4, 1, 4, 4)
    for row, index in zip(batch.pixel_weights, batch.indices, strict=True):
        assert torch.equal(row, mask_weights(half, 0.2) if index == 2 else torch.ones(1, 4, 4))


def test_batches_without_masks_carry_none() -> None:
    config = make_config(dataset={"buckets": False})
    plan = make_plan(config, [1] * 3)
    latents = {index: torch.zeros(4, 4, 4) for index in range(3)}
    assert all(Loader(plan, latents, config).batch(micro).pixel_weights is None for micro in range(3))
    mixed = Loader(plan, latents, config, {0: torch.full((1, 4, 4), 255, dtype=torch.uint8)})
    for micro in range(3):
        batch = mixed.batch(micro)
        assert (batch.pixel_weights is not None) == (batch.indices == (0,))
