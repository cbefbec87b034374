"""Prompts: the trigger exactly once and first, whatever captions say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.engine.config import CaptionSettings
from lorasmith.engine.dataset.captions import MAX_CAPTION_BYTES, caption_for, compose, read_caption, require_trigger
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


def item(caption: str | None, regularization: bool = False) -> ImageItem:
    return ImageItem(
        Path("a.png"),
        "a.png",
        "00",
        64,
        64,
        captions=() if caption is None else (caption,),
        regularization=regularization,
    )


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


@settings(deadline=None)
@given(
    caption=captions,
    trigger=triggers,
    keep=st.integers(0, 4),
    dropout=st.sampled_from([0.0, 0.5, 1.0]),
    place=st.tuples(st.integers(0, 9), st.integers(0, 99)),
)
def test_shuffle_and_dropout_keep_the_trigger_once_and_first(
    caption: str | None, trigger: str, keep: int, dropout: float, place: tuple[int, int]
) -> None:
    settings = CaptionSettings(trigger=trigger, shuffle=True, keep_tokens=keep, dropout=dropout)
    prompt = caption_for(item(caption), settings, 1, *place)
    assert prompt == trigger or prompt.startswith(f"{trigger}, ")
    assert count(prompt, trigger) == 1
    if dropout == 1.0:
        assert prompt == trigger


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
