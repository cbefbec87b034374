"""Whether every picture has a caption that reaches the text encoder whole; captions in figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

from lorasmith.engine.dataset.captions import caption_choices, full_prompt, split_tags
from lorasmith.engine.dataset.findings import Action, CheckContext, Finding, Severity, counted
from lorasmith.engine.dataset.items import Dataset, ImageItem

COUNTED_AT_ONCE = 1000
"""Texts that a tokenizer gets in one call."""
KEPT_COUNTS = 100_000
"""Token counts that are kept for the next check, for each tokenizer."""
_TOKENS: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()
_WILDCARD = re.compile(r"\{[^{}]*\|[^{}]*\}")


@dataclass(frozen=True)
class CaptionStatistics:
    """Captions in figures.

    `found` pictures have a caption, `missing` none, and of the found ones `empty` have nothing in it. `over_limit` are
    the pictures whose caption is cut off; it and `longest_tokens` are of the prompts as they are trained, and empty and
    0 where the base is not known. `tags` are (tag, pictures), most common first, of the training pictures.
    """

    found: int
    missing: int
    empty: int
    over_limit: tuple[str, ...]
    longest_words: int
    longest_tokens: int
    median_words: float
    tags: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Captions:
    """The captions of a dataset and what they are trained for."""

    dataset: Dataset
    context: CheckContext

    @property
    def trigger(self) -> str:
        """The trigger word."""
        return self.context.config.captions.trigger.strip()

    @cached_property
    def texts(self) -> tuple[tuple[ImageItem, str], ...]:
        """Every caption that is not empty, with its picture; several for a picture with several."""
        return tuple((item, text) for item in self.dataset.items for text in item.captions if text.strip())

    @cached_property
    def learnt(self) -> tuple[tuple[ImageItem, str], ...]:
        """The captions of pictures that are not for regularization."""
        return tuple((item, text) for item, text in self.texts if not item.regularization)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The tokens of each picture's longest prompt as it is trained; nothing where no tokenizer is known."""
        if not self.context.tokenizers:
            return {}
        settings = self.context.config.captions
        prompts = [
            (item.relative, full_prompt(choice, settings, item.regularization))
            for item in self.dataset.items
            for choice in caption_choices(item.captions, settings) or [""]
        ]
        counts = count_tokens((prompt for _, prompt in prompts), self.context.tokenizers)
        longest: dict[str, int] = {}
        for relative, prompt in prompts:
            longest[relative] = max(longest.get(relative, 0), counts[prompt])
        return longest

    def over_limit(self) -> list[str]:
        """Return the pictures whose longest prompt is cut off, longest first."""
        limit = self.context.token_limit
        over = [name for name, count in self.tokens.items() if limit and count > limit]
        return sorted(over, key=lambda name: (-self.tokens[name], name))


def count_tokens(texts: Iterable[str], tokenizers: Sequence[Any]) -> dict[str, int]:
    """Return the tokens of each text with start and end, by the tokenizer that needs most; each text is read once."""
    distinct = list(dict.fromkeys(texts))
    most = dict.fromkeys(distinct, 0)
    for tokenizer in tokenizers:
        known = _TOKENS.setdefault(tokenizer, {})
        new = [text for text in distinct if text not in known]
        if len(known) + len(new) > KEPT_COUNTS:
            known.clear()
            new = distinct
        for start in range(0, len(new), COUNTED_AT_ONCE):
            part = new[start : start + COUNTED_AT_ONCE]
            # Without verbose=False transformers prints a line about long texts, which are what is looked for here.
            ids = tokenizer(part, verbose=False).input_ids
            known.update(zip(part, map(len, ids), strict=True))
        most = {text: max(count, known[text]) for text, count in most.items()}
    return most


def caption_statistics(dataset: Dataset, context: CheckContext) -> CaptionStatistics:
    """Return the captions in figures."""
    captions = Captions(dataset, context)
    found = [item for item in dataset.items if item.captions]
    words = [len(text.split()) for _, text in captions.texts]
    return CaptionStatistics(
        found=len(found),
        missing=len(dataset.items) - len(found),
        empty=sum(_is_empty(item) for item in found),
        over_limit=tuple(captions.over_limit()),
        longest_words=max(words, default=0),
        longest_tokens=max(captions.tokens.values(), default=0),
        median_words=float(median(words)) if words else 0.0,
        tags=tuple(count_tags(captions.learnt)),
    )


def count_tags(texts: Iterable[tuple[ImageItem, str]]) -> list[tuple[str, int]]:
    """Return each tag with the number of pictures whose captions have it, most common first; case does not count."""
    spelled: dict[str, str] = {}
    pictures: dict[str, set[str]] = {}
    for item, text in texts:
        for tag in split_tags(text):
            folded = tag.casefold()
            spelled.setdefault(folded, tag)
            pictures.setdefault(folded, set()).add(item.relative)
    counts = Counter({folded: len(names) for folded, names in pictures.items()})
    return [(spelled[folded], count) for folded, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]


def check_captions(dataset: Dataset, context: CheckContext) -> list[Finding]:
    """Return what is wrong with captions as a whole: missing, empty, cut off, with choices that are not drawn."""
    captions = Captions(dataset, context)
    return [finding for check in _CHECKS if (finding := check(captions)) is not None]


def _is_empty(item: ImageItem) -> bool:
    return bool(item.captions) and not any(text.strip() for text in item.captions)


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
    empty = tuple(item.relative for item in captions.dataset.items if _is_empty(item))
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
