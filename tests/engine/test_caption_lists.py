"""Captions of many pictures in one file: JSON lines, CSV, Kohya's metadata, and one JSON beside a picture."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.engine.dataset.caption_lists import (
    CaptionList,
    UnusableListError,
    list_rank,
    read_json_caption,
    read_kohya_metadata,
    read_list,
)


def read(folder: Path, name: str, text: str | bytes) -> CaptionList:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_list(path)


@pytest.mark.parametrize("key", ["text", "caption", "captions", "prompt", "Text"])
def test_json_lines_name_pictures_and_captions(tmp_path: Path, key: str) -> None:
    lines = [json.dumps({"file_name": f"{name}.png", key: f"a {name}"}) for name in ("dog", "cat")]
    found = read(tmp_path, "metadata.jsonl", "\n\n".join(lines))
    assert found.captions == {"dog.png": ["a dog"], "cat.png": ["a cat"]}
    assert found.notes == []


def test_a_list_of_texts_and_further_records_are_further_captions(tmp_path: Path) -> None:
    lines = [{"file_name": "a", "text": ["x", "y", "x"]}, {"file_name": "a", "text": "z"}]
    found = read(tmp_path, "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    assert found.captions == {"a": ["x", "y", "z"]}


def test_lines_that_cannot_be_used_are_named_and_the_others_count(tmp_path: Path) -> None:
    bad = ['{"file_name": "b"}', "[1]", '{"file_name": 3, "text": "x"}', '{"file_name": "c", "text": null}', '{"file']
    bad += [
        '{"file_name": "d", "text": "\\ud800"}',
        '{"file_name": "e", "text": []}',
        '{"file_name": " ", "text": "x"}',
    ]
    found = read(tmp_path, "metadata.jsonl", "\n".join(['{"file_name": "a", "text": "x"}', *bad]))
    assert found.captions == {"a": ["x"]}
    assert found.notes == ["passed over what has no picture name and caption: line 2, 3, 4, 5, 6 and 3 more"]


def test_other_columns_with_captions_are_named(tmp_path: Path) -> None:
    found = read(tmp_path, "metadata.jsonl", '{"file_name": "a", "text": "short", "caption": "long"}')
    assert found.captions == {"a": ["long"]}
    assert found.notes == ["not used as captions: text"]
    assert read(tmp_path, "a.csv", "file,text,caption\na,short,long\n").notes == ["not used as captions: text"]


@pytest.mark.parametrize("header", ["file_name,text", "Filename,Caption", " image , prompt ", "id,path,description"])
def test_csv_columns_have_many_names(tmp_path: Path, header: str) -> None:
    row = ",".join("7" if name.strip() == "id" else name.strip().lower() for name in header.split(","))
    found = read(tmp_path, "captions.csv", f"{header}\n{row}\n")
    assert list(found.captions) == [row.split(",")[-2]]
    assert list(found.captions.values()) == [[row.split(",")[-1]]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_delimiter_and_encoding_are_found_out(tmp_path: Path, delimiter: str, encoding: str) -> None:
    text = f'file{delimiter}caption\r\nä.png{delimiter}"a ""red""{delimiter} dog\r\nin two lines"\r\n'
    found = read(tmp_path, "captions.csv", text.encode(encoding))
    assert found.captions == {"ä.png": [f'a "red"{delimiter} dog\r\nin two lines']}
    assert [note for note in found.notes if "Windows-1252" in note] == (
        ["not UTF-8, read as Windows-1252"] if encoding == "cp1252" else []
    )


def test_rows_without_a_caption_are_named_by_line(tmp_path: Path) -> None:
    found = read(tmp_path, "captions.csv", "file,caption\na,x\nb\n\n,y\nc,\n")
    assert found.captions == {"a": ["x"], "c": [""]}
    assert found.notes == ["passed over what has no picture name and caption: line 3, 5"]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.csv", "x,y\n1,2\n", "names no columns"),
        ("a.csv", "", "names no columns"),
        ("a.csv", 'file,caption\na,"never closed\nb,x\n', "quotes do not match"),
        ("a.csv", "file,caption\n", "no captions"),
        ("a.csv", "file,caption\na," + "x" * 200_000, "quotes do not match|no captions"),
        ("a.jsonl", "", "no captions"),
        ("a.jsonl", "\0", "not a text file"),
        ("a.jsonl", "[" * 100_000, "no captions"),
        ("a.jsonl", json.dumps({"file": "a", "text": "x" * 70_000}), "no captions"),
    ],
)
def test_what_is_no_list_says_why(tmp_path: Path, name: str, text: str, reason: str) -> None:
    with pytest.raises(UnusableListError, match=reason):
        read(tmp_path, name, text)


def test_a_folder_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(UnusableListError, match="not an ordinary file"):
        read_list(tmp_path / "a.csv")


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)


@given(st.dictionaries(texts.filter(lambda text: text == text.strip()), texts, min_size=1, max_size=5))
def test_what_csv_and_json_write_is_read_back(records: dict[str, str]) -> None:
    import tempfile

    table = io.StringIO(newline="")
    writer = csv.writer(table, quoting=csv.QUOTE_ALL)
    writer.writerows([("file_name", "text"), *records.items()])
    lines = "\n".join(
        json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in records.items()
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("a.csv", table.getvalue()), ("a.jsonl", lines)):
            assert read(Path(folder), name, text).captions == {key: [value] for key, value in records.items()}


def test_the_order_of_lists_is_fixed() -> None:
    names = ["metadata.jsonl", "deep/metadata.jsonl", "a.jsonl", "metadata.csv", "b.csv", "a.tsv", "deep/a.csv"]
    ordered = sorted(map(Path, names), key=list_rank)
    assert [str(path) for path in ordered] == [
        "deep/metadata.jsonl", "metadata.jsonl", "a.jsonl", "metadata.csv", "deep/a.csv", "a.tsv", "b.csv",
    ]  # fmt: skip


def test_kohya_metadata_adds_the_tags_to_each_line(tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    records = {
        "a": {"caption": "one\ntwo", "tags": "red, dog"},
        "b": {"tags": "cat"},
        "c": {"caption": "only"},
        "d": {"train_resolution": [64, 64]},
        "e": 3,
    }
    path.write_text(json.dumps(records))
    found = read_kohya_metadata(path)
    assert found.captions == {"a": ["one, red, dog\ntwo, red, dog"], "b": ["cat"], "c": ["only"]}
    assert found.notes == ["2 records without a caption: d, e"]


@pytest.mark.parametrize(("text", "reason"), [("[]", "map"), ("{", "no JSON"), ("{}", "no captions")])
def test_what_is_no_kohya_metadata_says_why(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(UnusableListError, match=reason):
        read_kohya_metadata(tmp_path / "meta.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"caption": "a dog"}', ("a dog", "")),
        ('{"caption": "a long dog", "caption_short": "dog"}', ("a long dog", "caption_short is not used")),
        ('{"caption": " "}', (" ", "empty")),
        ('{"tags": "dog"}', (None, 'it has no text under "caption"')),
        ('{"caption": ["a"]}', (None, 'it has no text under "caption"')),
        ("[1]", (None, 'it has no text under "caption"')),
        ("{", (None, "it is no JSON")),
    ],
)
def test_json_beside_a_picture(tmp_path: Path, text: str, expected: tuple[str | None, str]) -> None:
    (tmp_path / "a.json").write_text(text)
    assert read_json_caption(tmp_path / "a.json") == expected
