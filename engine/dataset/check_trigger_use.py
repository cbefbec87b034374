"""Where captions hold the trigger: once, twice, in the middle, or in those of regularization pictures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from lorasmith.engine.dataset.captions import PLACEHOLDER, full_prompt, split_tags
from lorasmith.engine.dataset.check_captions import Captions
from lorasmith.engine.dataset.findings import Action, Finding, counted


def check_trigger_use(captions: Captions) -> list[Finding]:
    """Return what is to be said of the trigger in the captions."""
    return [finding for check in _CHECKS if (finding := check(captions)) is not None]


def _trigger_place(captions: Captions) -> Finding | None:
    """Find captions that hold the trigger twice or not first; a caption without it is no trouble, since it is added."""
    trigger = captions.trigger
    told: dict[str, str] = {}
    for item, text, places in captions.held:
        if item.regularization or not places:
            continue
        if len(places) > 1:
            told[item.relative] = f"{len(places)} times"
        elif re.search(r"\w", text[: places[0]]):
            told[item.relative] = "not first"
    if not told:
        return None
    settings = captions.context.config.captions.model_copy(update={"prefix": "", "suffix": "", "wildcards": False})
    fixed = {
        item.relative: full_prompt(text, settings)
        for item, text in captions.learnt
        if item.relative in told and len(item.captions) == 1 and "\n" not in text.strip()
    }
    return Finding(
        "trigger-place",
        "note",
        f"{counted(len(told), 'caption holds', 'captions hold')} the trigger “{trigger}” twice or not at the start.",
        "It is taken out and put first, once, before training; a sentence built around it may read oddly then.",
        "Look at the texts as they are trained; write the trigger first, or not at all, to be sure.",
        files=tuple(sorted(told, key=lambda name: (told[name] == "not first", name))),
        details=told,
        action=Action("Write it once and first", captions=fixed) if fixed else None,
    )


def _trigger_missing(captions: Captions) -> Finding | None:
    trigger = captions.trigger
    without = [item for item, _, places in captions.held if not places and not item.regularization]
    if not trigger or not without or len(without) == len(captions.learnt):
        return None
    return Finding(
        "trigger-missing",
        "note",
        f"{counted(len(without), 'caption lacks', 'captions lack')} the trigger “{trigger}” that others hold.",
        "It is put first into these as well, so nothing is lost; but the captions may come from different hands.",
        "Nothing has to be done, unless these pictures do not show what you teach.",
        files=tuple(dict.fromkeys(item.relative for item in without)),
    )


def _trigger_regularization(captions: Captions) -> Finding | None:
    told = [item.relative for item, _, places in captions.held if places and item.regularization]
    if not told:
        return None
    return Finding(
        "trigger-in-regularization",
        "warning",
        f"{counted(len(told), 'regularization caption holds', 'regularization captions hold')} the trigger.",
        "It is taken out there; but if these pictures show what you teach, they teach the base to draw it uncalled.",
        "Use ordinary pictures of the same class, without what you want to teach.",
        files=tuple(dict.fromkeys(told)),
    )


def _no_trigger(captions: Captions) -> Finding | None:
    """Find that no trigger is set, and which word the captions agree on."""
    if captions.trigger or not captions.dataset.items:
        return None
    first = Counter(tags[0] for _, text in captions.learnt if (tags := split_tags(text)))
    word, count = first.most_common(1)[0] if first else ("", 0)
    agreed = count > 1 and count == len(captions.learnt) and " " not in word and word != PLACEHOLDER
    return Finding(
        "no-trigger",
        "note",
        "No trigger word is set, so captions were checked without one.",
        "A run needs a word that calls the LoRA.",
        f"Every caption begins with “{word}”: use it."
        if agreed
        else "Set captions.trigger to a rare word such as zqx.",
        action=Action(f"Use “{word}” as the trigger", settings={"captions.trigger": word}) if agreed else None,
    )


def _placeholder(captions: Captions) -> Finding | None:
    holding = tuple(dict.fromkeys(i.relative for i, text in captions.texts if PLACEHOLDER in text.lower()))
    if not holding:
        return None
    return Finding(
        "trigger-placeholder",
        "note",
        f"{counted(len(holding), 'caption holds', 'captions hold')} the placeholder {PLACEHOLDER}.",
        "It stands for the trigger, which is put first, once; in regularization captions it is taken out.",
        "Nothing has to be done.",
        files=holding,
    )


_CHECKS: tuple[Callable[[Captions], Finding | None], ...] = (
    _trigger_regularization,
    _no_trigger,
    _trigger_place,
    _trigger_missing,
    _placeholder,
)
