"""Aspect buckets: sizes that the model takes, nothing dropped, and an order that follows from the seed."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.buckets import (
    MAX_CROPS,
    MAX_ENLARGEMENT,
    Bucket,
    Sample,
    bucket_sizes,
    crop_box,
    fit_mask,
    fit_picture,
    plan_buckets,
)
from lorasmith.engine.dataset.epochs import epoch_batches
from lorasmith.engine.dataset.items import ImageItem

sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 4))
resolutions = st.sampled_from([64, 256, 512, 768, 1024])


def make_item(
    number: int, width: int, height: int, repeats: float = 1, caption: str | None = "x", regularization: bool = False
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


@settings(max_examples=150, deadline=None)
@given(
    facts=st.lists(
        st.tuples(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([1, 1.5, 2, 3, 4.3])),
        min_size=1,
        max_size=12,
    ),
    batch_size=st.integers(1, 9),
    resolution=resolutions,
    more=st.lists(resolutions, max_size=2),
    flip=st.booleans(),
    buckets=st.booleans(),
    crop=st.sampled_from(["center", "random"]),
    epochs=st.integers(1, 4),
)
def test_every_picture_is_in_every_epoch_and_no_view_of_it_more_often_than_its_repeats_ask(
    facts: list[tuple[int, int, float]],
    batch_size: int,
    resolution: int,
    more: list[int],
    flip: bool,
    buckets: bool,
    crop: str,
    epochs: int,
) -> None:
    settings = DatasetSettings.model_validate(
        {"resolution": resolution, "more_resolutions": more, "flip": flip, "buckets": buckets, "crop": crop}
    )
    items = [make_item(number, *fact) for number, fact in enumerate(facts)]
    plan = plan_buckets(items, settings, seed=7)
    assert [sample.index for sample in plan.samples] == list(range(len(plan.samples)))
    total: Counter[tuple[str, Bucket, bool]] = Counter()
    for epoch in range(epochs):
        batches = epoch_batches(plan, batch_size, 1, epoch)
        for batch in batches:
            assert 1 <= len(batch) <= batch_size
            assert len({plan.samples[index].bucket for index in batch}) == 1
        used = [plan.samples[index] for batch in batches for index in batch]
        views = Counter((sample.item.relative, sample.bucket, sample.flipped) for sample in used)
        assert views.keys() == {(s.item.relative, s.bucket, s.flipped) for s in plan.samples}
        asked = {item.relative: item.repeats for item in items}
        for (name, _, _), uses in views.items():
            assert math.floor(asked[name] + 1e-9) <= uses <= math.ceil(asked[name] - 1e-9)
        total += views
        if epoch == 0:
            assert plan.batches_per_epoch(batch_size) == len(batches)
    assert {item.relative for item in items} == {name for name, _, _ in total}
    for (name, _, _), uses in total.items():
        assert abs(uses - epochs * asked[name]) < 1 + 1e-9
    # Nothing is enlarged beyond the limit unless it is told, and then only at the smallest of the resolutions.
    told = {(sample.item.relative, sample.bucket) for sample in plan.enlarged()}
    for sample in plan.samples:
        assert (sample.scale > MAX_ENLARGEMENT) == ((sample.item.relative, sample.bucket) in told)
        if sample.scale > MAX_ENLARGEMENT:
            assert len({s.bucket for s in plan.samples if s.item == sample.item}) == 1


@settings(deadline=None)
@given(width=st.integers(1, 4000), height=st.integers(1, 4000), resolutions=st.lists(resolutions, min_size=1))
def test_a_resolution_that_enlarges_too_much_is_left_out_and_told(
    width: int, height: int, resolutions: list[int]
) -> None:
    first, *more = resolutions
    plan = plan_buckets([make_item(0, width, height)], DatasetSettings(resolution=first, more_resolutions=more))
    kept = {resolution for resolution in resolutions if resolution not in {left for _, left in plan.left_out}}
    assert kept
    alone = {r: plan_buckets([make_item(0, width, height)], DatasetSettings(resolution=r)).samples[0] for r in kept}
    assert {sample.bucket for sample in plan.samples} == {sample.bucket for sample in alone.values()}
    assert len(plan.samples) == len({sample.bucket for sample in plan.samples})
    if len(kept) > 1:
        assert all(sample.scale <= MAX_ENLARGEMENT for sample in plan.samples)


def test_several_resolutions_by_example() -> None:
    settings = DatasetSettings(resolution=1024, more_resolutions=[512, 768])
    plan = plan_buckets([make_item(0, 700, 700), make_item(1, 2000, 2000), make_item(2, 100, 100)], settings)
    assert plan.counts() == {"512x512": 3, "768x768": 2, "1024x1024": 2}
    assert [(item.relative, resolution) for item, resolution in plan.left_out] == [
        ("0002.png", 768),
        ("0002.png", 1024),
    ]
    assert [(sample.item.relative, sample.scale) for sample in plan.enlarged()] == [("0002.png", 5.12)]


def test_rows_tell_what_the_user_should_know_of_each_bucket() -> None:
    items = [make_item(0, 256, 256), make_item(1, 512, 512, 3), make_item(2, 1500, 512)]
    rows = plan_buckets(items, DatasetSettings(flip=True, crop="random")).rows(batch_size=3)
    assert [(row.size, row.pictures, row.uses, row.batches) for row in rows] == [
        ("512x512", 2, 8, 3),
        ("832x256", 1, 2, 1),
    ]
    assert [row.scale for row in rows] == [2.0, pytest.approx(832 / 1500)]
    assert [row.crop_loss for row in rows] == [0.0, pytest.approx(1 - 256 / (512 * 832 / 1500))]


def test_random_crops_are_as_many_as_differ_and_their_uses_take_turns() -> None:
    settings = DatasetSettings(crop="random", buckets=False)
    items = [make_item(0, 512, 512), make_item(1, 512, 530), make_item(2, 1024, 512, 3)]
    plan = plan_buckets(items, settings, seed=1)
    crops = [[s.offset for s in plan.samples if s.item == item] for item in items]
    assert [len(offsets) for offsets in crops] == [1, 3, MAX_CROPS]
    assert crops[0] == [(0.5, 0.5)]
    spread = sorted(offset[0] for offset in crops[2])
    assert all(k / 8 <= offset < (k + 1) / 8 for k, offset in enumerate(spread))
    wide = {s.index for s in plan.samples if s.item == items[2]}
    used = [[i for batch in epoch_batches(plan, 2, 1, epoch) for i in batch if i in wide] for epoch in range(8)]
    assert all(len(set(epoch)) == 3 for epoch in used)
    assert Counter(i for epoch in used for i in epoch) == dict.fromkeys(wide, 3)


def test_crops_follow_from_the_seed_and_the_content_of_the_picture() -> None:
    item, settings = make_item(0, 2000, 512), DatasetSettings(crop="random", buckets=False)

    def offsets(item: ImageItem, seed: int) -> list[tuple[float, float]]:
        return [sample.offset for sample in plan_buckets([item], settings, seed=seed).samples]

    assert offsets(item, 1) == offsets(replace(item, relative="renamed.png"), 1)
    assert offsets(item, 1) != offsets(item, 2)
    assert offsets(item, 1) != offsets(replace(item, sha256="1" * 64), 1)


def test_half_a_repeat_counts_in_half_of_the_epochs_and_not_in_all_pictures_at_once() -> None:
    plan = plan_buckets([make_item(number, 512, 512, 1.5) for number in range(40)], DatasetSettings(), seed=3)
    for view in plan.views:
        uses = [len(view.uses(epoch)) for epoch in range(20)]
        assert set(uses) == {1, 2}
        assert sum(uses) == 30
        assert all(one != two for one, two in pairwise(uses))
    assert 50 < sum(len(view.uses(0)) for view in plan.views) < 70


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
    item, settings = make_item(0, 2048, 512), DatasetSettings(buckets=False)
    others = [
        [replace(item, sha256="1" * 64)],
        [replace(item, captions=("y",))],
        [replace(item, captions=("x", "y"))],
        [replace(item, repeats=2)],
        [replace(item, repeats=1.5)],
        [replace(item, regularization=True)],
        [replace(item, mask_path=Path("mask.png"), mask_sha256="2" * 64)],
        [item, item],
    ]
    prints = {plan_buckets(items, settings).fingerprint() for items in ([item], *others)}
    changes: list[dict[str, object]] = [
        {"flip": True},
        {"crop": "random"},
        {"more_resolutions": [256]},
        {"resolution": 256},
    ]
    for change in changes:
        prints.add(plan_buckets([item], settings.model_copy(update=change)).fingerprint())
    prints.add(plan_buckets([item], settings.model_copy(update={"crop": "random"}), seed=9).fingerprint())
    assert len(prints) == 1 + len(others) + len(changes) + 1
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


@settings(deadline=None)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000), resolution=resolutions, share=st.floats(0, 1))
def test_a_crop_lies_inside_the_picture_and_has_the_shape_of_its_bucket(
    width: int, height: int, resolution: int, share: float
) -> None:
    bucket = plan_buckets([make_item(0, width, height)], DatasetSettings(resolution=resolution)).samples[0].bucket
    left, top, right, bottom = crop_box((width, height), bucket, (share, share))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (right - left) / (bottom - top) == pytest.approx(bucket.width / bucket.height)
    assert (right - left, bottom - top) == pytest.approx(
        (width, bottom - top) if width / bucket.width <= height / bucket.height else (right - left, height)
    )


def test_the_offset_moves_the_crop_from_one_end_to_the_other() -> None:
    picture = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1))).convert("RGB")
    firsts = [int(np.asarray(fit_picture(picture, Bucket(100, 100), (x, x)))[50, 0, 0]) for x in (0.0, 0.5, 1.0)]
    assert firsts == [0, 50, 100]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mask_scale", [1, 2])
def test_a_mask_goes_the_way_of_its_picture(flipped: bool, offset: float, mask_scale: int) -> None:
    picture = Image.new("L", (300, 100), 0)
    picture.paste(255, (70, 20, 130, 60))
    mask = picture.resize((300 * mask_scale, 100 * mask_scale), Image.Resampling.NEAREST)
    sample = Sample(make_item(0, 300, 100), Bucket(64, 64), 0, flipped, offset=(offset, offset))
    expected = np.asarray(fit_picture(picture, sample.bucket, sample.offset), dtype=float)
    expected = expected[:, ::-1] if flipped else expected
    fitted = np.asarray(fit_mask(mask, picture.size, sample), dtype=float)
    assert fitted.shape == (64, 64)
    # Two filters: they differ at the edges of the shape only.
    assert np.abs(fitted - expected).mean() < 6
    assert ((fitted > 128) == (expected > 128)).mean() > 0.97
