"""The captions as they stand: what the overlay holds is what is shown, and every step can be taken back."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lorasmith.engine.dataset.items import Dataset, ImageItem
from lorasmith.engine.dataset.overlay import PERSON, Edit, append_edits, read_overlay
from lorasmith.engine.errors import StorageError
from lorasmith.tui.caption_diff import diff_parts
from lorasmith.tui.caption_state import CaptionState, Length, Ruler
from lorasmith.tui.overlay_writer import OverlayWriter
from lorasmith.tui.text import safe_str
from tests.tui.conftest import FakeTokenizer

NAMES = ("a.png", "10_cat/b.png", "c.png", "none.png")


def an_item(name: str, *captions: str) -> ImageItem:
    source = "sidecar" if captions else "none"
    return ImageItem(Path("/pictures", name), name, "0" * 64, 64, 64, captions=captions, caption_source=source)


def a_dataset() -> Dataset:
    items = (an_item("a.png", "a red hat"), an_item("10_cat/b.png", "one", "two"), an_item("c.png", ""))
    return Dataset(Path("/pictures"), (*items, an_item("none.png")), (), 4)


def snapshot(state: CaptionState) -> list[object]:
    return [(state.captions(name), state.mark(name), state.author(name)) for name in NAMES]


texts = st.sampled_from(["", " ", "a red hat", "one", "new words", "\x1b[31m", "two\nlines"])
captions = st.lists(texts, min_size=1, max_size=3)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.dictionaries(st.sampled_from(NAMES), captions), st.sampled_from([PERSON, "wd14"])),
        st.tuples(st.just("revert"), st.lists(st.sampled_from(NAMES)), st.just("")),
        st.tuples(st.just("undo"), st.none(), st.just("")),
    ),
    max_size=12,
)


@given(steps)
def test_the_overlay_read_again_gives_the_captions_that_are_shown(done: list[tuple[str, object, str]]) -> None:
    state = CaptionState(a_dataset())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "overlay.jsonl"
        for kind, values, by in done:
            if kind == "put":
                edits = state.put(values, "a step", by)  # type: ignore[arg-type]
            elif kind == "revert":
                edits = state.revert(values, "a step")  # type: ignore[arg-type]
            else:
                _, edits = state.undo()
            append_edits(path, edits)
        assert snapshot(CaptionState(a_dataset(), read_overlay(path))) == snapshot(state)
    while state.undo()[0]:
        pass
    assert snapshot(state) == snapshot(CaptionState(a_dataset()))


@given(steps)
def test_every_undo_gives_what_was_before_its_step(done: list[tuple[str, object, str]]) -> None:
    state = CaptionState(a_dataset())
    seen = [snapshot(state)]
    for kind, values, by in done:
        if kind == "undo":
            continue
        edits = state.put(values, "x", by) if kind == "put" else state.revert(values, "x")  # type: ignore[arg-type]
        if edits:
            seen.append(snapshot(state))
    while len(seen) > 1:
        assert snapshot(state) == seen.pop()
        assert state.undo()[0] == "x"
    assert snapshot(state) == seen[0]
    assert state.undo() == ("", {})


def test_marks_tell_where_a_caption_comes_from() -> None:
    state = CaptionState(a_dataset(), {"10_cat/b.png": Edit(("tags",), by="wd14")})
    assert [state.mark(name) for name in NAMES] == ["file", "machine", "empty", "missing"]
    state.put({"a.png": ["another hat"]}, "x")
    assert state.mark("a.png") == "edited"
    assert state.matching("HAT another") == ["a.png"]
    assert state.matching("", "machine") == ["10_cat/b.png"]
    assert state.matching("", "missing") == ["c.png", "none.png"]
    assert state.matching("", "too long", frozenset({"c.png"})) == ["c.png"]


def test_the_files_own_text_and_nothing_for_nothing_are_no_edits() -> None:
    state = CaptionState(a_dataset())
    state.put({"a.png": ["x"], "none.png": ["y"]}, "x")
    edits = state.put({"a.png": ["a red hat"], "none.png": [" "]}, "back")
    assert edits == {"a.png": Edit(), "none.png": Edit()}
    assert state.edited() == {}


def test_a_picture_that_is_left_out_stays_left_out_when_its_caption_is_edited() -> None:
    state = CaptionState(a_dataset(), {"a.png": Edit(exclude=True)})
    assert state.put({"a.png": ["x"]}, "x") == {"a.png": Edit(("x",), exclude=True)}


def test_the_own_text_of_an_edited_picture_is_known_after_a_scan_without_the_overlay() -> None:
    own = a_dataset()
    shown = Dataset(own.folder, (ImageItem(**{**vars(own.items[0]), "caption_source": "overlay"}),), (), 1)
    state = CaptionState(shown, {"a.png": Edit(("x",))})
    assert state.own("a.png") is None
    state.learn_own(own)
    assert state.own("a.png") == ("a red hat",)
    assert state.own_items()[0].caption_source == "sidecar"


def test_captions_that_were_written_to_their_files_are_no_edits_any_more() -> None:
    state = CaptionState(a_dataset())
    state.put({"a.png": ["x"], "10_cat/b.png": ["1", "2"]}, "x")
    assert state.learn_written(["a.png", "10_cat/b.png"]) == {"a.png": Edit(), "10_cat/b.png": Edit()}
    assert state.captions("a.png") == ("x",)
    assert state.captions("10_cat/b.png") == ("1\n2",)
    assert state.edited() == {}
    assert state.undo() == ("", {})


def test_lengths_are_told_in_tokens_where_a_tokenizer_is_known_and_else_in_words() -> None:
    assert Ruler().measure("a red hat").told() == "3 words"
    length = Ruler((FakeTokenizer(),), 10).measure("zqx, a red hat")
    assert length == Length(4, 16, 10)
    assert length.told() == "! 16 of 10 tokens: the last 6 are not read"
    assert Ruler((FakeTokenizer(),), 20).measure("dog").told() == "3 of 20 tokens · 1 word"


def test_edits_that_cannot_be_written_wait_and_are_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "overlay.jsonl"
    (tmp_path / "folder").touch()
    writer = OverlayWriter(path)
    writer.add({"a.png": Edit(("one",))})
    assert not writer.finish()
    assert "folder" in writer.problem
    (tmp_path / "folder").unlink()
    writer.add({"b.png": Edit(("two",))})
    assert writer.finish()
    assert writer.problem == ""
    assert read_overlay(path) == {"a.png": Edit(("one",)), "b.png": Edit(("two",))}


def test_a_picture_left_out_meanwhile_stays_left_out(tmp_path: Path) -> None:
    writer = OverlayWriter(tmp_path / "overlay.jsonl")
    append_edits(writer.path, {"a.png": Edit(exclude=True)})
    writer.add({"a.png": Edit(("x",))})
    assert writer.finish()
    assert read_overlay(writer.path) == {"a.png": Edit(("x",), exclude=True)}


def test_an_edit_that_fails_never_replaces_a_newer_one(tmp_path: Path) -> None:
    writer = OverlayWriter(tmp_path / "overlay.jsonl")
    writer._keep({"a.png": Edit(("old",))}, StorageError("full"))
    writer._waiting = {"a.png": Edit(("new",))}
    writer._keep({"a.png": Edit(("old",))}, StorageError("full"))
    assert writer.finish()
    assert read_overlay(writer.path) == {"a.png": Edit(("new",))}


@given(st.text(max_size=60), st.text(max_size=60), st.integers(10, 60))
def test_a_difference_is_shown_without_control_characters_and_marks_only_what_differs(
    old: str, new: str, width: int
) -> None:
    before, after = diff_parts(old, new, width)
    assert all(safe_str(part) == part for parts in (before, after) for part, _ in parts)
    if old == new:
        assert all(role in ("", "dim") for _, role in before + after)


def test_a_difference_far_to_the_right_is_moved_into_view() -> None:
    before, after = diff_parts("word " * 40 + "red", "word " * 40 + "blue", 40)
    shown = "".join(text for text, _ in after)
    assert shown.endswith("blue")
    assert len(shown) < 40
    assert ("red", "critical") in before
