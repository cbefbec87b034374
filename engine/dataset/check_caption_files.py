"""Whether every picture has a caption, and whether it reaches the text encoder whole and as it was meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from lorasmith.engine.dataset.check_captions import Captions, is_empty
from lorasmith.engine.dataset.findings import Action, Finding, Severity, counted
from lorasmith.engine.dataset.items import ImageItem

_WILDCARD = re.compile(r"\{[^{}]*\|[^{}]*\}")


def check_caption_files(captions: Captions) -> list[Finding]:
    """Return what is wrong with captions as a whole: missing, empty, cut off, with choices that are not drawn."""
    return [finding for check in _CHECKS if (finding := check(captions)) is not None]


def _missing(captions: Captions) -> Finding | None:
    missing = [item for item in captions.dataset.items if not item.captions]
    if not missing:
        return None
    choice = captions.context.config.dataset.missing_captions
    told = counted(len(missing), "picture has", "pictures have")
    what = {
        "ask": "",
        "trigger": ": the trigger alone is used",
        "filename": ": the names of the files are used",
        "folder": ": the name in a folder such as 10_name is used",
        "exclude": ": left out" if len(missing) < len(captions.dataset.items) else ": nothing would be left",
    }[choice]
    action = _choose_for_missing(missing) if choice == "ask" else None
    severity: Severity = "note" if choice != "ask" and len(missing) < len(captions.dataset.items) else "warning"
    return Finding(
        "captions-missing",
        "error" if choice == "ask" else severity,
        f"{told} no caption{what}.",
        "A caption says what may change; what no caption says is learnt as part of the concept.",
        "Write captions here or as NAME.txt beside the pictures, or set dataset.missing_captions: trigger (the trigger "
        "alone), filename, folder (the name in 10_name), exclude (leave them out).",
        files=tuple(item.relative for item in missing),
        action=action,
    )


def _choose_for_missing(missing: Sequence[ImageItem]) -> Action:
    """Return the names of the files where all of them read like words, and else the trigger."""
    stems = [PurePosixPath(item.relative).stem for item in missing]
    if all(len(re.findall(r"[^\W\d_]{2,}", stem)) >= 3 for stem in stems):
        return Action("Use the names of the files as captions", settings={"dataset.missing_captions": "filename"})
    return Action("Use the trigger alone for them", settings={"dataset.missing_captions": "trigger"})


def _empty(captions: Captions) -> Finding | None:
    empty = tuple(item.relative for item in captions.dataset.items if is_empty(item))
    if not empty:
        return None
    return Finding(
        "captions-empty",
        "warning",
        f"{counted(len(empty), 'caption is', 'captions are')} empty.",
        "Such a picture is trained with the trigger alone, so that everything in it becomes part of the concept.",
        "Write what may change in the picture: pose, clothes, background, light.",
        files=empty,
    )


def _recoded(captions: Captions) -> Finding | None:
    told = {
        item.relative: note
        for item in captions.dataset.items
        for note in item.notes
        if item.caption_source != "overlay" and ("Windows-1252" in note or "UTF-16" in note)
    }
    if not told:
        return None
    single = {
        item.relative: item.captions[0]
        for item in captions.dataset.items
        if item.relative in told and len(item.captions) == 1
    }
    return Finding(
        "captions-encoding",
        "note",
        f"{counted(len(told), 'caption is', 'captions are')} not in UTF-8 and {'was' if len(told) == 1 else 'were'} "
        "read another way.",
        "Other trainers stop at such a file or spoil its letters: quotes, dashes, accents.",
        "Look whether they read well here; one key keeps them in UTF-8 beside your files.",
        files=tuple(sorted(told)),
        details=dict(sorted(told.items())),
        action=Action("Keep the texts as they are shown", captions=single) if single else None,
    )


def _too_long(captions: Captions) -> Finding | None:
    over = captions.over_limit()
    if not over:
        return None
    limit, label = captions.context.token_limit, captions.context.base_label or "the base"
    return Finding(
        "captions-too-long",
        "warning",
        f"{counted(len(over), 'caption is', 'captions are')} longer than the {limit} tokens that {label} reads.",
        "The rest is cut off and never seen; what it says is learnt as part of the concept.",
        "Shorten them, or put what matters most first.",
        files=tuple(over),
        details={name: f"{captions.tokens[name]} of {limit} tokens" for name in over},
    )


def _wildcards(captions: Captions) -> Finding | None:
    if captions.context.config.captions.wildcards:
        return None
    told = {item.relative: match[0] for item, text in captions.texts if (match := _WILDCARD.search(text))}
    if not told:
        return None
    return Finding(
        "choices-not-drawn",
        "warning",
        f"{counted(len(told), 'caption holds', 'captions hold')} choices in braces, but captions.wildcards is off.",
        "The text encoder reads braces and bars as they stand, with all choices at once.",
        "Turn captions.wildcards on, so that each use draws one of them.",
        files=tuple(sorted(told)),
        details=told,
        action=Action("Draw one choice for each use", settings={"captions.wildcards": True}),
    )


def _lines(captions: Captions) -> Finding | None:
    if captions.context.config.captions.lines != "join":
        return None
    told = {item.relative: f"{len(lines)} lines" for item, text in captions.texts if len(lines := _lines_of(text)) > 1}
    if not told:
        return None
    return Finding(
        "captions-of-lines",
        "note",
        f"{counted(len(told), 'caption has', 'captions have')} several lines, which are joined to one text.",
        "Other trainers read each line as a caption of its own and draw one for each use.",
        "Set captions.lines to choose if each line describes the whole picture.",
        files=tuple(sorted(told)),
        details=told,
        action=Action("Draw one line for each use", settings={"captions.lines": "choose"}),
    )


_CHECKS: tuple[Callable[[Captions], Finding | None], ...] = (
    _missing,
    _too_long,
    _empty,
    _wildcards,
    _recoded,
    _lines,
)


def _lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]
