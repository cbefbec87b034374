"""Prompts: the trigger exactly once and first, whatever captions say."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.engine.config import CaptionSettings
from lorasmith.engine.dataset.captions import (
    MAX_CAPTION_BYTES,
    caption_choices,
    caption_for,
    compose,
    expand_wildcards,
    full_prompt,
    is_drawn,
    read_caption,
    require_trigger,
    sample_prompts,
    split_tags,
)
from lorasmith.engine.dataset.items import ImageItem
from lorasmith.engine.errors import ConfigError

words = st.sampled_from(
    ["zqx", "ZQX", "zqxy", "a", "b", "red", ",", ", ,", "[trigger]", "[Trigger]", "  ", "\n", "zqx's"]
)
captions = st.one_of(st.none(), st.text(max_size=40), st.lists(words, max_size=14).map(" ".join))
triggers = st.sampled_from(["zqx", "a b", "Ünï", "日本", "v1.0", "<zq>", "a", "b b"])


def count(text: str, trigger: str) -> int:
    """Count whole words, overlapping ones too, in any case."""
    return len(re.findall(rf"(?<!\w)(?={re.escape(trigger.lower())}(?!\w))", text.lower()))


def item(*captions: str | None, regularization: bool = False, sha256: str = "00") -> ImageItem:
    given = tuple(caption for caption in captions if caption is not None)
    return ImageItem(Path("a.png"), "a.png", sha256, 64, 64, captions=given, regularization=regularization)


@settings(deadline=None)
@given(caption=captions, trigger=triggers)
def test_the_trigger_is_there_exactly_once_and_first(caption: str | None, trigger: str) -> None:
    prompt = compose(caption, trigger)
    assert prompt == trigger or prompt.startswith(f"{trigger}, ")
    assert count(prompt, trigger) == 1
    assert "\n" not in prompt
    assert "[trigger]" not in prompt.lower()
    assert compose(prompt, trigger) == prompt


@settings(deadline=None)
@given(caption=captions, trigger=triggers)
def test_regularization_prompts_never_hold_the_trigger(caption: str | None, trigger: str) -> None:
    assert count(compose(caption, trigger, regularization=True), trigger) == 0


texts = st.one_of(
    st.just(""),
    st.lists(
        st.one_of(words, st.sampled_from(["{", "}", "|", "\\", "{zqx|a}", "{a|{b|[trigger]}}", "\n"])), max_size=10
    ).map(" ".join),
)
caption_settings = st.builds(
    CaptionSettings,
    trigger=triggers,
    shuffle=st.booleans(),
    keep_tokens=st.integers(0, 4),
    dropout=st.sampled_from([0.0, 0.5, 1.0]),
    tag_dropout=st.sampled_from([0.0, 0.4, 1.0]),
    prefix=texts,
    suffix=texts,
    lines=st.sampled_from(["join", "choose"]),
    wildcards=st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(
    captions=st.lists(texts, max_size=3),
    options=caption_settings,
    regularization=st.booleans(),
    place=st.tuples(st.integers(0, 9), st.integers(0, 99)),
)
def test_whatever_is_set_the_trigger_is_once_and_first_and_never_in_regularization(
    captions: list[str], options: CaptionSettings, regularization: bool, place: tuple[int, int]
) -> None:
    trigger = options.trigger
    drawn = caption_for(item(*captions, regularization=regularization), options, 1, *place)
    for prompt in (drawn, *(full_prompt(caption, options, regularization) for caption in [None, *captions])):
        assert "\n" not in prompt
        assert "[trigger]" not in prompt.lower()
        assert count(prompt, trigger) == (0 if regularization else 1)
        assert regularization or prompt == trigger or prompt.startswith(f"{trigger}, ")
    if options.dropout == 1.0:
        assert drawn == ("" if regularization else trigger)


@settings(max_examples=200, deadline=None)
@given(caption=texts, options=caption_settings, regularization=st.booleans())
def test_where_nothing_is_drawn_every_use_has_the_full_prompt(
    caption: str, options: CaptionSettings, regularization: bool
) -> None:
    picture = item(caption, regularization=regularization)
    drawn = {caption_for(picture, options, 1, epoch, index) for epoch in range(2) for index in range(3)}
    if not is_drawn(picture, options):
        assert drawn == {full_prompt(caption, options, regularization)}


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("a red circle", "zqx, a red circle"),
        ("zqx, a red circle", "zqx, a red circle"),
        ("a red circle, ZQX, on blue", "zqx, a red circle, on blue"),
        ("photo of [trigger] dog", "zqx, photo of dog"),
        ("a zqxy thing", "zqx, a zqxy thing"),
        ("1,000 people\nand a dog", "zqx, 1,000 people and a dog"),
        ("zqx", "zqx"),
        ("", "zqx"),
        (None, "zqx"),
    ],
)
def test_prompts_by_example(caption: str | None, prompt: str) -> None:
    assert compose(caption, "zqx") == prompt


def test_a_trigger_that_appears_by_taking_one_out_is_taken_out_too() -> None:
    assert compose("a a b b, red", "a b") == "a b, red"
    assert compose("[tri[trigger]gger] dog", "zqx") == "zqx, [tri gger] dog"


def test_without_a_trigger_the_caption_stands_alone() -> None:
    assert compose("a [trigger] cat", "") == "a cat"


def test_dropout_leaves_regularization_pictures_an_empty_prompt() -> None:
    settings = CaptionSettings(trigger="zqx", dropout=1.0)
    assert caption_for(item("a dog", regularization=True), settings, 1, 0, 0) == ""


def test_shuffling_moves_only_tags_after_the_kept_ones_and_loses_none() -> None:
    settings = CaptionSettings(trigger="zqx", shuffle=True, keep_tokens=2)
    prompts = {caption_for(item("first, a, b, c, d"), settings, 1, 0, index) for index in range(20)}
    assert len(prompts) > 5
    for prompt in prompts:
        assert prompt.startswith("zqx, first, ")
        assert sorted(prompt.split(", ")) == ["a", "b", "c", "d", "first", "zqx"]


def test_prefix_and_suffix_stand_around_the_caption_whatever_happens_to_its_tags() -> None:
    settings = CaptionSettings(
        trigger="zqx", prefix="photo of [trigger],", suffix=", grainy film", shuffle=True, tag_dropout=0.5
    )
    prompts = {caption_for(item("a, b, c"), settings, 1, 0, index) for index in range(60)}
    for prompt in prompts:
        assert prompt.startswith("zqx, photo of")
        assert prompt.endswith(", grainy film")
        assert set(split_tags(prompt)) <= {"zqx", "photo of", "a", "b", "c", "grainy film"}
    assert {len(split_tags(prompt)) for prompt in prompts} == {3, 4, 5, 6}
    assert full_prompt("a", settings) == full_prompt("[trigger] a", settings) == "zqx, photo of, a, grainy film"
    assert full_prompt(None, settings) == "zqx, photo of, grainy film"
    assert full_prompt("a", settings, regularization=True) == "photo of, a, grainy film"


def test_a_dropped_caption_takes_prefix_and_suffix_with_it() -> None:
    settings = CaptionSettings(trigger="zqx", prefix="photo of", suffix="at night", dropout=1.0)
    assert caption_for(item("a dog"), settings, 1, 0, 0) == "zqx"


def test_tags_are_dropped_as_often_as_asked_and_never_the_kept_ones() -> None:
    settings = CaptionSettings(trigger="zqx", tag_dropout=0.3, keep_tokens=2)
    prompts = [split_tags(caption_for(item("first, a, b, c"), settings, 1, 0, index)) for index in range(500)]
    assert all(prompt[:2] == ["zqx", "first"] for prompt in prompts)
    assert all(prompt[2:] == sorted(prompt[2:]) for prompt in prompts)  # not shuffled
    for tag in "abc":
        assert sum(tag in prompt for prompt in prompts) == pytest.approx(350, abs=40)


def test_keep_tokens_counts_the_trigger_only_where_there_is_one() -> None:
    settings = CaptionSettings(trigger="zqx", shuffle=True, keep_tokens=1)
    regular = {caption_for(item("first, a, b, c", regularization=True), settings, 1, 0, index) for index in range(20)}
    assert {prompt.split(", ")[0] for prompt in regular} == {"first"}
    trained = {caption_for(item("first, a, b, c"), settings, 1, 0, index) for index in range(40)}
    assert {prompt.split(", ")[1] for prompt in trained} == {"first", "a", "b", "c"}


def test_each_use_draws_one_of_several_captions() -> None:
    settings = CaptionSettings(trigger="zqx")
    prompts = [caption_for(item("a cat", "a feline, red"), settings, 1, 0, index) for index in range(200)]
    assert set(prompts) == {"zqx, a cat", "zqx, a feline, red"}
    assert 70 < prompts.count("zqx, a cat") < 130


def test_lines_are_one_caption_or_one_each() -> None:
    two = item("a cat\n\n  a dog \n", "a bird")
    joined = {caption_for(two, CaptionSettings(trigger="zqx"), 1, 0, index) for index in range(50)}
    assert joined == {"zqx, a cat a dog", "zqx, a bird"}
    choose = CaptionSettings(trigger="zqx", lines="choose")
    assert {caption_for(two, choose, 1, 0, index) for index in range(50)} == {"zqx, a cat", "zqx, a dog", "zqx, a bird"}
    assert caption_choices(["\n \n"], choose) == []
    assert caption_for(item("\n \n"), choose, 1, 0, 0) == "zqx"
    assert full_prompt("a cat\na longer dog", choose) == "zqx, a longer dog"


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("a {red|green} dog", {"a red dog", "a green dog"}),
        ("{a|{b|c}}d", {"ad", "bd", "cd"}),
        ("{|very }big", {"big", "very big"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{cat}", {"{cat}"}),
        ("{a|{cat}}", {"a", "{cat}"}),
        ("{}", {"{}"}),
        ("a|b", {"a|b"}),
        ("{a|b", {"{a|b"}),
        ("a|b}", {"a|b}"}),
        ("}{", {"}{"}),
        ("{x {a|b}", {"{x a", "{x b"}),
        (r"\{a|b\}", {"{a|b}"}),
        (r"{a\|b|c}", {"a|b", "c"}),
        (r"cat \(animal\)", {r"cat \(animal\)"}),
        ("\\", {"\\"}),
    ],
)
def test_wildcards_by_example(text: str, choices: set[str]) -> None:
    settings = CaptionSettings(prefix=text, wildcards=True)
    assert {expand_wildcards(text, random.Random(seed).choice) for seed in range(60)} == choices
    drawn = {caption_for(item(None), settings, 1, 0, index) for index in range(60)}
    assert drawn == {compose(choice, "") for choice in choices}
    assert full_prompt(None, settings) in drawn
    assert caption_for(item(None), CaptionSettings(prefix=text), 1, 0, 0) == compose(text, "")


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="{}|\\ab ", max_size=40))
def test_any_text_can_be_read_for_wildcards(text: str) -> None:
    seen: list[int] = []

    def first(choices: list[str]) -> str:
        seen.append(len(choices))
        return choices[0]

    result = expand_wildcards(text, first)
    assert all(number > 1 for number in seen)
    assert len(seen) <= text.count("{")
    if not seen and "\\" not in text:
        assert result == text


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("a, b ,c", ["a", "b", "c"]),
        (" , a,, b\nc ,", ["a", "b c"]),
        ("", []),
        ("1,000 people, 2 dogs", ["1,000 people", "2 dogs"]),
        ("score_9,score_8_up,1girl,2boys", ["score_9", "score_8_up", "1girl", "2boys"]),
    ],
)
def test_tags_are_split_at_commas_but_not_inside_numbers(text: str, tags: list[str]) -> None:
    assert split_tags(text) == tags


def test_samples_are_the_exact_texts_of_the_first_epoch() -> None:
    settings = CaptionSettings(trigger="zqx", shuffle=True, wildcards=True, tag_dropout=0.2, dropout=0.1)
    items = [item("a, b, {c|d}, e", sha256=str(number)) for number in range(5)]
    samples = sample_prompts(items, settings, seed=3)
    assert samples == [(picture, caption_for(picture, settings, 3, 0, 0)) for picture in items[:3]]
    assert len(sample_prompts(items, settings, seed=3, count=9)) == 5


def test_pictures_draw_apart_from_one_another() -> None:
    settings = CaptionSettings(trigger="zqx", shuffle=True)
    items = [item("a, b, c, d, e, f", sha256=str(number)) for number in range(20)]
    assert len({text for _, text in sample_prompts(items, settings, 1, 20)}) > 15


def test_the_same_place_in_the_run_gives_the_same_prompt() -> None:
    settings = CaptionSettings(trigger="zqx", shuffle=True, dropout=0.3)
    draw = [caption_for(item("a, b, c, d, e"), settings, 7, epoch, index) for epoch in range(3) for index in range(9)]
    again = [caption_for(item("a, b, c, d, e"), settings, 7, epoch, index) for epoch in range(3) for index in range(9)]
    assert draw == again
    assert 0 < draw.count("zqx") < len(draw)


@pytest.mark.parametrize("trigger", ["", "   "])
def test_an_empty_or_blank_trigger_is_refused(trigger: str) -> None:
    with pytest.raises(ConfigError, match="trigger"):
        require_trigger(CaptionSettings(trigger=trigger))
    require_trigger(CaptionSettings(trigger="zqx"))


@pytest.mark.parametrize(
    ("data", "text", "note"),
    [
        ("a “red” dog".encode(), "a “red” dog", ""),
        (b"\xef\xbb\xbfa dog", "a dog", ""),
        ("a “red” dog".encode("cp1252"), "a “red” dog", "Windows-1252"),
        ("ein Hündchen".encode("utf-16"), "ein Hündchen", "UTF-16"),
        (b"  \n", "  \n", "empty"),
        (b"a\0b", None, "not a text file"),
        (b"x" * (MAX_CAPTION_BYTES + 1), None, "larger"),
    ],
)
def test_caption_files_are_read_in_their_encoding(tmp_path: Path, data: bytes, text: str | None, note: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    read, remark = read_caption(tmp_path / "a.txt")
    assert read == text
    assert note in remark
    assert bool(note) == bool(remark)
