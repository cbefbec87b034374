"""Aspect buckets: which sizes each picture is trained at, and which part of it.

A bucket is a size whose sides are multiples of `bucket_step` and whose area is about resolution². A picture goes to the
bucket of the nearest aspect ratio, is scaled to cover it, and what sticks out is cropped. No picture is ever dropped:
the last batch of a bucket is smaller instead.

Latents are encoded once, so that random crops are a choice of up to `MAX_CROPS` parts of each picture, fewer where less
sticks out; the uses of a picture take its parts in turn, over the ends of epochs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.items import ImageItem
from lorasmith.engine.draws import python_rng

MAX_ASPECT = 4.0
"""Widest and tallest bucket; longer pictures are cropped to it."""
MAX_ENLARGEMENT = 1.5
"""Beyond this an enlarged picture teaches its blur, and one of several resolutions is left out for it."""
MAX_CROPS = 8
"""Parts of a picture that random cropping takes at most; each is encoded and cached."""
CROP_PIXELS = 8
"""Parts of a picture are at least about this far apart."""
CENTER = (0.5, 0.5)


@dataclass(frozen=True, order=True)
class Bucket:
    """A training size in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Sample:
    """One part of one picture, or of its mirrored twin, at one training size: what is encoded once.

    `index` is its place in the plan. `scale` is the factor from file to training size, above 1 where pixels have to be
    invented. `crop_loss` is the share of the picture that is cut off, 0..1. `offset` is the share of what sticks out
    that is cut off at the left and at the top, before mirroring.
    """

    item: ImageItem
    bucket: Bucket
    index: int
    flipped: bool = False
    scale: float = 1.0
    crop_loss: float = 0.0
    offset: tuple[float, float] = CENTER


@dataclass(frozen=True)
class View:
    """One picture, or its mirrored twin, at one training size; `samples` are the parts of it that are used in turn.

    It is used `repeats` times an epoch, 1 or more. `phase` (0..1) says in which epochs a fraction counts.
    """

    samples: tuple[Sample, ...]
    repeats: float
    phase: float

    def uses_before(self, epoch: int) -> int:
        """Return how often it is used in all epochs before `epoch`, counted from 0."""
        return math.floor(epoch * self.repeats + self.phase)

    def uses(self, epoch: int) -> range:
        """Return the numbers of its uses in `epoch`, counted over the whole run."""
        return range(self.uses_before(epoch), self.uses_before(epoch + 1))


@dataclass(frozen=True)
class BucketRow:
    """One training size: `pictures` of it, seen `uses` times in the first epoch in `batches` batches.

    `crop_loss` is the largest share that is cut off, `scale` the largest enlargement.
    """

    size: str
    pictures: int
    uses: int
    batches: int
    crop_loss: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class BucketPlan:
    """All samples in a fixed order; `samples[i].index == i`, and each belongs to one of the `views`.

    `left_out` are pictures with the resolutions that would have enlarged them too much.
    """

    samples: tuple[Sample, ...]
    views: tuple[View, ...] = ()
    left_out: tuple[tuple[ImageItem, int], ...] = ()

    def counts(self) -> dict[str, int]:
        """Return the number of pictures (twins and further parts not counted) by bucket, e.g. {"64x64": 12}."""
        return {row.size: row.pictures for row in self.rows(1)}

    def rows(self, batch_size: int) -> tuple[BucketRow, ...]:
        """Return what the user should know of each bucket, smallest width first."""
        groups: dict[Bucket, list[View]] = defaultdict(list)
        for view in self.views:
            groups[view.samples[0].bucket].append(view)
        rows = []
        for bucket, views in sorted(groups.items()):
            uses, first = sum(len(view.uses(0)) for view in views), [view.samples[0] for view in views]
            rows.append(
                BucketRow(
                    size=str(bucket),
                    pictures=sum(not sample.flipped for sample in first),
                    uses=uses,
                    batches=math.ceil(uses / batch_size),
                    crop_loss=max(sample.crop_loss for sample in first),
                    scale=max(sample.scale for sample in first),
                )
            )
        return tuple(rows)

    def enlarged(self, limit: float = MAX_ENLARGEMENT) -> tuple[Sample, ...]:
        """Return one sample of each picture and size that is enlarged more than `limit` times, the worst first."""
        found = [view.samples[0] for view in self.views if view.samples[0].scale > limit]
        return tuple(sorted((s for s in found if not s.flipped), key=lambda s: (-s.scale, s.index)))

    def batches_per_epoch(self, batch_size: int) -> int:
        """Return the batches of the first epoch; with fractional repeats others have a few more or less."""
        return sum(row.batches for row in self.rows(batch_size))

    def steps_per_epoch(self, batch_size: int, accumulation: int) -> int:
        """Return the optimizer steps in an epoch, rounded up: the last one may reach into the next epoch."""
        return max(1, math.ceil(self.batches_per_epoch(batch_size) / accumulation))

    def fingerprint(self) -> str:
        """Return a sha256 over everything in the plan that training depends on, to recognise it at a resume."""
        facts = [
            [s.item.sha256, s.item.captions, s.item.mask_sha256, s.item.regularization, str(s.bucket), s.flipped,
             s.offset, view.repeats, view.phase]
            for view in self.views for s in view.samples
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def plan_buckets(
    items: Sequence[ImageItem], settings: DatasetSettings, pixel_multiple: int = 8, seed: int = 0
) -> BucketPlan:
    """Assign each picture, at each resolution and with its mirrored twin if wanted, to the nearest aspect ratio.

    Sides are multiples of `pixel_multiple`. Random crops and the epochs in which a fractional repeat counts follow from
    `seed` and the pictures' content.
    """
    sizes = {
        resolution: _with_aspects(bucket_sizes(settings.model_copy(update={"resolution": resolution}), pixel_multiple))
        for resolution in sorted({settings.resolution, *settings.more_resolutions})
    }
    samples: list[Sample] = []
    views: list[View] = []
    left_out: list[tuple[ImageItem, int]] = []
    for item in sorted(items, key=lambda item: (item.regularization, item.relative)):
        chosen = {resolution: _nearest(item, buckets) for resolution, buckets in sizes.items()}
        fitting = [r for r, bucket in chosen.items() if _scale(item, bucket) <= MAX_ENLARGEMENT] or [min(chosen)]
        left_out += [(item, resolution) for resolution in chosen if resolution not in fitting]
        for bucket in dict.fromkeys(chosen[resolution] for resolution in fitting):
            for flipped in (False, True) if settings.flip else (False,):
                view = _view(Sample(item, bucket, len(samples), flipped), settings.crop == "random", seed)
                samples += view.samples
                views.append(view)
    return BucketPlan(tuple(samples), tuple(views), tuple(left_out))


def _view(first: Sample, random_crops: bool, seed: int) -> View:
    """Return the view that begins with `first`, of which picture, bucket, index and mirroring count."""
    item, bucket = first.item, first.bucket
    scale = _scale(item, bucket)
    width, height = item.width * scale, item.height * scale
    loss = max(0.0, 1.0 - bucket.width * bucket.height / (width * height))
    place = (bucket.width, bucket.height, int(first.flipped))
    # Only along one side does a picture stick out.
    num = min(MAX_CROPS, 1 + int(max(width - bucket.width, height - bucket.height) / CROP_PIXELS))
    offsets = [CENTER]
    if random_crops and num > 1:
        rng = python_rng(seed, f"crop {item.sha256}", *place)
        # One draw in each of `num` equal slices, in drawn order: spread over all that sticks out.
        offsets = [(share, share) for share in ((k + rng.random()) / num for k in range(num))]
        rng.shuffle(offsets)
    repeats = max(1.0, item.repeats)  # the scan gives no less; every picture is in every epoch
    phase = python_rng(seed, f"repeats {item.sha256}", *place).random() if repeats % 1 else 0.0
    samples = [
        Sample(item, bucket, first.index + k, first.flipped, scale, loss, offset) for k, offset in enumerate(offsets)
    ]
    return View(tuple(samples), repeats, phase)


def _scale(item: ImageItem, bucket: Bucket) -> float:
    return max(bucket.width / item.width, bucket.height / item.height)


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


def crop_box(
    size: tuple[int, int], bucket: Bucket, offset: tuple[float, float] = CENTER
) -> tuple[float, float, float, float]:
    """Return the part (left, top, right, bottom) of a picture of `size` that is scaled to fill the bucket."""
    scale = max(bucket.width / size[0], bucket.height / size[1])
    # Clamped, since a box a rounding error outside the picture is refused.
    width, height = min(size[0], bucket.width / scale), min(size[1], bucket.height / scale)
    left, top = (size[0] - width) * offset[0], (size[1] - height) * offset[1]
    return left, top, min(size[0], left + width), min(size[1], top + height)


def fit_picture(image: Image.Image, bucket: Bucket, offset: tuple[float, float] = CENTER) -> Image.Image:
    """Scale a picture to cover the bucket and cut off what sticks out, `offset` of it at the left and at the top."""
    box = crop_box(image.size, bucket, offset)
    return image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def fit_mask(mask: Image.Image, picture: tuple[int, int], sample: Sample) -> Image.Image:
    """Return the part of a mask that belongs to `sample`, at its training size and mirrored like it.

    `picture` is the size of the picture that the mask covers; a mask of another size is stretched over it.
    """
    left, top, right, bottom = crop_box(picture, sample.bucket, sample.offset)
    across, down = mask.width / picture[0], mask.height / picture[1]
    box = (left * across, top * down, min(mask.width, right * across), min(mask.height, bottom * down))
    # Averaged by area: a filter with negative parts would ring beside the mask's edges.
    fitted = mask.resize((sample.bucket.width, sample.bucket.height), Image.Resampling.BOX, box=box)
    return ImageOps.mirror(fitted) if sample.flipped else fitted


def _nearest(item: ImageItem, buckets: Sequence[tuple[float, Bucket]]) -> Bucket:
    aspect = math.log(item.width / item.height)

    def distance(entry: tuple[float, Bucket]) -> tuple[float, int, int]:
        bucket = entry[1]
        # Ratios are compared as logarithms, so that 1:2 and 2:1 are equally far from 1:1; then the larger area wins.
        return abs(entry[0] - aspect), -bucket.width * bucket.height, bucket.width

    return min(buckets, key=distance)[1]


def _with_aspects(buckets: Sequence[Bucket]) -> list[tuple[float, Bucket]]:
    return [(math.log(bucket.width / bucket.height), bucket) for bucket in buckets]
