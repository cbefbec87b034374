"""What is found wrong with pictures, and that nothing is found wrong with good ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from lorasmith.engine.dataset.check_duplicates import MIN_CONTRAST, NEAR_BITS, near_groups
from lorasmith.engine.dataset.check_pictures import MIN_SHARPNESS
from lorasmith.engine.dataset.items import ImageItem, Measures
from lorasmith.engine.dataset.measures import measure_picture

from .checked import codes, finding, found, measures, picture, pictures
from .photos import photo, recompressed

GOOD = pictures(12)
HASH = 0x123456789ABCDEF0


def with_measures(**changes: Any) -> list[ImageItem]:
    return [*GOOD, picture("odd.png", measures=measures(perceptual_hash=HASH, **changes))]


def with_size(width: int, height: int) -> list[ImageItem]:
    return [*GOOD, picture("odd.png", width=width, height=height)]


def regular(items: Sequence[ImageItem]) -> list[ImageItem]:
    return [replace(item, regularization=True, relative=f"regular/{item.relative}") for item in items]


def masked(*shares: float | None) -> list[ImageItem]:
    return [
        picture(f"{place}.png", f"a thing {place}", mask_share=share, mask_path=None if share is None else GOOD[0].path)
        for place, share in enumerate(shares)
    ]


def classes(**counts: int) -> list[ImageItem]:
    return [
        picture(f"{name}/{place}.png", f"a {name} {place}", class_name=name)
        for name, count in counts.items()
        for place in range(count)
    ]


# Code, pictures that have the trouble, pictures at the edge that do not, settings.
CASES: list[tuple[str, list[ImageItem], list[ImageItem], dict[str, Any]]] = [
    ("too-small", with_size(300, 300), with_size(342, 342), {}),
    ("enlarged", with_size(400, 400), with_size(510, 510), {}),
    ("blurred", with_measures(sharpness=0.3), with_measures(sharpness=0.5), {}),
    ("blurred", with_measures(sharpness=0.3), with_measures(sharpness=0.0, contrast=0.01), {}),
    ("jpeg-artefacts", with_measures(jpeg_quality=20), with_measures(jpeg_quality=75), {}),
    ("letterbox", with_measures(border=0.2), with_measures(border=0.01), {}),
    ("letterbox", with_measures(border=0.68), with_measures(border=0.75), {}),
    ("cropped", with_size(900, 512), with_size(540, 512), {"dataset__buckets": False}),
    ("cropped", with_size(3000, 512), with_size(1900, 512), {}),
    ("aspect-outliers", with_size(1500, 512), with_size(900, 512), {}),
    ("very-dark", with_measures(brightness=0.03), with_measures(brightness=0.12), {}),
    ("very-bright", with_measures(brightness=0.97, contrast=0.06), with_measures(brightness=0.95, contrast=0.2), {}),
    ("low-contrast", with_measures(contrast=0.02), with_measures(contrast=0.1), {}),
    ("transparent", [*GOOD, picture("odd.png", transparent=True)], GOOD, {}),
    ("masks-black", masked(0.5, 0.0, 0.5), masked(0.5, 0.01, 0.5), {}),
    ("masks-white", masked(0.5, 1.0, 0.5), masked(0.5, 0.99, 0.5), {}),
    ("masks-missing", masked(0.5, None, 0.5), masked(None, None), {}),
    ("exact-duplicates", [*GOOD, replace(GOOD[0], relative="odd.png")], [*GOOD, *regular(GOOD)], {}),
    ("trained-regularization", [*GOOD, *regular(GOOD[:1])], [*GOOD, replace(GOOD[0], relative="odd.png")], {}),
    ("few-pictures", pictures(9), pictures(10), {}),
    ("many-pictures", pictures(1001), pictures(1000), {}),
    ("class-imbalance", classes(cat=10, dog=3), classes(cat=9, dog=3), {}),
    ("regularization-balance", [*GOOD, *regular(pictures(30))], [*GOOD, *regular(pictures(20))], {}),
    ("regularization-balance", [*GOOD, *regular(pictures(5))], [*GOOD, *regular(pictures(6))], {}),
]


@pytest.mark.parametrize(("code", "bad", "good", "values"), CASES)
def test_each_trouble_is_found_and_only_where_it_is(
    code: str, bad: list[ImageItem], good: list[ImageItem], values: dict[str, Any]
) -> None:
    said = finding(code, bad, **values)
    assert said.title.endswith(".")
    assert said.why
    assert said.fix
    assert code not in codes(good, **values)
    if any(item.relative == "odd.png" for item in bad):
        assert "odd.png" in said.files


def test_good_pictures_have_nothing_found_against_them() -> None:
    assert found(pictures(20)) == []


def test_files_come_worst_first_with_what_is_wrong_with_each() -> None:
    items = [*GOOD, picture("small.png", width=200, height=200), picture("tiny.png", width=100, height=100)]
    said = finding("too-small", items)
    assert said.files == ("tiny.png", "small.png")
    assert said.details["tiny.png"] == "5.1x enlarged: 100x100 pixels for 512x512"
    assert said.action is not None
    assert set(said.action.exclude) == {"tiny.png", "small.png"}


def test_leaving_out_is_not_offered_where_little_would_be_left() -> None:
    assert finding("too-small", pictures(12, width=100, height=100)).action is None


def test_a_heavily_compressed_picture_that_is_scaled_down_is_fine() -> None:
    bad = measures(perceptual_hash=HASH, jpeg_quality=20)
    assert "jpeg-artefacts" in codes([*GOOD, picture("odd.png", measures=bad, width=900, height=900)])
    assert "jpeg-artefacts" not in codes([*GOOD, picture("odd.png", measures=bad, width=2048, height=2048)])


def test_blur_that_training_at_a_small_size_hides_is_fine() -> None:
    blurred = with_measures(sharpness=0.3)
    assert "blurred" in codes(blurred, dataset__resolution=320)
    assert "blurred" not in codes(blurred, dataset__resolution=256)


def test_crops_to_squares_can_be_undone_with_one_key() -> None:
    said = finding("cropped", with_size(1024, 512), dataset__buckets=False)
    assert said.severity == "warning"
    assert said.action is not None
    assert said.action.settings == {"dataset.buckets": True}
    assert finding("cropped", with_size(3000, 512)).action is None


@pytest.mark.parametrize("values", [{"dataset__masks": "alpha"}, {"dataset__alpha_background": "checker"}])
def test_a_decision_about_transparency_is_not_asked_for_twice(values: dict[str, Any]) -> None:
    assert "transparent" not in codes([*GOOD, picture("odd.png", transparent=True)], **values)


def test_transparency_is_a_mask_where_the_settings_say_so() -> None:
    items = [*GOOD, picture("odd.png", transparent=True)]
    assert finding("masks-missing", items, dataset__masks="alpha").files == tuple(item.relative for item in GOOD)


def test_the_captioned_copy_is_kept() -> None:
    copy = replace(GOOD[0], relative="a copy.png", captions=())
    said = finding("exact-duplicates", [copy, *GOOD], dataset__missing_captions="trigger")
    assert said.groups == (("000.png", "a copy.png"),)
    assert said.action is not None
    assert said.action.exclude == ("a copy.png",)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"width": 600, "height": 600}, {"width": 200, "height": 200}),
        ({"measures": measures(perceptual_hash=HASH, sharpness=0.9)}, {}),
        ({"width": 900, "height": 900}, {}),
        ({}, {"measures": measures(perceptual_hash=HASH, sharpness=0.9, jpeg_quality=12)}),
    ],
)
def test_the_best_of_near_duplicates_is_kept(first: dict[str, Any], second: dict[str, Any]) -> None:
    plain = {"measures": measures(perceptual_hash=HASH ^ 0b11, sharpness=0.7)}
    said = finding(
        "near-duplicates",
        [*GOOD, picture("a.png", **(plain | second)), picture("b.png", **({"measures": plain["measures"]} | first))],
    )
    assert said.groups == (("b.png", "a.png"),)
    assert said.action is not None
    assert said.action.exclude == ("a.png",)
    assert said.details["a.png"] == "nearly the same as b.png"


def test_one_key_leaves_one_picture_of_copies_and_near_copies() -> None:
    near = picture("near.png", measures=measures(perceptual_hash=HASH ^ 1))
    first = picture("b.png", measures=measures(perceptual_hash=HASH))
    items = [*GOOD, near, first, replace(first, relative="c.png")]
    gone: set[str] = set()
    for code in ("exact-duplicates", "near-duplicates"):
        action = finding(code, items).action
        assert action is not None
        gone |= set(action.exclude)
    assert len({"near.png", "b.png", "c.png"} - gone) == 1


def test_icons_and_flat_pictures_do_not_all_look_alike() -> None:
    icons = pictures(12, measures=measures(perceptual_hash=HASH), width=64, height=64)
    flat = pictures(12, measures=measures(perceptual_hash=HASH, contrast=MIN_CONTRAST / 2))
    assert "near-duplicates" not in codes(icons)
    assert "near-duplicates" not in codes(flat)
    assert "near-duplicates" in codes(pictures(12, measures=measures(perceptual_hash=HASH)))


def test_alike_pictures_are_called_uniform() -> None:
    draw = random.Random(1)
    alike = [
        picture(
            f"{place}.png", f"a thing {place}", measures=measures(perceptual_hash=HASH ^ sum(1 << bit for bit in bits))
        )
        for place, bits in enumerate(draw.sample(range(64), 6) for _ in range(20))
    ]
    said = finding("uniform", alike, {"goal": "character"})
    assert "the pose" in said.why
    assert "uniform" not in codes(pictures(20))


@pytest.mark.parametrize(("goal", "few", "enough"), [("character", 9, 10), ("style", 14, 15), ("product", 9, 10)])
def test_the_number_that_is_enough_depends_on_the_goal(goal: str, few: int, enough: int) -> None:
    assert finding("few-pictures", pictures(few), {"goal": goal}).severity == "note"
    assert "few-pictures" not in codes(pictures(enough), {"goal": goal})


def test_a_single_picture_is_a_warning() -> None:
    said = finding("few-pictures", pictures(1))
    assert said.severity == "warning"
    assert "only 1 different picture" in said.title
    assert "only 1 different picture" in finding("few-pictures", [GOOD[0], replace(GOOD[0], relative="b.png")]).title


def test_several_datasets_are_balanced_by_their_weights() -> None:
    items = [*pictures(12), *(picture(f"more/{place}.png", f"it {place}", dataset=1) for place in range(3))]
    said = finding("class-imbalance", items, dataset__more_folders=["/more"])
    assert said.action is not None
    assert said.action.settings == {"dataset.weights": [1.0, 4.0]}
    assert finding("class-imbalance", classes(cat=10, dog=2)).action is None
    weighted = finding("class-imbalance", items, dataset__more_folders=["/more"], dataset__weights=[1.0, 1.0])
    assert (said.severity, weighted.severity) == ("warning", "note")


def test_repeats_count_for_the_balance_of_classes() -> None:
    items = [replace(item, repeats=5.0) if item.class_name == "dog" else item for item in classes(cat=10, dog=2)]
    assert "class-imbalance" not in codes(items)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: recompressed(image, 30),
        lambda image: image.resize((image.width // 2, image.height // 2)),
        lambda image: ImageEnhance.Brightness(image).enhance(1.1),
        lambda image: ImageEnhance.Contrast(image).enhance(1.2),
        lambda image: image.crop((8, 5, image.width - 8, image.height - 5)),
        lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    ],
    ids=["recompressed", "half the size", "brighter", "more contrast", "cropped", "blurred"],
)
def test_changed_photographs_are_near_duplicates_of_themselves_alone(
    change: Callable[[Image.Image], Image.Image],
) -> None:
    originals = [photo(seed) for seed in range(4)]
    measured = [measure_picture(image) for image in originals] + [measure_picture(change(image)) for image in originals]
    assert near_groups(measured) == [[place, place + 4] for place in range(4)]


def test_blurred_photographs_are_told_from_crisp_ones() -> None:
    image = photo(7)
    assert measure_picture(image).sharpness > 2 * MIN_SHARPNESS
    assert measure_picture(image.resize((512, 341)).filter(ImageFilter.GaussianBlur(1))).sharpness > MIN_SHARPNESS
    assert measure_picture(image.resize((512, 341)).filter(ImageFilter.GaussianBlur(4))).sharpness < MIN_SHARPNESS


hashes = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 2**9 - 1), max_size=30)


@settings(deadline=None)
@given(hashes)
def test_groups_are_the_connected_parts(values: list[int]) -> None:
    groups = near_groups([measures(perceptual_hash=value) for value in values])
    parts = {place: {place} for place in range(len(values))}
    for one in range(len(values)):
        for two in range(one):
            if (values[one] ^ values[two]).bit_count() <= NEAR_BITS:
                joined = parts[one] | parts[two]
                for member in joined:
                    parts[member] = joined
    expected = {tuple(sorted(part)) for part in parts.values() if len(part) > 1}
    assert {tuple(group) for group in groups} == expected


def test_no_measures_no_groups() -> None:
    empty: list[Measures] = []
    assert near_groups(empty) == []
