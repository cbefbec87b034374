"""Whether every picture has a caption, and whether it reaches the text encoder whole and as it was meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lorasmith.engine.dataset.check_captions import Captions, is_empty
from lorasmith.engine.dataset.findings import Action, Finding, counted
from lorasmith.engine.dataset.items import ImageItem
from lorasmith.engine.dataset.missing_captions import filename_caption, missing_captions, require_captions
from lorasmith.engine.errors import DatasetError

MIN_NAME_WORDS = 3
"""File names of fewer words are names and no descriptions; a judgement."""
_DONE = {
    "trigger": "the trigger alone is used",
    "filename": "the names of the files are used",
    "folder": "the name in a folder such as 10_name is used",
    "exclude": "they are left out",
}
_WILDCARD = re.compile(r"\{[^{}]*\|[^{}]*\}")


def check_caption_files(captions: Captions) -> list[Finding]:
    """Return what is wrong with captions as a whole: missing, empty, cut off, with choices that are not drawn."""
    return [finding for check in _CHECKS if (finding := check(captions)) is not None]


def _missing(captions: Captions) -> Finding | None:
    missing = missing_captions(captions.dataset)
    if not missing:
        return None
    settings = captions.context.config.dataset
    refused = _refusal(captions)
    what = "" if refused is not None else f": {_DONE[settings.missing_captions]}"
    return Finding(
        "captions-missing",
        "note" if refused is None else "error",
        f"{counted(len(missing), 'picture has', 'pictures have')} no caption{what}.",
        "A caption says what may change; what no caption says is learnt as part of the concept."
        if refused is None or settings.missing_captions == "ask"
        else f"{refused.what} {refused.why}",
        "Write captions here or as NAME.txt beside the pictures, or set dataset.missing_captions: trigger (the trigger "
        "alone), filename, folder (the name in 10_name), exclude (leave them out).",
        files=tuple(item.relative for item in missing),
        action=_choose_for_missing(missing) if refused is not None else None,
    )


def _refusal(captions: Captions) -> DatasetError | None:
    """Return why a run would not start with these captions, None where it would."""
    try:
        require_captions(captions.dataset, captions.context.config.dataset)
    except DatasetError as error:
        return error
    return None


def _choose_for_missing(missing: Sequence[ImageItem]) -> Action:
    """Return the names of the files where all of them read like descriptions, and else the trigger."""
    if all(len(filename_caption(item.relative).split()) >= MIN_NAME_WORDS for item in missing):
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
        "Look whether they read well here; in the wizard one key keeps them as UTF-8, beside your files.",
        files=tuple(sorted(told)),
        details=dict(sorted(told.items())),
        action=Action("Keep the texts as they are shown", captions=single) if single else None,
    )


def _twice(captions: Captions) -> Finding | None:
    told = {
        item.relative: note
        for item in captions.dataset.items
        for note in item.notes
        if note.startswith("has another caption in ") and item.caption_source != "overlay"
    }
    if not told:
        return None
    return Finding(
        "captions-twice",
        "note",
        f"{counted(len(told), 'picture has', 'pictures have')} a second caption that is not used.",
        "Captions lie in two places, such as a .txt and a .caption file; an older one may be the one in use.",
        "Look whether the right one is shown, and remove the other.",
        files=tuple(sorted(told)),
        details=dict(sorted(told.items())),
    )


def _too_long(captions: Captions) -> Finding | None:
    over = captions.over_limit()
    if not over:
        return None
    limit, count = captions.context.token_limit, len(over)
    return Finding(
        "captions-too-long",
        "warning",
        f"{counted(count, 'caption is', 'captions are')} longer than the {limit} tokens that {captions.base} reads.",
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
    _twice,
    _lines,
)


def _lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]
