"""Aspect buckets: which size each picture is trained at, and the order of an epoch.

A bucket is a size whose sides are multiples of `bucket_step` and whose area is about resolution². A picture goes to the
bucket of the nearest aspect ratio, is scaled to cover it, and what sticks out is cropped evenly. No picture is ever
dropped: the last batch of a bucket is smaller instead.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.items import ImageItem
from lorasmith.engine.draws import python_rng

MAX_ASPECT = 4.0
"""Widest and tallest bucket; longer pictures are cropped to it."""


@dataclass(frozen=True, order=True)
class Bucket:
    """A training size in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Sample:
    """One picture, or its mirrored twin, at its training size.

    `index` is its place in the plan. `scale` is the factor from file to training size, above 1 where pixels have to be
    invented. `crop_loss` is the share of the picture that is cut off, 0..1.
    """

    item: ImageItem
    bucket: Bucket
    index: int
    flipped: bool = False
    scale: float = 1.0
    crop_loss: float = 0.0


@dataclass(frozen=True)
class BucketPlan:
    """All samples in a fixed order; `samples[i].index == i`."""

    samples: tuple[Sample, ...]

    def counts(self) -> dict[str, int]:
        """Return the number of pictures (mirrored twins not counted) by bucket, e.g. {"64x64": 12}."""
        counts = Counter(sample.bucket for sample in self.samples if not sample.flipped)
        return {str(bucket): counts[bucket] for bucket in sorted(counts)}

    def batches_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches in every epoch."""
        uses: dict[Bucket, int] = defaultdict(int)
        for sample in self.samples:
            uses[sample.bucket] += round(sample.item.repeats)
        return sum(math.ceil(count / batch_size) for count in uses.values())

    def steps_per_epoch(self, batch_size: int, accumulation: int) -> int:
        """Return the optimizer steps in an epoch, rounded up: the last one may reach into the next epoch."""
        return max(1, math.ceil(self.batches_per_epoch(batch_size) / accumulation))

    def fingerprint(self) -> str:
        """Return a sha256 over everything in the plan that training depends on, to recognise it at a resume."""
        facts = [
            [s.item.sha256, s.item.caption, s.item.repeats, s.item.regularization, str(s.bucket), s.flipped]
            for s in self.samples
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def plan_buckets(items: Sequence[ImageItem], settings: DatasetSettings, pixel_multiple: int = 8) -> BucketPlan:
    """Assign each picture, and its mirrored twin with `settings.flip`, to the bucket of the nearest aspect ratio."""
    buckets = bucket_sizes(settings, pixel_multiple)
    samples: list[Sample] = []
    for item in sorted(items, key=lambda item: (item.regularization, item.relative)):
        bucket = _nearest(item.width / item.height, buckets)
        scale = max(bucket.width / item.width, bucket.height / item.height)
        covered = (item.width * scale) * (item.height * scale)
        loss = max(0.0, 1.0 - bucket.width * bucket.height / covered)
        for flipped in (False, True) if settings.flip else (False,):
            samples.append(Sample(item, bucket, len(samples), flipped, scale, loss))
    return BucketPlan(tuple(samples))


def bucket_sizes(settings: DatasetSettings, pixel_multiple: int = 8) -> list[Bucket]:
    """Return the possible buckets; their area is at most resolution² except where one step is already larger."""
    resolution = settings.resolution
    if not settings.buckets:
        side = max(pixel_multiple, resolution // pixel_multiple * pixel_multiple)
        return [Bucket(side, side)]
    step = math.lcm(settings.bucket_step, pixel_multiple)
    square = max(step, resolution // step * step)
    found = {Bucket(square, square)}
    for longer in range(square + step, int(resolution * math.sqrt(MAX_ASPECT)) + 1, step):
        shorter = resolution * resolution // longer // step * step
        if shorter and longer / shorter <= MAX_ASPECT:
            found |= {Bucket(longer, shorter), Bucket(shorter, longer)}
    return sorted(found)


def fit_picture(image: Image.Image, bucket: Bucket) -> Image.Image:
    """Scale a picture to cover the bucket and crop what sticks out evenly on both sides."""
    scale = max(bucket.width / image.width, bucket.height / image.height)
    # Clamped, since a box a rounding error outside the picture is refused.
    width, height = min(image.width, bucket.width / scale), min(image.height, bucket.height / scale)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, min(image.width, left + width), min(image.height, top + height))
    return image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def epoch_batches(plan: BucketPlan, batch_size: int, seed: int, epoch: int, repeats: int = 1) -> list[tuple[int, ...]]:
    """Return an epoch as batches of sample indices, each batch of one bucket, in an order drawn for (seed, epoch).

    Every sample is in it exactly `item.repeats` × `repeats` times; `item.repeats` already holds the settings' repeats.
    """
    groups: dict[Bucket, list[int]] = defaultdict(list)
    for sample in plan.samples:
        groups[sample.bucket].extend([sample.index] * (round(sample.item.repeats) * repeats))
    rng = python_rng(seed, "order", epoch)
    batches: list[tuple[int, ...]] = []
    for bucket in sorted(groups):
        indices = groups[bucket]
        rng.shuffle(indices)
        batches.extend(tuple(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size))
    rng.shuffle(batches)
    return batches


def _nearest(aspect: float, buckets: Sequence[Bucket]) -> Bucket:
    def distance(bucket: Bucket) -> tuple[float, int, int]:
        # Ratios are compared as logarithms, so that 1:2 and 2:1 are equally far from 1:1; then the larger area wins.
        return abs(math.log(bucket.width / bucket.height / aspect)), -bucket.width * bucket.height, bucket.width

    return min(buckets, key=distance)
