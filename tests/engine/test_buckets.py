"""Aspect buckets: sizes that the model takes, nothing dropped, and an order that follows from the seed."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.buckets import Bucket, bucket_sizes, epoch_batches, fit_picture, plan_buckets
from lorasmith.engine.dataset.items import ImageItem

sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 4))
resolutions = st.sampled_from([64, 256, 512, 768, 1024])


def make_item(
    number: int, width: int, height: int, repeats: int = 1, caption: str | None = "x", regularization: bool = False
) -> ImageItem:
    name = f"{number:04}.png"
    digest = hashlib.sha256(name.encode()).hexdigest()
    return ImageItem(
        Path(name),
        name,
        digest,
        width,
        height,
        repeats,
        captions=() if caption is None else (caption,),
        regularization=regularization,
    )


def make_items(facts: list[tuple[int, int, int]]) -> list[ImageItem]:
    return [make_item(number, *fact) for number, fact in enumerate(facts)]


@settings(deadline=None)
@given(
    facts=st.lists(sizes, min_size=1, max_size=30),
    batch_size=st.integers(1, 9),
    resolution=resolutions,
    flip=st.booleans(),
    buckets=st.booleans(),
    epoch=st.integers(0, 3),
    repeats=st.integers(1, 3),
)
def test_every_picture_is_used_exactly_its_repeats_in_every_epoch(
    facts: list[tuple[int, int, int]],
    batch_size: int,
    resolution: int,
    flip: bool,
    buckets: bool,
    epoch: int,
    repeats: int,
) -> None:
    settings = DatasetSettings(resolution=resolution, flip=flip, buckets=buckets)
    plan = plan_buckets(make_items(facts), settings)
    assert [sample.index for sample in plan.samples] == list(range(len(facts) * (2 if flip else 1)))
    batches = epoch_batches(plan, batch_size, 1, epoch, repeats)
    uses = Counter(index for batch in batches for index in batch)
    assert uses == {sample.index: sample.item.repeats * repeats for sample in plan.samples}
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({plan.samples[index].bucket for index in batch}) == 1
    if repeats == 1:
        assert plan.batches_per_epoch(batch_size) == len(batches)


@settings(deadline=None)
@given(resolution=resolutions, step=st.sampled_from([8, 32, 64, 96, 256]), multiple=st.sampled_from([8, 16, 32]))
def test_bucket_sides_are_multiples_and_areas_about_the_resolution(resolution: int, step: int, multiple: int) -> None:
    sizes = bucket_sizes(DatasetSettings(resolution=resolution, bucket_step=step), multiple)
    for bucket in sizes:
        assert bucket.width % step == bucket.height % step == bucket.width % multiple == bucket.height % multiple == 0
        if math.lcm(step, multiple) <= resolution:
            assert bucket.width * bucket.height <= resolution**2
        assert Bucket(bucket.height, bucket.width) in sizes
        assert max(bucket.width / bucket.height, bucket.height / bucket.width) <= 4
    if resolution >= 512 and step == 64:
        assert all(bucket.width * bucket.height >= 0.8 * resolution**2 for bucket in sizes)


@settings(deadline=None)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000), resolution=resolutions)
def test_pictures_get_the_nearest_aspect_and_the_figures_say_what_happens(
    width: int, height: int, resolution: int
) -> None:
    settings = DatasetSettings(resolution=resolution)
    sample = plan_buckets([make_item(0, width, height)], settings).samples[0]
    distances = [
        abs(math.log(bucket.width / bucket.height) - math.log(width / height)) for bucket in bucket_sizes(settings)
    ]
    chosen = abs(math.log(sample.bucket.width / sample.bucket.height) - math.log(width / height))
    assert chosen == pytest.approx(min(distances))
    assert width * sample.scale >= sample.bucket.width - 1e-6
    assert height * sample.scale >= sample.bucket.height - 1e-6
    assert sample.crop_loss == pytest.approx(1 - math.exp(-chosen), abs=1e-9)


def test_upscaling_and_cropping_by_example() -> None:
    settings = DatasetSettings(resolution=512)
    small, exact, wide = plan_buckets(make_items([(256, 256, 1), (512, 512, 1), (4096, 512, 1)]), settings).samples
    assert (small.scale, small.crop_loss) == (2.0, 0.0)
    assert (exact.scale, exact.crop_loss) == (1.0, 0.0)
    assert wide.bucket == Bucket(1024, 256)
    assert wide.crop_loss == pytest.approx(0.5)


def test_without_buckets_all_pictures_become_squares() -> None:
    plan = plan_buckets(make_items([(640, 100, 1), (100, 640, 1)]), DatasetSettings(buckets=False), pixel_multiple=32)
    assert plan.counts() == {"512x512": 2}


def test_flip_adds_a_mirrored_twin_to_every_picture() -> None:
    plan = plan_buckets(make_items([(512, 512, 1), (640, 384, 1)]), DatasetSettings(flip=True))
    assert [(sample.item.relative, sample.flipped) for sample in plan.samples] == [
        ("0000.png", False), ("0000.png", True), ("0001.png", False), ("0001.png", True),
    ]  # fmt: skip
    assert plan.counts() == {"512x512": 1, "640x384": 1}


def test_the_order_follows_from_seed_and_epoch_and_not_from_the_scan() -> None:
    items = make_items([(512, 512, 1)] * 30)
    plan = plan_buckets(items, DatasetSettings())
    assert plan == plan_buckets(items[::-1], DatasetSettings())
    assert epoch_batches(plan, 4, 1, 0) == epoch_batches(plan, 4, 1, 0)
    assert epoch_batches(plan, 4, 1, 0) != epoch_batches(plan, 4, 1, 1)
    assert epoch_batches(plan, 4, 1, 0) != epoch_batches(plan, 4, 2, 0)


def test_the_fingerprint_changes_with_everything_that_training_sees() -> None:
    item, settings = make_item(0, 512, 512), DatasetSettings()
    others = [
        [replace(item, sha256="1" * 64)],
        [replace(item, captions=("y",))],
        [replace(item, repeats=2)],
        [replace(item, regularization=True)],
        [replace(item, width=300)],
        [item, item],
    ]
    prints = {plan_buckets(items, settings).fingerprint() for items in ([item], *others)}
    prints.add(plan_buckets([item], DatasetSettings(flip=True)).fingerprint())
    assert len(prints) == len(others) + 2
    assert plan_buckets([replace(item, relative="renamed.png")], settings).fingerprint() in prints


@settings(deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), bucket=st.sampled_from([(64, 64), (128, 32), (40, 88)]))
def test_any_picture_fits_any_bucket(width: int, height: int, bucket: tuple[int, int]) -> None:
    assert fit_picture(Image.new("RGB", (width, height)), Bucket(*bucket)).size == bucket


def test_the_crop_is_from_the_middle_and_shapes_keep_their_proportions() -> None:
    picture = Image.new("RGB", (300, 100), "black")
    picture.paste("white", (140, 40, 160, 60))
    picture.paste("red", (0, 0, 90, 100))
    pixels = np.asarray(fit_picture(picture, Bucket(50, 50)))
    white = np.argwhere((pixels > 128).all(axis=2))
    assert white.min(axis=0).tolist() == [20, 20]
    assert white.max(axis=0).tolist() == [29, 29]
    assert not (pixels[..., 0] > pixels[..., 1].astype(int) + 50).any()
