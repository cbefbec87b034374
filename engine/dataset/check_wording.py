"""What captions say, and how: tags or sentences, the same everywhere, or what the trigger should stand for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import mean, median

from lorasmith.engine.dataset.captions import split_tags
from lorasmith.engine.dataset.check_captions import Captions, count_tags
from lorasmith.engine.dataset.check_goals import aim_of
from lorasmith.engine.dataset.findings import Action, Finding, counted
from lorasmith.engine.dataset.items import ImageItem

MOST = 0.5
"""A dataset is said to be written in a way that more than this share of its captions is."""
FROM_CAPTIONS = 4
"""With fewer captions nothing is said about what they have in common."""
EVERYWHERE = 0.9
"""A tag in this share of captions is as constant as the trigger; a judgement."""
TAG_WORDS, TAGS = 3, 4
"""Tags are short and many: at least four of usually no more than three words each; a judgement."""
PROSE_WORDS = 8
"""Sentences have about this many words from comma to comma and more; a judgement."""
LONG_WORDS = 20
"""Prose of fewer words is a phrase, such as “a woman sitting on a bench”, that every base reads; a judgement."""
# fmt: off
CLASS_WORDS = frozenset((
    "1girl", "1boy", "1woman", "1man", "2girls", "2boys", "solo", "girl", "boy", "woman", "man", "person", "people",
    "male", "female", "lady", "guy", "child", "kid", "baby", "character", "human", "animal", "cat", "dog", "bird",
    "horse", "car", "object", "product", "item", "toy", "chair", "bottle", "shoe", "bag", "building", "house",
    "photo", "photograph", "picture", "image", "portrait",
))
# fmt: on
"""What says only what kind of thing it is: naming the class in every caption is what guides recommend."""
_STYLE = re.compile(
    r"\b(?:in the style of|(?:style|painting|watercolou?r|sketch|drawing|illustration|anime|manga|artwork|"
    r"digital art|render|cartoon|comic|pixel art|line ?art|oil on canvas|impressionis[mt]\w*)\b)",
    re.IGNORECASE,
)
_MARKED = re.compile(
    r"\b(?:watermark\w*|signature|artist name|web address|patreon (?:username|logo)|logo)\b", re.IGNORECASE
)
_FILE_NAME = re.compile(
    r"(?:img|dsc[nf]?|pxl|image|photo|picture|screenshot|frame|untitled|download)?[\s_\-.()]*\d[\d\s_\-.()]*"
    r"|.*\.(?:png|jpe?g|webp)",
    re.IGNORECASE,
)
_SIDES = re.compile(r"\b(?:left|right)\b", re.IGNORECASE)


def check_wording(captions: Captions) -> list[Finding]:
    """Return what is to be said of the captions' wording, for the base and the goal where they are known."""
    return [finding for check in _CHECKS if (finding := check(captions)) is not None]


def is_tags(text: str) -> bool:
    """Say whether a caption is a list of tags: many short parts between commas."""
    parts = [len(tag.split()) for tag in split_tags(text)]
    return len(parts) >= TAGS and median(parts) <= TAG_WORDS


def is_prose(text: str) -> bool:
    """Say whether a caption is made of sentences: long parts between commas."""
    parts = [len(tag.split()) for tag in split_tags(text)]
    return bool(parts) and mean(parts) >= PROSE_WORDS


def is_long_prose(text: str) -> bool:
    """Say whether a caption is made of sentences and longer than a phrase."""
    return len(text.split()) >= LONG_WORDS and is_prose(text)


def _written_as(texts: Sequence[tuple[ImageItem, str]], kind: Callable[[str], bool]) -> tuple[str, ...]:
    """Return the pictures whose captions are of a kind, where most are; nothing where not."""
    names = tuple(dict.fromkeys(item.relative for item, text in texts if kind(text)))
    return names if len(names) > MOST * len({item.relative for item, _ in texts}) else ()


def _tag_soup(captions: Captions) -> Finding | None:
    names = _written_as(captions.own, is_tags) if captions.context.caption_style == "prose" else ()
    if not names:
        return None
    return Finding(
        "tags-for-prose",
        "warning",
        f"{counted(len(names), 'caption is a list', 'captions are lists')} of tags, but "
        f"{captions.base} reads sentences.",
        "Its text encoder was trained on whole sentences; lists of tags tell it less, and prompts are followed worse.",
        "Write sentences (“a woman with red hair stands in a garden”), or let a captioner write them.",
        files=names,
    )


def _prose(captions: Captions) -> Finding | None:
    names = _written_as(captions.own, is_long_prose) if captions.context.caption_style == "tags" else ()
    if not names:
        return None
    return Finding(
        "prose-for-tags",
        "note",
        f"{counted(len(names), 'caption is', 'captions are')} made of sentences; "
        f"{captions.base} was trained on short phrases and tags.",
        "Its text encoder makes little of long sentences, and they use up its tokens.",
        "Short phrases between commas work best, most important first.",
        files=names,
    )


def _shuffled_prose(captions: Captions) -> Finding | None:
    settings = captions.context.config.captions
    if not settings.shuffle and settings.tag_dropout == 0:
        return None
    names = _written_as(captions.own, is_prose)
    if not names:
        return None
    return Finding(
        "shuffled-prose",
        "warning",
        f"{counted(len(names), 'caption is', 'captions are')} made of sentences, and shuffling or dropping tags tears "
        "them apart at commas.",
        "What reaches the text encoder is pieces of sentences in a wrong order.",
        "Turn captions.shuffle and captions.tag_dropout off for captions of sentences.",
        files=names,
        action=Action("Leave captions whole", settings={"captions.shuffle": False, "captions.tag_dropout": 0.0}),
    )


def _identical(captions: Captions) -> Finding | None:
    texts = [(item, text) for item, text in captions.own if text]
    counts = Counter(" ".join(text.casefold().split()) for _, text in texts)
    pictures = captions.num_learnt
    text, count = counts.most_common(1)[0] if counts else ("", 0)
    if pictures < FROM_CAPTIONS or count <= max(1, MOST * pictures):
        return None
    names = tuple(dict.fromkeys(item.relative for item, own in texts if " ".join(own.casefold().split()) == text))
    told = text if len(text) <= 60 else f"{text[:59]}…"
    return Finding(
        "captions-identical",
        "warning",
        f"{counted(len(names), 'caption is', 'captions are')} the same: “{told}”.",
        f"What no caption tells apart belongs to all: {aim_of(captions.context.goal).uniform}.",
        "Describe what changes from picture to picture, or let a captioner do it.",
        files=names,
    )


def _competing(captions: Captions) -> Finding | None:
    """Find tags in nearly every caption, beside the trigger and words for the class."""
    pictures = captions.num_learnt
    constant = [
        tag
        for tag, _ in count_tags(captions.own_tags, EVERYWHERE * pictures)
        if not _is_class(tag) and len(tag.split()) <= TAG_WORDS
    ]
    several = sum(len(tags) > 1 for _, tags in captions.own_tags)
    if pictures < FROM_CAPTIONS or not constant or several <= MOST * len(captions.own_tags):
        return None
    told = ", ".join(f"“{tag}”" for tag in constant[:5])
    held = {tag.casefold() for tag in constant}
    holding = [(item, text) for item, text in captions.learnt if held & {tag.casefold() for tag in split_tags(text)}]
    fixed = {
        item.relative: ", ".join(tag for tag in split_tags(text) if tag.casefold() not in held)
        for item, text in holding
        if len(item.captions) == 1
    }
    return Finding(
        "competing-tags",
        "warning" if captions.context.goal else "note",
        f"{told} {'stands' if len(constant) == 1 else 'stand'} in nearly every caption, like the trigger.",
        f"Where a word is always there, {aim_of(captions.context.goal).shared}.",
        "Take out of the captions what the trigger is to stand for; keep what may change.",
        files=tuple(dict.fromkeys(item.relative for item, _ in holding)),
        action=Action(f"Take {told} out of the captions", captions=fixed) if fixed else None,
    )


def _is_class(tag: str) -> bool:
    words = re.findall(r"\w+", tag.casefold())
    return all(word in CLASS_WORDS or word in ("a", "an", "the", "of") for word in words)


def _style_described(captions: Captions) -> Finding | None:
    if captions.context.goal != "style" or captions.num_learnt < FROM_CAPTIONS:
        return None
    told = {item.relative: match[0] for item, text in captions.own if (match := _STYLE.search(text))}
    if len(told) <= MOST * captions.num_learnt:
        return None
    return Finding(
        "style-described",
        "warning",
        f"{counted(len(told), 'caption names', 'captions name')} the style itself.",
        f"Where captions name it, {aim_of('style').shared}.",
        "Describe what is to be seen and leave out how it is drawn; the trigger stands for that.",
        files=tuple(sorted(told)),
        details={name: f"“{word}”" for name, word in told.items()},
    )


def _marked(captions: Captions) -> Finding | None:
    told = {item.relative: match[0] for item, text in captions.learnt if (match := _MARKED.search(text))}
    if not told:
        return None
    return Finding(
        "marks-mentioned",
        "note",
        f"{counted(len(told), 'caption mentions', 'captions mention')} a watermark, signature or logo.",
        "Marks are easy to learn; where captions name them, they stay out of the concept, but some come back unasked.",
        "Crop or paint them away where you can, and keep the word in the caption where you cannot.",
        files=tuple(sorted(told)),
        details={name: f"“{word}”" for name, word in told.items()},
    )


def _file_names(captions: Captions) -> Finding | None:
    told = {item.relative: text.strip() for item, text in captions.own if _FILE_NAME.fullmatch(text.strip())}
    if not told:
        return None
    return Finding(
        "captions-like-names",
        "warning",
        f"{counted(len(told), 'caption reads', 'captions read')} like the name of a file.",
        "Numbers and camera names say nothing about the picture, and everything in it becomes part of the concept.",
        "Write what may change in the picture, or let a captioner do it.",
        files=tuple(sorted(told)),
        details=told,
    )


def _mirrored(captions: Captions) -> Finding | None:
    if not captions.context.config.dataset.flip:
        return None
    told = {item.relative: match[0] for item, text in captions.learnt if (match := _SIDES.search(text))}
    if not told:
        return None
    return Finding(
        "mirrored-sides",
        "warning",
        f"{counted(len(told), 'caption says', 'captions say')} left or right, but pictures are mirrored too.",
        "The same words are taught for both sides, so that they come to mean nothing.",
        "Turn dataset.flip off.",
        files=tuple(sorted(told)),
        details={name: f"“{word}”" for name, word in told.items()},
        action=Action("Do not mirror pictures", settings={"dataset.flip": False}),
    )


_CHECKS: tuple[Callable[[Captions], Finding | None], ...] = (
    _identical,
    _tag_soup,
    _shuffled_prose,
    _file_names,
    _mirrored,
    _competing,
    _style_described,
    _prose,
    _marked,
)
