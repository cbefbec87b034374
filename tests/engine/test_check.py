"""Everything that is said of a dataset: in order, the same every time, about its own pictures, with keys that work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from lorasmith.engine.dataset.buckets import plan_buckets
from lorasmith.engine.dataset.check import build_context, caption_statistics, check_dataset
from lorasmith.engine.dataset.check_captions import reading_tokenizers
from lorasmith.engine.dataset.findings import SEVERITIES, CheckContext, Finding, counted
from lorasmith.engine.dataset.items import Dataset, ImageItem, Measures
from lorasmith.engine.dataset.scan import scan_dataset
from lorasmith.engine.families import families
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.presets import demo

from .checked import LetterTokenizer, config, context, dataset, found, picture, pictures
from .photos import photo
from .test_triggers import write_lora, write_run

share = st.floats(0, 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    [
        "zqx, a cat",
        "[trigger] {a|b}",
        "a\nb",
        "<b>zqx</b>",
        "(zqx:1.2)",
        "cafÃ©",
        "1girl, solo, hat, tree",
        "",
        "{{|",
        "IMG_1",
    ]
)
sides = st.integers(1, 5000)
some_measures = st.builds(
    Measures, st.integers(0, 2**64 - 1), st.floats(0, 2), share, share, share, st.none() | st.integers(1, 100)
)
items = st.builds(
    ImageItem,
    path=st.just(Path("/data/a.png")),
    relative=st.just(""),
    sha256=st.sampled_from(["aa", "bb", "cc"]) | st.text("0123456789abcdef", min_size=8, max_size=8),
    width=sides,
    height=sides,
    repeats=st.sampled_from([0.5, 1.0, 1.5, 10.0]),
    captions=st.lists(texts, max_size=2).map(tuple),
    regularization=st.booleans(),
    notes=st.sampled_from([(), ("not UTF-8, read as Windows-1252",)]),
    transparent=st.booleans(),
    measures=st.none() | some_measures,
    mask_path=st.none() | st.just(Path("/data/mask.png")),
    mask_share=st.none() | share,
    dataset=st.integers(0, 1),
    class_name=st.sampled_from(["", "cat"]),
)
contexts = st.builds(
    CheckContext,
    config=st.sampled_from(
        [
            config(),
            config(captions__trigger="", dataset__missing_captions="trigger"),
            config(captions__trigger="ohwx cat", captions__shuffle=True, dataset__masks="alpha", dataset__flip=True),
            config(dataset__buckets=False, dataset__more_folders=["/more"], captions__lines="choose"),
        ]
    ),
    base_label=st.sampled_from(["", "Base X"]),
    caption_style=st.sampled_from(["", "tags", "prose"]),
    token_limit=st.sampled_from([0, 10]),
    tokenizers=st.sampled_from([[], [LetterTokenizer("cat")]]),
    goal=st.sampled_from(["", "character", "style", "product", "concept", "nonsense"]),
    other_triggers=st.sampled_from([{}, {"zqx": "a"}, {"zqxy": "b"}]),
)


def require_sound(said: Finding, about: CheckContext, names: set[str]) -> None:
    assert set(said.files) <= names
    assert len(set(said.files)) == len(said.files)
    assert set(said.details) <= set(said.files)
    assert all(set(group) <= names for group in said.groups)
    assert said.title.endswith(".")
    assert "  " not in said.title
    assert said.why
    assert said.fix
    if said.action is not None:
        assert said.action.label
        assert said.action.settings or said.action.exclude or said.action.captions
        assert set(said.action.exclude) <= names
        assert set(said.action.captions) <= names
        changes = [
            Layer("key", {key.split(".")[0]: {key.split(".")[1]: value}}) for key, value in said.action.settings.items()
        ]
        resolve_config([Layer("before", about.config.model_dump()), *changes])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=150)
@given(st.lists(items, max_size=12), contexts)
def test_any_dataset_gives_sound_findings(drawn: list[ImageItem], about: CheckContext) -> None:
    named = [replace(item, relative=f"{place}.png") for place, item in enumerate(drawn)]
    plan = plan_buckets(named, about.config.dataset)
    said = check_dataset(dataset(named), plan, about)
    for one in said:
        require_sound(one, about, {item.relative for item in named})
    assert [one.severity for one in said] == sorted((one.severity for one in said), key=SEVERITIES.index)
    assert check_dataset(dataset(named), plan, about) == said
    caption_statistics(dataset(named), about)


def test_errors_come_first_then_warnings_then_notes() -> None:
    odd = picture("odd.png", None, width=100, height=100, transparent=True)
    severities = [said.severity for said in found([*pictures(5), odd])]
    assert severities == sorted(severities, key=SEVERITIES.index)
    assert set(severities) == set(SEVERITIES)


@pytest.mark.parametrize("goal", ["", "character", "style", "product"])
def test_the_demo_has_nothing_found_against_it(goal: str) -> None:
    values = resolve_config([Layer("demo", demo.settings())]).config
    scanned = scan_dataset(values.dataset)
    plan = plan_buckets(scanned.items, values.dataset)
    for family in families().values():
        about = build_context(values, spec=family.SPEC, goal=goal, other_triggers={})
        assert check_dataset(scanned, plan, about) == []


def test_an_empty_dataset_is_no_trouble() -> None:
    assert found([]) == []


def test_the_context_takes_the_token_limit_of_the_encoder_that_reads_most() -> None:
    class Endless(LetterTokenizer):
        model_max_length = int(1e30)

    spec = next(iter(families().values())).SPEC
    assert build_context(config(), spec=spec, other_triggers={}).token_limit == spec.token_limit
    assert build_context(config(), spec=spec, tokenizers=[Endless()], other_triggers={}).token_limit == spec.token_limit
    small = LetterTokenizer()
    small.model_max_length = 32
    assert build_context(config(), spec=spec, tokenizers=[small], other_triggers={}).token_limit == 32
    both = build_context(config(), spec=spec, tokenizers=[Endless(), small], other_triggers={})
    assert both.token_limit == spec.token_limit
    endless = Endless()
    assert reading_tokenizers([small, endless], 77) == [endless]
    assert reading_tokenizers([small], 32) == [small]
    assert build_context(config(), tokenizers=[Endless()], other_triggers={}).token_limit == 0


def test_the_context_says_what_the_base_is() -> None:
    spec = next(iter(families().values())).SPEC
    about = build_context(config(), spec=spec, goal="style", other_triggers={})
    assert (about.base_label, about.caption_style, about.pixel_multiple) == (
        spec.label,
        spec.caption_style,
        spec.pixel_multiple,
    )
    assert build_context(config(), spec=spec, label="My base", other_triggers={}).base_label == "My base"
    unknown = build_context(config(), other_triggers={})
    assert (unknown.base_label, unknown.caption_style, unknown.token_limit) == ("", "", 0)


def test_triggers_of_earlier_runs_are_found_by_themselves(tmp_path: Path) -> None:
    write_run(tmp_path / "dog-1", "zqx", "dog", "/data/dogs")
    write_lora(tmp_path / "other.safetensors", trigger_words="ohwx")
    about = build_context(config(run__output_folder=str(tmp_path), run__name="cat"))
    assert about.other_triggers == {"zqx": "dog-1", "ohwx": "other.safetensors"}
    said = {
        one.code for one in check_dataset(Dataset(tmp_path, (), (), 0), plan_buckets([], about.config.dataset), about)
    }
    assert "trigger-taken" in said


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 pictures are"), (1, "1 picture is"), (2, "2 pictures are"), (1234, "1,234 pictures are")],
)
def test_counts_have_the_words_that_fit(count: int, words: str) -> None:
    assert counted(count, "picture is", "pictures are") == words


def test_the_base_and_the_goal_are_named_in_the_reasons() -> None:
    about: dict[str, Any] = {"base_label": "Base X", "caption_style": "prose", "goal": "style"}
    tags = [picture(f"{n}.png", f"1girl, red hair, hat, tree, number {n}") for n in range(10)]
    said = {one.code: one for one in found(tags, about)}
    assert "Base X" in said["tags-for-prose"].title
    assert "a style" in said["few-pictures"].title


def test_pictures_that_are_left_out_of_the_plan_are_checked_for_what_needs_no_plan() -> None:
    items = [*pictures(11), picture("odd.png", None, width=50, height=50)]
    about = context(dataset__missing_captions="exclude")
    plan = plan_buckets(items[:-1], about.config.dataset)
    said = {one.code: one for one in check_dataset(dataset(items), plan, about)}
    assert "too-small" not in said
    assert said["captions-missing"].files == ("odd.png",)


def test_troubles_of_a_folder_of_photographs_are_found_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        write_photo(folder, f"good-{number}", photo(number), f"zqx, woman in place number {number}")
    first = photo(0)
    bars = Image.new("RGB", (768, 700), "black")
    bars.paste(photo(20), (0, 94))
    odd = {
        "letterbox": bars,
        "blurred": photo(21).filter(ImageFilter.GaussianBlur(6)),
        "too-small": photo(22, (300, 200)),
        "near-duplicates": first.resize((700, 467)),
        "very-dark": ImageEnhance.Brightness(photo(23)).enhance(0.12),
    }
    for code, image in odd.items():
        write_photo(folder, f"odd-{code}", image, f"zqx, something else with {code}")
    write_photo(folder, "odd-jpeg-artefacts", photo(24), "zqx, a blocky place", quality=15)
    values = config(dataset__folder=str(folder))
    scanned = scan_dataset(values.dataset)
    said = {one.code: one for one in check_dataset(scanned, plan_buckets(scanned.items, values.dataset), context())}
    assert set(said) == {*odd, "jpeg-artefacts"}
    for code, one in said.items():
        assert one.files[0] == f"odd-{code}.jpg" or one.groups == (("good-0.jpg", f"odd-{code}.jpg"),)


def write_photo(folder: Path, name: str, image: Image.Image, caption: str, quality: int = 92) -> None:
    image.save(folder / f"{name}.jpg", quality=quality)
    (folder / f"{name}.txt").write_text(caption)
