"""The word that calls the LoRA: how the base's tokenizers read it, and which other LoRAs answer to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasmith.engine.dataset.findings import Action, Finding, counted

SHORT_TRIGGER = 2
"""Words of so few letters also stand for ordinary things and abbreviations; a judgement."""
LONG_TRIGGER = 5
"""More tokens than this are a noticeable part of the 75 that a CLIP prompt holds; a judgement."""
OVERLAP = 3
"""Shorter triggers are not looked for inside others: one or two letters are in nearly everything."""
# Letters that no language puts together, so that they are rare in every vocabulary.
_SUGGESTIONS = ("zqx", "vqzk", "xjqw", "qwzv", "zkvx", "jxqz", "wqkz", "kzvq")
_PROMPT_SYNTAX = frozenset('()[]{}<>:|\\"*')


@dataclass(frozen=True)
class Word:
    """A word as one tokenizer reads it; `unknown` marks letters that it does not have."""

    tokens: tuple[str, ...]
    unknown: bool = False


def read_word(tokenizer: Any, word: str) -> Word:
    """Return how a tokenizer splits `word`."""
    tokens = tuple(str(token) for token in tokenizer.tokenize(word))
    return Word(tokens, unknown=getattr(tokenizer, "unk_token", None) in tokens)


def check_trigger(
    trigger: str, tokenizers: Sequence[Any] = (), other_triggers: Mapping[str, str] | None = None
) -> list[Finding]:
    """Return what is doubtful about a trigger word, each with what to do instead; nothing for an empty one.

    `other_triggers` maps the triggers of other LoRAs to where they were found.
    """
    trigger = " ".join(trigger.split())
    if not trigger:
        return []
    words = [read_word(tokenizer, trigger) for tokenizer in tokenizers]
    others = other_triggers or {}
    better = _suggest(tokenizers, others)
    found = [check(trigger, words) for check in _CHECKS]
    found += [_taken(trigger, others), _overlap(trigger, others)]
    return [_with_suggestion(finding, better) for finding in found if finding is not None]


def _known_word(trigger: str, words: Sequence[Word]) -> Finding | None:
    if not any(len(word.tokens) == 1 and not word.unknown for word in words):
        return None
    return Finding(
        "trigger-known-word",
        "warning",
        f"The base knows this word already: “{trigger}” is a token of its own.",
        "It has a meaning that the LoRA has to unlearn first, and other prompts with the word change too.",
        "A rare word binds more cleanly.",
    )


def _unknown_characters(trigger: str, words: Sequence[Word]) -> Finding | None:
    if not any(word.unknown for word in words):
        return None
    return Finding(
        "trigger-unknown-characters",
        "warning",
        "Some characters of the trigger are unknown to the base.",
        "All unknown characters look the same to it, so any other unknown word would call the LoRA too.",
        "Use plain letters.",
    )


def _digits(trigger: str, words: Sequence[Word]) -> Finding | None:
    # mrbizarro/Phosphene issue 62 tokenized triggers: those of letters worked, those with digits did not.
    if not any(character.isdigit() for character in trigger):
        return None
    return Finding(
        "trigger-digits",
        "warning",
        "Digits are split into single tokens that mean numbers.",
        "Numbers are in many captions and prompts, so the trigger binds to them as well.",
        "Letters alone bind better.",
    )


def _long(trigger: str, words: Sequence[Word]) -> Finding | None:
    longest = max((len(word.tokens) for word in words), default=0)
    if longest <= LONG_TRIGGER:
        return None
    return Finding(
        "trigger-long",
        "warning",
        f"The trigger is long: it takes {longest} tokens.",
        "It takes them from every caption, and each of its pieces has to be learnt.",
        "Three to five letters are enough.",
    )


def _short(trigger: str, words: Sequence[Word]) -> Finding | None:
    # A letter of Chinese or Japanese is a whole word, and rarely one that captions hold by chance.
    if len(trigger) > SHORT_TRIGGER or not trigger.isascii():
        return None
    return Finding(
        "trigger-short",
        "warning",
        f"“{trigger}” is very short.",
        "So short a word also turns up in captions and prompts that do not mean the LoRA.",
        "Take three to five letters.",
    )


def _several_words(trigger: str, words: Sequence[Word]) -> Finding | None:
    count = len(trigger.split())
    if count == 1:
        return None
    return Finding(
        "trigger-several-words",
        "note",
        f"The trigger is {count} words; each keeps its own meaning.",
        "Where the base knows one of them, prompts with that word alone change too.",
        "One rare word binds more cleanly; what the thing is (woman, dog, chair) can stand in the captions.",
    )


def _prompt_syntax(trigger: str, words: Sequence[Word]) -> Finding | None:
    marks = sorted(_PROMPT_SYNTAX & set(trigger))
    if not marks:
        return None
    return Finding(
        "trigger-prompt-syntax",
        "warning",
        f"The trigger holds {' '.join(marks)}, which programs that draw pictures read as commands.",
        "They take brackets and colons as weights or choices, and the word never reaches the base as it was trained.",
        "Use letters alone.",
    )


_CHECKS: tuple[Callable[[str, Sequence[Word]], Finding | None], ...] = (
    _known_word,
    _unknown_characters,
    _digits,
    _long,
    _short,
    _several_words,
    _prompt_syntax,
)
_REPLACEABLE = frozenset({"trigger-known-word", "trigger-unknown-characters", "trigger-taken", "trigger-prompt-syntax"})


def _taken(trigger: str, others: Mapping[str, str]) -> Finding | None:
    places = sorted(place for other, place in others.items() if _folded(other) == _folded(trigger))
    if not places:
        return None
    return Finding(
        "trigger-taken",
        "warning",
        f"{counted(len(places), 'other LoRA is', 'other LoRAs are')} called by “{trigger}” too: {places[0]}.",
        "Used together, both answer to the word, and neither can be called alone.",
        "Take another word, unless this LoRA replaces that one.",
    )


def _overlap(trigger: str, others: Mapping[str, str]) -> Finding | None:
    mine = _folded(trigger)
    close = {
        other: place
        for other, place in sorted(others.items())
        if mine != _folded(other)
        and min(len(mine), len(_folded(other))) >= OVERLAP
        and (mine in _folded(other) or _folded(other) in mine)
    }
    if not close:
        return None
    other, place = next(iter(close.items()))
    return Finding(
        "trigger-overlap",
        "note",
        f"“{trigger}” and “{other}”, the trigger of {place}, are parts of one another.",
        "They may share tokens, so that each can call a little of the other LoRA in the same prompt.",
        "Take a word with other letters if both LoRAs are to be used together.",
    )


def _suggest(tokenizers: Sequence[Any], others: Mapping[str, str]) -> str:
    """Return a rare word that nothing is found against, or "" where there is none."""
    for word in _SUGGESTIONS:
        read = [read_word(tokenizer, word) for tokenizer in tokenizers]
        free = _taken(word, others) is None and _overlap(word, others) is None
        if free and not any(check(word, read) for check in _CHECKS):
            return word
    return ""


def _with_suggestion(finding: Finding, word: str) -> Finding:
    if not word or finding.code not in _REPLACEABLE:
        return finding
    action = Action(f"Use “{word}” as the trigger", settings={"captions.trigger": word})
    return Finding(finding.code, finding.severity, finding.title, finding.why, finding.fix, action=action)


def _folded(trigger: str) -> str:
    return re.sub(r"\s+", " ", trigger).strip().casefold()
