"""Edits of captions as pure functions from text to text, and what an edit would change in a dataset.

A tag is what stands between two commas; the comma of a number (1,000) is none. Tags are the same where only case and
spaces differ; whatever an edit does not mean stays as it is, to the space. `caption_writing` brings captions into the
user's own files.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

# The standard library's expressions cannot be stopped, and hold the interpreter while they search.
import regex as regex_library

from lorasmith.engine.dataset.caption_writing import WrittenCaptions, write_captions
from lorasmith.engine.dataset.captions import PLACEHOLDER, compose
from lorasmith.engine.dataset.items import Dataset, ImageItem
from lorasmith.engine.dataset.overlay import PERSON, Edit
from lorasmith.engine.errors import ConfigError

__all__ = [
    "Change",
    "WrittenCaptions",
    "add_tag",
    "as_edits",
    "cp1252_to_utf8",
    "each_line",
    "preview_changes",
    "put_trigger_first",
    "remove_tag",
    "rename_tag",
    "replace_text",
    "tag_counts",
    "tidy",
    "trigger_to_placeholder",
    "write_captions",
]

REGEX_SECONDS = 2.0
"""How long a regular expression may take for one caption."""
_JOINERS = "\u200c\u200d"
_COMMA = re.compile(r",(?!(?<=\d,)\d{3}(?!\d))")
_LINE_ENDS = re.compile(r"\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
# What the UTF-8 bytes of a character become when they are read as Windows-1252: a first letter and its followers. Of
# letters that begin two bytes only those of common scripts, since a capital before a quotation mark looks the same.
_FOLLOWER = r"[\u0080-\u00bf\u0152-\u0192\u02c6\u02dc\u2013-\u2122]"
_MISREAD = re.compile(rf"[ÂÃÄÅÐÑ]{_FOLLOWER}|[à-ô]{_FOLLOWER}{{2,3}}")
_CP1252 = {bytes([code]).decode("cp1252", "ignore") or chr(code): code for code in range(0x80, 0x100)}


@dataclass(frozen=True)
class Change:
    """What an edit does to one picture: its captions before and after, several of them one a line."""

    relative: str
    before: str
    after: str
    captions: tuple[str, ...] = ()


def add_tag(text: str, tag: str, *, first: bool = False) -> str:
    """Return the text with a tag at its end, or with `first` at its start; a tag that is there already moves at most.

    Raises ConfigError for a blank tag.
    """
    tag = _require_tag(tag)
    pieces = _pieces(text)
    if _holds(pieces, tag) and not (first and _key(pieces[0]) != _key(tag)):
        return text
    rest = remove_tag(text, tag).strip().strip(",").strip()
    if not rest:
        return tag
    return f"{tag}, {rest}" if first else f"{rest}, {tag}"


def remove_tag(text: str, tag: str) -> str:
    """Return the text without a tag; raises ConfigError for a blank one."""
    tag = _require_tag(tag)
    pieces = _pieces(text)
    kept = [piece for piece in pieces if _key(piece) != _key(tag)]
    if len(kept) == len(pieces):
        return text
    return ",".join(kept).strip() if kept else ""


def rename_tag(text: str, old: str, new: str) -> str:
    """Return the text with another name for a tag, once where it has that tag already.

    Raises ConfigError for a blank name.
    """
    old, new = _require_tag(old), _require_tag(new)
    pieces = _pieces(text)
    if not _holds(pieces, old):
        return text
    renamed: list[str] = []
    for piece in pieces:
        if _key(piece) == _key(old):
            piece = piece.replace(piece.strip(), new)
        if _key(piece) == _key(new) and _holds(renamed, new):
            continue
        renamed.append(piece)
    return ",".join(renamed).strip()


def replace_text(text: str, old: str, new: str, regex: bool = False) -> str:
    r"""Return the text with `old` replaced everywhere; with `regex` it is a regular expression, `new` may hold `\1`.

    Raises ConfigError for nothing to look for, for a broken expression, and for one that takes REGEX_SECONDS: some
    need longer than a lifetime for a short text.
    """
    if not old:
        raise ConfigError("There is no text to replace.", fix="Give the text to look for.")
    if not regex:
        return text.replace(old, new)
    try:
        return str(regex_library.sub(old, new, text, timeout=REGEX_SECONDS, concurrent=True))
    except TimeoutError:
        raise ConfigError(
            f"The regular expression {old} takes too long.",
            why=f"It was not done with one caption after {REGEX_SECONDS:g} seconds.",
            fix="Write it without repeats inside repeats, such as (a+)+, or replace plain text.",
        ) from None
    except (regex_library.error, IndexError, OverflowError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"{old} with {new} is no valid regular expression with its replacement.",
            why=f"{str(error)[:1].upper()}{str(error)[1:]}.",
            fix="Correct it, or replace it as plain text, without regex.",
        ) from None


def tidy(text: str) -> str:
    """Return the text without invisible characters, repeated spaces, empty tags and spaces before commas.

    Lines stay lines, except blank ones. Joiners inside words of scripts that need them, and in emoji, stay.
    """
    text = _LINE_ENDS.sub("\n", text)
    lines = [_tidy_line(line) for line in text.split("\n")]
    return "\n".join(line for line in lines if line)


def cp1252_to_utf8(text: str) -> str:
    """Return the text with UTF-8 that was read as Windows-1252 put right: "cafÃ©" becomes "café"."""
    return _MISREAD.sub(_reread, text)


def put_trigger_first(text: str, trigger: str) -> str:
    """Return the text with the trigger word once and first; training does the same with any caption."""
    return compose(text, _require_tag(trigger))


def trigger_to_placeholder(text: str, trigger: str) -> str:
    """Return the text with `[trigger]` for the trigger word, so that the captions fit any trigger."""
    word = r"\s+".join(re.escape(part) for part in _require_tag(trigger).split())
    return re.sub(rf"(?<!\w){word}(?!\w)", PLACEHOLDER, text, flags=re.IGNORECASE)


def each_line(edit: Callable[[str], str]) -> Callable[[str], str]:
    """Return the edit done to each line by itself, for captions of which each line is one (`captions.lines`)."""
    return lambda text: "\n".join(edit(line) for line in text.split("\n"))


def preview_changes(dataset: Dataset, edit: Callable[[str], str]) -> list[Change]:
    """Return what an edit changes, in the dataset's order; pictures whose captions stay the same are left out.

    A picture without a caption counts as one with an empty caption. What the edit raises is let through.
    """
    changes = []
    for item in dataset.items:
        before = item.captions or ("",)
        after = tuple(edit(text) for text in before)
        if after != before:
            changes.append(Change(item.relative, "\n".join(before), "\n".join(after), after))
    return changes


def as_edits(changes: Sequence[Change], by: str = PERSON) -> dict[str, Edit]:
    """Return the changes as edits for the overlay (`overlay.append_edits`)."""
    return {change.relative: Edit(change.captions, by=by) for change in changes}


def tag_counts(items: Iterable[ImageItem]) -> list[tuple[str, int]]:
    """Return each tag with the number of pictures that have it, the most frequent first.

    Tags that differ only in case and spaces count as one, under their most frequent spelling.
    """
    pictures: Counter[str] = Counter()
    spellings: dict[str, Counter[str]] = {}
    for item in items:
        tags = [" ".join(piece.split()) for text in item.captions for piece in _pieces(text) if piece.strip()]
        pictures.update({_key(tag) for tag in tags})
        for tag in tags:
            spellings.setdefault(_key(tag), Counter())[tag] += 1
    named = [(_usual_spelling(spellings[key]), count) for key, count in pictures.items()]
    return sorted(named, key=lambda entry: (-entry[1], entry[0].casefold()))


def _usual_spelling(spellings: Mapping[str, int]) -> str:
    return min(spellings, key=lambda tag: (-spellings[tag], tag))


def _pieces(text: str) -> list[str]:
    """Split as `captions.split_tags` does, but not inside the choices of a wildcard (`{a red, round|green} ball`)."""
    ends = [match.start() for match in _COMMA.finditer(text)]
    if text.count("{") == text.count("}"):
        ends = [end for end in ends if text.count("{", 0, end) == text.count("}", 0, end)]
    starts = [0, *(end + 1 for end in ends)]
    return [text[start:end] for start, end in zip(starts, [*ends, len(text)], strict=True)]


def _holds(pieces: Iterable[str], tag: str) -> bool:
    return any(_key(piece) == _key(tag) for piece in pieces)


def _key(tag: str) -> str:
    return " ".join(tag.split()).casefold()


def _require_tag(tag: str) -> str:
    tag = " ".join(tag.split()).strip(" ,")
    if not tag:
        raise ConfigError("There is no tag to edit.", fix="Give a word or several, such as red hair.")
    return tag


def _tidy_line(line: str) -> str:
    line = "".join(_visible_part(line, place) for place in range(len(line)))
    line = " ".join(line.split())
    tags = [tag.strip() for tag in _COMMA.split(line)]
    return ", ".join(tag for tag in tags if tag)


def _visible_part(line: str, place: int) -> str:
    """Return the character at `place`, a space for a tab or an odd kind of space, nothing for an invisible one."""
    character = line[place]
    category = unicodedata.category(character)
    if character == "\t" or category == "Zs":
        return " "
    if character in _JOINERS:
        around = line[max(0, place - 1) : place] + line[place + 1 : place + 2]
        return character if len(around) == 2 and not around.isascii() else ""
    return "" if category in ("Cc", "Cf", "Cs") else character


def _reread(match: re.Match[str]) -> str:
    codes = [ord(c) if ord(c) < 0x80 else _CP1252.get(c, -1) for c in match[0]]
    # The pattern takes up to three followers; those that belong to no character are left as they are.
    for length in range(len(codes), 1, -1):
        if -1 in codes[:length]:
            continue
        try:
            return bytes(codes[:length]).decode("utf-8") + match[0][length:]
        except UnicodeDecodeError:
            continue
    return match[0]
