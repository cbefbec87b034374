"""What is found wrong with captions, for which base and goal, and that good ones are left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.engine.dataset.check_captions import caption_statistics, count_tokens
from lorasmith.engine.dataset.check_characters import repair_encoding
from lorasmith.engine.dataset.check_wording import is_prose, is_tags
from lorasmith.engine.dataset.items import ImageItem

from .checked import LetterTokenizer, codes, context, dataset, finding, found, picture, pictures

SENTENCE = "A woman in a long red dress stands at the gate of an old garden and looks back number "
TAGS = "1girl, red hair, long dress, garden, gate, number "


def captioned(*captions: str | None) -> list[ImageItem]:
    return [picture(f"{number:03}.png", caption) for number, caption in enumerate(captions)]


def odd(caption: str | None, **changes: Any) -> list[ImageItem]:
    """Good pictures, and one with that caption."""
    return [*pictures(10), picture("odd.png", caption, **changes)]


def numbered(text: str, count: int = 10) -> list[ImageItem]:
    return captioned(*(f"{text}{number}" for number in range(count)))


PROSE_BASE = {"caption_style": "prose", "base_label": "Base P"}
TAG_BASE = {"caption_style": "tags", "base_label": "Base T"}
STYLE, CHARACTER = {"goal": "style"}, {"goal": "character"}

# Code, captions that have the trouble, captions that do not, what is known, settings.
CASES: list[tuple[str, list[ImageItem], list[ImageItem], dict[str, Any], dict[str, Any]]] = [
    ("captions-missing", odd(None), odd(""), {}, {}),
    ("captions-empty", odd(" \n"), odd(None), {}, {}),
    ("captions-too-long", odd("x" * 40), odd("x" * 20), {"tokenizers": [LetterTokenizer()], "token_limit": 26}, {}),
    (
        "captions-encoding",
        odd("é", notes=("not UTF-8, read as Windows-1252",)),
        odd("é", notes=("EXIF turned",)),
        {},
        {},
    ),
    ("captions-twice", odd("a", notes=("has another caption in odd.caption, which is not used",)), odd("a"), {}, {}),
    ("choices-not-drawn", odd("a {red|blue} thing"), odd("a {red} thing"), {}, {}),
    ("captions-of-lines", odd("one\ntwo"), odd("one\n"), {}, {}),
    ("trigger-place", odd("a zqx thing"), odd("zqx thing"), {}, {}),
    ("trigger-place", odd("zqx, a ZQX thing"), odd("zqxy, azqx"), {}, {}),
    ("trigger-missing", odd("zqx thing"), pictures(10), {}, {}),
    ("trigger-placeholder", odd("[trigger] thing"), odd("(trigger) thing"), {}, {}),
    ("trigger-in-regularization", odd("zqx", regularization=True), odd("a thing", regularization=True), {}, {}),
    ("no-trigger", pictures(3), [], {}, {"captions__trigger": ""}),
    ("tags-for-prose", numbered(TAGS), numbered(SENTENCE), PROSE_BASE, {}),
    ("prose-for-tags", numbered(SENTENCE), numbered(TAGS), TAG_BASE, {}),
    ("prose-for-tags", numbered(SENTENCE), numbered("a woman sitting on a bench in front of house "), TAG_BASE, {}),
    ("shuffled-prose", numbered(SENTENCE), numbered(TAGS), {}, {"captions__shuffle": True}),
    ("shuffled-prose", numbered(SENTENCE), numbered(TAGS), {}, {"captions__tag_dropout": 0.1}),
    ("captions-identical", captioned(*["a cat"] * 6, "b", "c", "d"), captioned(*["a cat"] * 4, *"bcdef"), {}, {}),
    ("competing-tags", numbered("zqx, blue hair, smiling "), numbered("zqx, woman, smiling "), CHARACTER, {}),
    ("style-described", numbered("a watercolor of a house "), numbered("a house "), STYLE, {}),
    ("style-described", numbered("a house in the style of zqx, "), numbered("stylish house "), STYLE, {}),
    ("marks-mentioned", odd("a house, watermark"), odd("a house, water"), {}, {}),
    ("captions-like-names", odd("IMG_2041"), odd("2 cats"), {}, {}),
    ("captions-like-names", odd("DSC00012.JPG"), odd("a photo of 3"), {}, {}),
    ("mirrored-sides", odd("a cat on the left"), odd("a cat"), {}, {"dataset__flip": True}),
    ("characters-lost", odd("a caf\ufffd"), odd("a café"), {}, {}),
    ("characters-spoiled", odd("a cafÃ©"), odd("Âme, SÃO PAULO, «â»"), {}, {}),
    ("characters-spoiled", odd("it\u00e2\u20ac\u2122s"), odd("it’s 5 €"), {}, {}),
    ("control-characters", odd("a\u200bcat"), odd("a\tcat 👩\u200d🚀"), {}, {}),
    ("control-characters", odd("a\x1b[31mcat"), odd("日本 ünï"), {}, {}),
    ("html", odd("a <b>cat</b>"), odd("a < b > c, <3"), {}, {}),
    ("html", odd("salt &amp; pepper"), odd("salt & pepper; AT&T"), {}, {}),
    ("prompt-commands", odd("(cat:1.2), tree"), odd("a cat (black), 16:9"), {}, {}),
    ("prompt-commands", odd("cat <lora:x:0.8>"), odd("no break"), {}, {}),
    ("prompt-commands", odd(r"rin \(fate\)"), odd("rin (fate)"), {}, {}),
]


@pytest.mark.parametrize(("code", "bad", "good", "facts", "values"), CASES)
def test_each_trouble_is_found_and_only_where_it_is(
    code: str, bad: list[ImageItem], good: list[ImageItem], facts: dict[str, Any], values: dict[str, Any]
) -> None:
    said = finding(code, bad, facts, **values)
    assert said.title.endswith(".")
    assert said.why
    assert said.fix
    assert code not in codes(good, facts, **values)
    if any(item.relative == "odd.png" for item in bad) and code != "trigger-missing":
        assert said.files == ("odd.png",)


@pytest.mark.parametrize(
    "good",
    [numbered(TAGS), numbered("a large red circle on a gray background, center, "), numbered("zqx, woman, smiling ")],
    ids=["tags", "phrases", "with the trigger"],
)
def test_good_captions_have_nothing_found_against_them(good: list[ImageItem]) -> None:
    about = TAG_BASE | {"tokenizers": [LetterTokenizer()], "token_limit": 200, "goal": ""}
    assert [said for said in found(good, about) if said.severity != "note"] == []


def test_good_prose_has_nothing_found_against_it() -> None:
    assert found(numbered(SENTENCE), PROSE_BASE) == []


@pytest.mark.parametrize(
    ("choice", "name", "severity"),
    [
        ("ask", "a.png", "error"),
        ("trigger", "a.png", "note"),
        ("filename", "a red cat.png", "note"),
        ("filename", "IMG_1.png", "error"),
        ("folder", "5_cat/a.png", "note"),
        ("exclude", "a.png", "note"),
    ],
)
def test_missing_captions_are_an_error_while_a_run_would_not_start(choice: str, name: str, severity: str) -> None:
    said = finding("captions-missing", [*pictures(10), picture(name, None)], dataset__missing_captions=choice)
    assert said.severity == severity
    assert (said.action is not None) == (severity == "error")


def test_leaving_out_everything_is_an_error() -> None:
    said = finding("captions-missing", captioned(None, None), dataset__missing_captions="exclude")
    assert said.severity == "error"
    assert "nothing to train on" in said.why


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("a red cat on a mat.png", "filename"),
        ("old-cat_sits_there.png", "filename"),
        ("IMG_2041.jpg", "trigger"),
        ("cat.png", "trigger"),
        ("a/b/12 34 56.png", "trigger"),
    ],
)
def test_the_choice_that_fits_the_names_of_the_files_is_offered(name: str, choice: str) -> None:
    action = finding("captions-missing", [*pictures(3), picture(name, None)]).action
    assert action is not None
    assert action.settings == {"dataset.missing_captions": choice}


REPAIRS = [
    ("characters-spoiled", "a cafÃ© â€“ itâ€™s", "a café – it’s"),
    ("control-characters", "a\u200b cat\u2028on a mat\x00", "a cat on a mat"),
    ("html", "a <b>cat</b> &amp; dog<br/>", "a cat & dog"),
    ("prompt-commands", r"<lora:x:1>, (red cat:1.3), rin \(fate\) BREAK, tree", "red cat, rin (fate), tree"),
    ("trigger-place", "a zqx cat, Zqx", "zqx, a cat"),
    ("captions-encoding", "it’s", "it’s"),
]


@pytest.mark.parametrize(("code", "before", "after"), REPAIRS)
def test_one_key_repairs_a_caption(code: str, before: str, after: str) -> None:
    notes = ("caption odd.txt: not UTF-8, read as Windows-1252",) if code == "captions-encoding" else ()
    action = finding(code, odd(before, notes=notes)).action
    assert action is not None
    assert action.captions == {"odd.png": after}
    again = odd(after, notes=notes, caption_source="overlay")
    assert code not in codes(again)


def test_a_picture_with_several_captions_is_not_rewritten_to_one() -> None:
    items = [*pictures(10), picture("odd.png", captions=("a\u200bcat", "a dog"))]
    said = finding("control-characters", items)
    assert said.files == ("odd.png",)
    assert said.action is None


def test_constant_tags_can_be_taken_out_with_one_key() -> None:
    said = finding("competing-tags", numbered("zqx, blue hair, Smiling, number "), CHARACTER)
    assert said.severity == "warning"
    assert said.action is not None
    assert said.action.captions["003.png"] == "zqx, number 3"
    assert "character" in said.why
    assert finding("competing-tags", numbered("blue hair, smiling, number ")).severity == "note"


def test_the_word_that_all_captions_begin_with_is_offered_as_the_trigger() -> None:
    action = finding("no-trigger", numbered("ohwx, a cat "), captions__trigger="").action
    assert action is not None
    assert action.settings == {"captions.trigger": "ohwx"}
    assert finding("no-trigger", pictures(5), captions__trigger="").action is None


def test_choices_that_are_drawn_are_no_trouble() -> None:
    assert "choices-not-drawn" not in codes(odd("a {red|blue} thing"), captions__wildcards=True)
    assert "captions-of-lines" not in codes(odd("one\ntwo"), captions__lines="choose")


def test_tokens_are_those_of_the_whole_prompt_and_each_text_is_read_once() -> None:
    tokenizer = LetterTokenizer("dog")
    about = {"tokenizers": [tokenizer], "token_limit": 14}
    said = finding("captions-too-long", captioned("dog", "cats and", "dog", "cats"), about, captions__suffix="the end")
    # Start, "zqx," and "theend" are letters, end: 12 tokens around each caption.
    assert said.files == ("001.png", "003.png")
    assert said.details == {"001.png": "19 of 14 tokens", "003.png": "16 of 14 tokens"}
    assert len(tokenizer.read) == len(set(tokenizer.read)) == 3


def test_the_tokenizer_that_needs_most_counts() -> None:
    assert count_tokens(["dog", "a"], [LetterTokenizer("dog"), LetterTokenizer()]) == {"dog": 5, "a": 3}
    assert count_tokens(["dog"], []) == {"dog": 0}


def test_statistics() -> None:
    items = [
        *captioned("red cat, Tree", "tree, a very long caption", None, "  "),
        picture("r.png", "tree", regularization=True),
    ]
    known = caption_statistics(dataset(items), context({"tokenizers": [LetterTokenizer()], "token_limit": 20}))
    assert (known.found, known.missing, known.empty) == (4, 1, 1)
    assert (known.longest_words, known.median_words) == (5, 3.0)
    assert known.over_limit == ("001.png",)
    assert known.longest_tokens == 2 + len("zqx,tree,averylongcaption")
    assert known.tags == (("Tree", 2), ("a very long caption", 1), ("red cat", 1))


def test_statistics_of_nothing() -> None:
    known = caption_statistics(dataset([]), context())
    assert (known.found, known.missing, known.longest_words, known.median_words, known.tags) == (0, 0, 0, 0.0, ())


@pytest.mark.parametrize(
    ("text", "tags", "prose"),
    [
        (TAGS, True, False),
        (SENTENCE, False, True),
        ("a large red circle on a gray background, center", False, False),
        ("Photo of a woman, who wears a hat and looks to the left side of the picture", False, True),
        ("", False, False),
    ],
)
def test_tags_and_prose_are_told_apart(text: str, tags: bool, prose: bool) -> None:
    assert (is_tags(text), is_prose(text)) == (tags, prose)


def spoil(text: str) -> str:
    """Return the text as a program shows it that takes UTF-8 for Windows-1252."""
    return "".join(
        chr(byte) if byte in b"\x81\x8d\x8f\x90\x9d" else bytes([byte]).decode("cp1252") for byte in text.encode()
    )


western = st.text(st.sampled_from("ab ,éüñçÀßÏ–—’“”…€\u00a0"), max_size=20)


@given(western)
def test_western_text_that_was_read_wrongly_is_repaired(text: str) -> None:
    assert repair_encoding(spoil(text)) == text


@given(western)
def test_western_text_that_was_read_rightly_is_left_alone(text: str) -> None:
    assert repair_encoding(text) == text
    assert "characters-spoiled" not in codes(odd(text))


def test_captions_beyond_the_overlay_keep_their_notice() -> None:
    notes = ("caption odd.txt: not UTF-8, read as Windows-1252",)
    items = odd("é", notes=notes)
    assert "captions-encoding" in codes(items)
    assert "captions-encoding" not in codes([replace(item, caption_source="overlay") for item in items])
