"""The overlay: edits beside the dataset, added line by line, readable after any crash."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.engine.dataset.overlay import Edit, append_edits, default_overlay, read_overlay
from lorasmith.engine.errors import DatasetError, StorageError

names = st.text(min_size=1, max_size=20)
edits = st.builds(
    Edit,
    st.none() | st.lists(st.text(max_size=30), max_size=3).map(tuple),
    st.booleans(),
    st.sampled_from(["person", "wd14"]),
)


@given(batches=st.lists(st.dictionaries(names, edits, max_size=4), max_size=4))
def test_what_is_written_is_read_and_later_edits_count(
    tmp_path_factory: pytest.TempPathFactory, batches: list[dict[str, Edit]]
) -> None:
    path = tmp_path_factory.mktemp("overlay") / "new" / "overlay.jsonl"
    expected: dict[str, Edit] = {}
    for batch in batches:
        append_edits(path, batch)
        expected |= batch
    assert read_overlay(path) == expected


def test_a_crash_at_any_byte_costs_at_most_the_edit_that_was_being_written(tmp_path: Path) -> None:
    path = tmp_path / "overlay.jsonl"
    append_edits(path, {"a.png": Edit(("a cat",)), "b.png": Edit(exclude=True)})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        kept = read_overlay(path)
        assert set(kept) == ({"a.png"} if cut >= first - 1 else set()) | ({"b.png"} if cut >= len(whole) - 1 else set())
        append_edits(path, {"c.png": Edit(("new",))})
        assert read_overlay(path) == kept | {"c.png": Edit(("new",))}


@pytest.mark.parametrize(
    "line", ["nonsense", "{}", '{"file": 3}', '{"file": "a", "captions": "x"}', '{"file": "a", "exclude": 1}', "[]"]
)
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "overlay.jsonl"
    path.write_text(f'{{"file": "a.png", "captions": ["x"]}}\n{line}\n')
    with pytest.raises(DatasetError) as caught:
        read_overlay(path)
    assert "ine 2" in caught.value.why
    assert str(path) in caught.value.what


def test_a_missing_file_has_no_edits_and_an_unwritable_one_says_so(tmp_path: Path) -> None:
    assert read_overlay(tmp_path / "none.jsonl") == {}
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="overlay"):
        append_edits(tmp_path / "file" / "overlay.jsonl", {"a": Edit()})


def test_the_default_overlay_is_in_the_current_folder_and_never_in_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cats" / "10_cat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert default_overlay(Path("cats")) == default_overlay(tmp_path / "cats" / ".") == Path("cats.captions.jsonl")
    for inside in ("cats", "cats/10_cat"):
        monkeypatch.chdir(tmp_path / inside)
        assert default_overlay(tmp_path / "cats") == tmp_path / "cats.captions.jsonl"
    assert default_overlay(tmp_path / "pictures.zip") == Path("pictures.zip.captions.jsonl")
