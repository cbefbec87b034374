"""Characters in captions that nobody meant to write: control characters, spoiled encodings, HTML, prompt commands."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorasmith.engine.dataset.check_captions import Captions
from lorasmith.engine.dataset.findings import Action, Finding, Severity, counted

# Zero-width joiners stay: emoji and several scripts need them.
_STRAY = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]"
)
# What UTF-8 bytes of Latin letters, dashes and quotes look like when they were read as Windows-1252.
_SPOILED = re.compile(
    "[\xc2-\xc3][\x80-\xbf\u0152-\u0178\u2018-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122]|\xe2\u20ac.|\xef\xbb\xbf"
)
_WESTERN = re.compile("[\xa0-\u017f\u2010-\u2026\u20ac\u2122\ufeff]+")
_SPOILED_RUN = re.compile("[\x80-\xff\u0152-\u0178\u0192\u02c6\u02dc\u2013-\u2026\u2030\u2039\u203a\u20ac\u2122]{2,}")
_LOST = re.compile("\ufffd")
_TAG = re.compile(r"</?(?!lora:)[a-z][a-z0-9]*(?:\s[^<>]*)?/?>|<!--.*?-->", re.IGNORECASE)
_HTML = re.compile(_TAG.pattern + r"|&(?:[a-z]{2,8}|#\d{1,6}|#x[0-9a-f]{1,6});", re.IGNORECASE)
_COMMAND = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>|\([^()]*:\s*\d+(?:\.\d+)?\s*\)|\bBREAK\b|\\[()]")
_WEIGHT = re.compile(r"(?<!\\)\(([^()]*):\s*\d+(?:\.\d+)?\s*\)")


@dataclass(frozen=True)
class _Stray:
    """One kind of characters: how to find it, how to repair a text, and what to say."""

    code: str
    severity: Severity
    pattern: re.Pattern[str]
    repair: Callable[[str], str] | None
    words: str
    why: str
    fix: str
    label: str = ""


def check_characters(captions: Captions) -> list[Finding]:
    """Return what captions hold that was not meant to be there, with the repaired texts where they can be repaired."""
    return [finding for kind in _KINDS if (finding := _find(captions, kind)) is not None]


def repair_encoding(text: str) -> str:
    """Return a text whose UTF-8 was read as Windows-1252 as it was meant, or the same where that is not what it is.

    Only Latin letters, dashes, quotes and the like are brought back: other results are as likely to be meant as they
    stand.
    """

    def meant(match: re.Match[str]) -> str:
        try:
            text = b"".join(_byte(character) for character in match[0]).decode("utf-8")
        except UnicodeError:
            return match[0]
        return text if _WESTERN.fullmatch(text) else match[0]

    return _SPOILED_RUN.sub(meant, text)


def _byte(character: str) -> bytes:
    # Windows-1252 leaves five bytes unassigned; programs read those as the control characters of the same number.
    return bytes([ord(character)]) if character in "\x81\x8d\x8f\x90\x9d" else character.encode("cp1252")


def _without_stray(text: str) -> str:
    return " ".join(_STRAY.sub("", re.sub("[\u2028\u2029\x0b\x0c]", " ", text)).split(" "))


def _without_html(text: str) -> str:
    return re.sub(r" {2,}", " ", html.unescape(_TAG.sub(" ", text))).strip()


def _without_commands(text: str) -> str:
    text = re.sub(r"<(?:lora|lyco|hypernet):[^<>]*>|\bBREAK\b", " ", text)
    text = _WEIGHT.sub(r"\1", text)
    text = re.sub(r"\\([()])", r"\1", text)
    return re.sub(r"\s*,(?:\s*,)*", ",", re.sub(r" {2,}", " ", text)).strip(" ,")


_KINDS = (
    _Stray(
        "characters-lost",
        "warning",
        _LOST,
        None,
        "characters that were lost in a wrong conversion (�)",
        "The text encoder reads them as an unknown sign, and the word around them is broken.",
        "Write these captions again, or restore the files from where they came from.",
    ),
    _Stray(
        "characters-spoiled",
        "warning",
        _SPOILED,
        repair_encoding,
        "letters spoiled by a wrong encoding, such as Ã© for é",
        "The text encoder reads two strange signs instead of a letter, and does not know the word.",
        "Correct them, in the wizard with one key, and look at the result.",
        "Repair the letters",
    ),
    _Stray(
        "control-characters",
        "warning",
        _STRAY,
        _without_stray,
        "control or invisible characters",
        "They are not seen on the screen, but split words into pieces for the text encoder.",
        "Take them out, in the wizard with one key.",
        "Take the invisible characters out",
    ),
    _Stray(
        "html",
        "warning",
        _HTML,
        _without_html,
        "HTML",
        "The text encoder reads tags such as <b> and codes such as &amp; as words.",
        "Write plain text instead, in the wizard with one key.",
        "Turn HTML into plain text",
    ),
    _Stray(
        "prompt-commands",
        "note",
        _COMMAND,
        _without_commands,
        "commands of prompts, such as (word:1.2) or <lora:name:1>",
        "Programs that draw pictures act on them; in training they are read as they stand.",
        "Keep the plain words alone, in the wizard with one key.",
        "Keep the plain words",
    ),
)


def _find(captions: Captions, kind: _Stray) -> Finding | None:
    told: dict[str, str] = {}
    repaired: dict[str, str] = {}
    for item, text in captions.texts:
        match = kind.pattern.search(text)
        if match is None:
            continue
        told[item.relative] = _seen(match[0])
        if kind.repair is not None and len(item.captions) == 1:
            better = kind.repair(text)
            if better != text:
                repaired[item.relative] = better
    if not told:
        return None
    return Finding(
        kind.code,
        kind.severity,
        f"{counted(len(told), 'caption holds', 'captions hold')} {kind.words}.",
        kind.why,
        kind.fix,
        files=tuple(sorted(told)),
        details=told,
        action=_action(kind, repaired),
    )


def _action(kind: _Stray, repaired: Mapping[str, str]) -> Action | None:
    return Action(kind.label, captions=dict(sorted(repaired.items()))) if repaired else None


def _seen(found: str) -> str:
    """Return what was found so that it can be seen: invisible characters by their numbers."""
    if found.isprintable():
        return found if len(found) <= 40 else f"{found[:39]}…"
    return " ".join(f"U+{ord(character):04X}" for character in found[:8])
