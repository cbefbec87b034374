"""What is wrong with single pictures: too small, blurred, compressed, framed, cropped, dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median

from lorasmith.engine.dataset.buckets import MAX_ENLARGEMENT, BucketPlan, Sample
from lorasmith.engine.dataset.check_goals import Aim, aim_of
from lorasmith.engine.dataset.findings import Action, CheckContext, Finding, counted
from lorasmith.engine.dataset.items import Dataset, ImageItem, Measures
from lorasmith.engine.dataset.measures import MEASURED_SIDE

ENLARGED = 1.01
"""Below this factor the enlargement is a rounding to the bucket's size."""
MIN_SHARPNESS = 0.4
"""Blurred below this: photographs measure about 1, with a Gaussian blur of 2 pixels in 512 about 0.55, of 4 about 0.28;
measured (tests/engine)."""
MIN_JPEG_QUALITY = 40
"""JPEGs below this show blocks and ringing at their own size; a judgement."""
HIDES_ARTEFACTS = 0.5
"""Scaled down to this factor, blocks of 8 pixels and blur are lost in the resampling; a judgement."""
MIN_BORDER, MAX_BORDER = 0.04, 0.7
"""Bars of a smaller share are hardly seen. A film in 16:9 has bars on 68 % of a frame in 9:16; where more is even, it
is the plain ground around a box."""
CROPPED, MUCH_CROPPED = 0.15, 0.3
"""A seventh of a picture is rarely missed, a third mostly is; judgements."""
DARK, BRIGHT, FLAT = 0.08, 0.93, 0.05
"""Mean luma of a night scene, mean luma of a faint drawing on white, and spread of a nearly even area; judgements."""
ODD_ASPECT, ODD_SHARE = 2.0, 0.1
"""Aspect ratios this many times wider or taller than the middle one, where at most this share of pictures has such."""
MIN_LEFT = 2 / 3
"""Leaving pictures out is offered while at least this share stays; a judgement."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of a dataset, at what size each is trained, and what for."""

    dataset: Dataset
    plan: BucketPlan
    context: CheckContext

    @cached_property
    def learnt(self) -> tuple[ImageItem, ...]:
        """The pictures without those for regularization."""
        return tuple(item for item in self.dataset.items if not item.regularization)

    @cached_property
    def largest(self) -> dict[str, Sample]:
        """The most enlarged sample of each picture."""
        return {sample.item.relative: sample for sample in sorted(self.plan.samples, key=lambda s: s.scale)}

    @cached_property
    def most_cropped(self) -> dict[str, Sample]:
        """The sample of each picture that loses most."""
        return {sample.item.relative: sample for sample in sorted(self.plan.samples, key=lambda s: s.crop_loss)}

    @property
    def aim(self) -> Aim:
        """What is to be learnt."""
        return aim_of(self.context.goal)

    def measured(self) -> Iterable[tuple[ImageItem, Measures]]:
        """Yield the learnt pictures with their measures."""
        return ((item, item.measures) for item in self.learnt if item.measures is not None)


@dataclass
class _Marked:
    """Pictures with how bad each is and what to say of it."""

    found: list[tuple[float, str, str]] = field(default_factory=list)

    def add(self, item: ImageItem, badness: float, detail: str) -> None:
        self.found.append((-badness, item.relative, detail))

    def names(self) -> tuple[str, ...]:
        return tuple(name for _, name, _ in sorted(self.found))

    def told(self, finding: Finding) -> Finding | None:
        """Return the finding with the pictures, worst first; None where there are none."""
        details = {name: detail for _, name, detail in sorted(self.found)}
        return replace(finding, files=tuple(details), details=details) if details else None


def check_pictures(dataset: Dataset, plan: BucketPlan, context: CheckContext) -> list[Finding]:
    """Return what single pictures suffer from, one finding for each kind of trouble."""
    pictures = Pictures(dataset, plan, context)
    return [finding for check in _CHECKS if (finding := check(pictures)) is not None]


def _enlarged(pictures: Pictures, above: float, up_to: float) -> _Marked:
    marked = _Marked()
    for item in pictures.dataset.items:
        sample = pictures.largest.get(item.relative)
        if sample is not None and above < sample.scale <= up_to:
            detail = f"{sample.scale:.1f}x enlarged: {item.width}x{item.height} pixels for {sample.bucket}"
            marked.add(item, sample.scale, detail)
    return marked


def _too_small(pictures: Pictures) -> Finding | None:
    marked = _enlarged(pictures, MAX_ENLARGEMENT, math.inf)
    count = len(marked.found)
    side = pictures.context.config.dataset.resolution
    return marked.told(
        Finding(
            "too-small",
            "warning",
            f"{counted(count, 'picture is', 'pictures are')} enlarged more than {MAX_ENLARGEMENT} times to be "
            f"trained at {side} pixels.",
            f"Enlarged pictures are soft, and {pictures.aim.blurs}.",
            "Use larger originals, leave them out, or train at a lower dataset.resolution.",
            action=_leave_out(pictures, marked.names()),
        )
    )


def _slightly_small(pictures: Pictures) -> Finding | None:
    marked = _enlarged(pictures, ENLARGED, MAX_ENLARGEMENT)
    return marked.told(
        Finding(
            "enlarged",
            "note",
            f"{counted(len(marked.found), 'picture is', 'pictures are')} a little smaller than the training size and "
            "enlarged to it.",
            f"Up to {MAX_ENLARGEMENT} times this costs some sharpness and nothing else.",
            "Use larger originals if you have them.",
        )
    )


def _blurred(pictures: Pictures) -> Finding | None:
    marked = _Marked()
    for item, measures in pictures.measured():
        sample = pictures.largest.get(item.relative)
        measured = min(MEASURED_SIDE, max(item.width, item.height))
        trained = max(sample.bucket.width, sample.bucket.height) if sample is not None else measured
        visible = trained > HIDES_ARTEFACTS * measured and measures.contrast >= FLAT
        if visible and measures.sharpness < MIN_SHARPNESS:
            marked.add(item, -measures.sharpness, f"sharpness {measures.sharpness:.2f} of about 1")
    return marked.told(
        Finding(
            "blurred",
            "warning",
            f"{counted(len(marked.found), 'picture looks', 'pictures look')} blurred.",
            f"Blur is learnt like everything else: {pictures.aim.blurs}.",
            "Look at them; leave out what is not meant to be soft.",
            action=_leave_out(pictures, marked.names()),
        )
    )


def _compressed(pictures: Pictures) -> Finding | None:
    marked = _Marked()
    for item, measures in pictures.measured():
        quality, sample = measures.jpeg_quality, pictures.largest.get(item.relative)
        visible = sample is None or sample.scale > HIDES_ARTEFACTS
        if quality is not None and quality < MIN_JPEG_QUALITY and visible:
            marked.add(item, -quality, f"JPEG quality {quality} of 100")
    return marked.told(
        Finding(
            "jpeg-artefacts",
            "warning",
            f"{counted(len(marked.found), 'JPEG is', 'JPEGs are')} heavily compressed.",
            "Blocks and rings around edges are easy to learn and turn up in every picture that the LoRA draws.",
            "Find the originals; saving these files again does not bring anything back.",
            action=_leave_out(pictures, marked.names()),
        )
    )


def _framed(pictures: Pictures) -> Finding | None:
    marked = _Marked()
    for item, measures in pictures.measured():
        if MIN_BORDER < measures.border <= MAX_BORDER:
            marked.add(item, measures.border, f"bars on {measures.border:.0%} of the picture")
    return marked.told(
        Finding(
            "letterbox",
            "warning",
            f"{counted(len(marked.found), 'picture has', 'pictures have')} even bars at opposite edges.",
            "Bars are the easiest thing to learn: the LoRA draws them too.",
            "Crop the bars away.",
        )
    )


def _cropped(pictures: Pictures) -> Finding | None:
    marked = _Marked()
    for item in pictures.learnt:
        sample = pictures.most_cropped.get(item.relative)
        if sample is not None and sample.crop_loss > CROPPED:
            detail = f"{sample.crop_loss:.0%} cut off: {item.width}x{item.height} to {sample.bucket}"
            marked.add(item, sample.crop_loss, detail)
    worst = max((-badness for badness, _, _ in marked.found), default=0.0)
    settings = pictures.context.config.dataset
    action = None if settings.buckets else Action("Keep the shapes of pictures", settings={"dataset.buckets": True})
    much = sum(-badness > MUCH_CROPPED for badness, _, _ in marked.found)
    count = much or len(marked.found)
    share = MUCH_CROPPED if much else CROPPED
    return marked.told(
        Finding(
            "cropped",
            "warning" if much else "note",
            f"{counted(count, 'picture loses', 'pictures lose')} over {share:.0%} to cropping (at most {worst:.0%}).",
            "What is cut off is not learnt, but the caption still speaks of it; heads and feet are the first to go.",
            "Turn dataset.buckets on, or crop the pictures yourself to what matters."
            if action
            else "Crop the pictures yourself to what matters, at most four times as long as wide.",
            action=action,
        )
    )


def _odd_shapes(pictures: Pictures) -> Finding | None:
    marked = _Marked()
    aspects = {item.relative: math.log(item.width / item.height) for item in pictures.learnt}
    middle = median(aspects.values()) if aspects else 0.0
    for item in pictures.learnt:
        away = abs(aspects[item.relative] - middle)
        if away > math.log(ODD_ASPECT):
            marked.add(item, away, f"{item.width}x{item.height} pixels")
    if len(marked.found) > ODD_SHARE * len(pictures.learnt):
        return None
    return marked.told(
        Finding(
            "aspect-outliers",
            "note",
            f"{counted(len(marked.found), 'picture has', 'pictures have')} quite another shape than the rest.",
            "Few pictures of a shape make small batches, and the LoRA hardly learns to draw in that shape.",
            "Crop them to the shape of the others, or add more of theirs.",
        )
    )


def _light(
    code: str, wrong: Callable[[Measures], bool], words: str, why: str, value: Callable[[Measures], float]
) -> Callable[[Pictures], Finding | None]:
    def check(pictures: Pictures) -> Finding | None:
        marked = _Marked()
        for item, measures in pictures.measured():
            if wrong(measures):
                detail = f"brightness {measures.brightness:.0%}, contrast {measures.contrast:.0%}"
                marked.add(item, value(measures), detail)
        title = f"{counted(len(marked.found), 'picture is', 'pictures are')} {words}."
        fix = "Look at them; correct the exposure or leave them out, unless that is what you want to teach."
        return marked.told(Finding(code, "note", title, why, fix))

    return check


_dark = _light(
    "very-dark",
    lambda measures: measures.brightness < DARK,
    "very dark",
    "Little can be seen in them, and darkness itself is learnt as part of the concept.",
    lambda measures: -measures.brightness,
)
_bright = _light(
    "very-bright",
    lambda measures: measures.brightness > BRIGHT and measures.contrast < 2 * FLAT,
    "very bright",
    "Washed-out areas have lost their detail, and paleness itself is learnt as part of the concept.",
    lambda measures: measures.brightness,
)
_pale = _light(
    "low-contrast",
    lambda measures: measures.contrast < FLAT and DARK <= measures.brightness <= BRIGHT,
    "nearly one even color",
    "There is little to learn in them but the evenness itself.",
    lambda measures: -measures.contrast,
)


_CHECKS: tuple[Callable[[Pictures], Finding | None], ...] = (
    _too_small,
    _blurred,
    _compressed,
    _framed,
    _cropped,
    _pale,
    _dark,
    _bright,
    _odd_shapes,
    _slightly_small,
)


def _leave_out(pictures: Pictures, names: tuple[str, ...]) -> Action | None:
    stays = len(pictures.learnt) - len({item.relative for item in pictures.learnt} & set(names))
    if not names or stays < max(1, MIN_LEFT * len(pictures.learnt)):
        return None
    return Action(f"Leave {counted(len(names), 'picture', 'pictures')} out", exclude=names)
