"""Captions of many pictures in one file: metadata.jsonl, CSV, and the metadata JSON of Kohya's fine-tuning scripts.

A list names pictures relative to its own folder, as the imagefolder format of Hugging Face datasets does. The first of
`FILE_KEYS` that a record or a header has is the picture's name, the first of `CAPTION_KEYS` its caption. Further rows
of the same picture, or a list of texts in one record, are further captions of equal right.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lorasmith.engine.dataset.captions import MAX_CAPTION_BYTES, decode_text

FILE_KEYS = ("file_name", "filename", "file", "image_path", "image_file", "image", "path", "img", "name")
"""Names of the column that names the picture, in the order in which they are looked for, without regard to case."""
CAPTION_KEYS = ("caption", "captions", "text", "prompt", "description", "tags")
"""Names of the column with the caption, likewise."""
LIST_SUFFIXES = (".jsonl", ".csv", ".tsv")
"""Extensions of caption lists in lower case, the preferred one first."""
MAX_LIST_BYTES = 100_000_000
_DELIMITERS = ",;\t|"
_NAMED = 5
_Key = TypeVar("_Key")


class UnusableListError(Exception):
    """The file is no caption list; its text is the reason."""


@dataclass
class CaptionList:
    """The captions of a list by the name that it gives the picture, and what there is to say about it."""

    path: Path
    captions: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: object, texts: object) -> bool:
        """Keep the captions of one record; says whether it names a picture and holds text."""
        given = texts if isinstance(texts, list) else [texts]
        captions = [text for text in given if isinstance(text, str) and _can_be_caption(text)]
        if not isinstance(name, str) or not name.strip() or not captions or len(captions) < len(given):
            return False
        known = self.captions.setdefault(name.strip(), [])
        known += [text for text in dict.fromkeys(captions) if text not in known]
        return True


def _can_be_caption(text: str) -> bool:
    try:
        return "\0" not in text and len(text.encode()) <= MAX_CAPTION_BYTES
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False


def is_list(path: Path) -> bool:
    """Say whether the file's name is that of a caption list."""
    return path.suffix.lower() in LIST_SUFFIXES


def list_rank(path: Path) -> tuple[int, int, int, str]:
    """Return what lists are sorted by where several name the same picture; the smallest counts.

    JSON lines come before CSV, `metadata` before other names, and the list nearest to the picture before others.
    """
    kind = LIST_SUFFIXES.index(path.suffix.lower()) if is_list(path) else -1
    return min(kind, 1), path.stem.lower() != "metadata", -len(path.parts), path.name


def read_list(path: Path) -> CaptionList:
    """Read a caption list (.jsonl, .csv or .tsv); raises UnusableListError with the reason where it is none."""
    found = CaptionList(path)
    text = _read_text(path, found)
    if path.suffix.lower() == ".jsonl":
        _read_json_lines(text, found)
    else:
        _read_csv(text, found)
    if not found.captions:
        raise UnusableListError("; ".join(["it has no captions", *found.notes]))
    return found


def read_kohya_metadata(path: Path) -> CaptionList:
    """Read the `metadata_file` of Kohya's fine-tuning scripts: {"picture": {"caption": …, "tags": …}}.

    Tags are added to each line of the caption, as in kohya-ss/sd-scripts docs/config_README-en.md. Raises
    UnusableListError.
    """
    found = CaptionList(path)
    try:
        records = json.loads(_read_text(path, found))
    except (ValueError, RecursionError) as error:
        raise UnusableListError(f"it is no JSON: {error}") from None
    if not isinstance(records, dict):
        raise UnusableListError("it does not map picture names to captions")
    bad = []
    for name, record in records.items():
        caption = _kohya_caption(record) if isinstance(record, dict) else None
        if caption is None or not found.add(name, caption):
            bad.append(name)
    if bad:
        found.notes.append(f"{len(bad)} records without a caption: {listing(bad)}")
    if not found.captions:
        raise UnusableListError("; ".join(["it has no captions", *found.notes]))
    return found


def read_json_caption(path: Path) -> tuple[str | None, str]:
    """Return the caption of a JSON file beside a picture, as ai-toolkit reads it, and a remark; None and the reason.

    It is the text under "caption"; other keys are named in the remark where they look like captions.
    """
    found = CaptionList(path)
    try:
        record = json.loads(_read_text(path, found))
    except UnusableListError as error:
        return None, str(error)
    except (ValueError, RecursionError):
        return None, "it is no JSON"
    caption = record.get("caption") if isinstance(record, dict) else None
    if not isinstance(caption, str) or not CaptionList(path).add("x", caption):
        return None, 'it has no text under "caption"'
    unused = [key for key in ("caption_short", *CAPTION_KEYS[1:]) if isinstance(record.get(key), str)]
    remarks = [*found.notes, *(f"{key} is not used" for key in unused)]
    return caption, "; ".join(remarks) or ("" if caption.strip() else "empty")


def _kohya_caption(record: Mapping[str, Any]) -> str | None:
    caption, tags = record.get("caption"), record.get("tags")
    if not isinstance(tags, str) or not tags.strip():
        return caption if isinstance(caption, str) else None
    if not isinstance(caption, str) or not caption.strip():
        return tags
    return "\n".join(f"{line}, {tags}" for line in caption.splitlines() if line.strip())


def _read_text(path: Path, found: CaptionList) -> str:
    try:
        if not path.is_file():
            raise UnusableListError("not an ordinary file")
        if path.stat().st_size > MAX_LIST_BYTES:
            raise UnusableListError(f"larger than {MAX_LIST_BYTES // 1_000_000} MB")
        text, note = decode_text(path.read_bytes())
    except OSError as error:
        raise UnusableListError(error.strerror or str(error)) from None
    if "\0" in text:
        raise UnusableListError("not a text file")
    if note:
        found.notes.append(note)
    return text


def _read_json_lines(text: str, found: CaptionList) -> None:
    bad, others = [], set[str]()
    # Not splitlines: JSON strings may hold the separators of Unicode as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            bad.append(str(number))
            continue
        keys = {key.lower(): key for key in reversed(record)} if isinstance(record, dict) else {}
        name, caption = _first(FILE_KEYS, keys), _first(CAPTION_KEYS, keys)
        others.update(key for key in CAPTION_KEYS if key in keys and keys[key] != caption)
        if name is None or caption is None or not found.add(record[name], record[caption]):
            bad.append(str(number))
    _note_unused(found, bad, others)


def _read_csv(text: str, found: CaptionList) -> None:
    columns, rows = _parse_csv(text)
    name, caption = _first(FILE_KEYS, columns), _first(CAPTION_KEYS, columns)
    assert name is not None
    assert caption is not None
    bad = []
    try:
        for number, row in rows:
            if any(row) and not (len(row) > max(name, caption) and found.add(row[name], row[caption])):
                bad.append(str(number))
    except csv.Error as error:
        raise UnusableListError(f"its quotes do not match: {error}") from None
    _note_unused(found, bad, {key for key in CAPTION_KEYS if columns.get(key, caption) != caption})


def _parse_csv(text: str) -> tuple[dict[str, int], Iterator[tuple[int, list[str]]]]:
    """Return the columns' places by their names in lower case, and the rows, each with the number of its last line.

    The delimiter is the first at which the header has a column for pictures and one for captions.
    """
    for delimiter in _DELIMITERS:
        # Strict, so that a quote that is never closed is an error and does not swallow the rest of the file.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
        except csv.Error:
            continue
        columns = {name.strip().lower(): index for index, name in reversed(list(enumerate(header)))}
        if _first(FILE_KEYS, columns) is not None and _first(CAPTION_KEYS, columns) is not None:
            return columns, _numbered(reader)
    raise UnusableListError("its first line names no columns such as file_name and caption")


def _numbered(reader: Any) -> Iterator[tuple[int, list[str]]]:
    for row in reader:
        yield reader.line_num, row


def _first(wanted: Sequence[str], keys: Mapping[str, _Key]) -> _Key | None:
    """Return what `keys` holds under the first of the `wanted` names that is there."""
    return next((keys[key] for key in wanted if key in keys), None)


def _note_unused(found: CaptionList, bad: Sequence[str], others: Collection[str]) -> None:
    if bad:
        found.notes.append(f"passed over what has no picture name and caption: line {listing(bad)}")
    if others:
        found.notes.append(f"not used as captions: {', '.join(sorted(others))}")


def listing(names: Sequence[str]) -> str:
    """Return the first few names in one line, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
