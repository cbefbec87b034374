"""The captions of a dataset as its checks see them, in words, tags and tokens, and in figures for the user."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

from lorasmith.engine.dataset.captions import PLACEHOLDER, caption_choices, full_prompt, split_tags
from lorasmith.engine.dataset.findings import CheckContext
from lorasmith.engine.dataset.items import Dataset, ImageItem
from lorasmith.engine.families import FamilySpec

COUNTED_AT_ONCE = 1000
"""Texts that a tokenizer gets in one call."""
KEPT_COUNTS = 100_000
"""Token counts that are kept for the next check, for each tokenizer."""
MAX_SANE_LIMIT = 100_000
"""Tokenizers without a limit of their own state an enormous one."""
_TOKENS: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


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

    @property
    def base(self) -> str:
        """The base's name without its details, for the middle of a sentence."""
        return self.context.base_label.split(",")[0].strip() or "this base"

    @cached_property
    def texts(self) -> tuple[tuple[ImageItem, str], ...]:
        """Every caption that is not empty, with its picture; several for a picture with several."""
        return tuple((item, text) for item in self.dataset.items for text in item.captions if text.strip())

    @cached_property
    def learnt(self) -> tuple[tuple[ImageItem, str], ...]:
        """The captions of pictures that are not for regularization."""
        return tuple((item, text) for item, text in self.texts if not item.regularization)

    @cached_property
    def held(self) -> tuple[tuple[ImageItem, str, tuple[int, ...]], ...]:
        """`texts`, each with where it holds the trigger as a whole word in any case."""
        if not self.trigger:
            return tuple((item, text, ()) for item, text in self.texts)
        parts = r"\s+".join(re.escape(part) for part in self.trigger.split())
        word = re.compile(rf"(?<!\w){parts}(?!\w)", re.IGNORECASE)
        return tuple((item, text, tuple(match.start() for match in word.finditer(text))) for item, text in self.texts)

    @cached_property
    def own(self) -> tuple[tuple[ImageItem, str], ...]:
        """The captions of `learnt` without the trigger and its placeholder; empty where there is nothing else."""
        settings = self.context.config.captions
        plain = settings.model_copy(update={"prefix": "", "suffix": "", "wildcards": False, "lines": "join"})
        signs = (PLACEHOLDER, self.trigger.split()[0].casefold() if self.trigger else PLACEHOLDER)
        return tuple(
            (item, full_prompt(text, plain, regularization=True) if any(s in text.casefold() for s in signs) else text)
            for item, text in self.learnt
        )

    @cached_property
    def own_tags(self) -> tuple[tuple[ImageItem, list[str]], ...]:
        """The tags of `own`."""
        return tuple((item, split_tags(text)) for item, text in self.own)

    @cached_property
    def num_learnt(self) -> int:
        """How many pictures have a caption in `learnt`."""
        return len({item.relative for item, _ in self.learnt})

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
        reading = reading_tokenizers(self.context.tokenizers, self.context.token_limit)
        counts = count_tokens((prompt for _, prompt in prompts), reading)
        longest: dict[str, int] = {}
        for relative, prompt in prompts:
            longest[relative] = max(longest.get(relative, 0), counts[prompt])
        return longest

    def over_limit(self) -> list[str]:
        """Return the pictures whose longest prompt is cut off, longest first."""
        limit = self.context.token_limit
        over = [name for name, count in self.tokens.items() if limit and count > limit]
        return sorted(over, key=lambda name: (-self.tokens[name], name))


def is_empty(item: ImageItem) -> bool:
    """Say whether a picture has captions and nothing in them."""
    return bool(item.captions) and not any(text.strip() for text in item.captions)


def token_limit(spec: FamilySpec | None, tokenizers: Sequence[Any]) -> int:
    """Return the tokens of one prompt that are read: the family's limit or a tokenizer's own smaller one; 0 unknown.

    Of several encoders, that of the one that reads most: what CLIP cuts after 77 tokens, T5 still reads.
    """
    most = spec.token_limit if spec is not None else 0
    own = [limit for limit in map(_own_limit, tokenizers) if limit]
    if not own or len(own) < len(tokenizers):
        return most
    return min(max(own), most) if most else max(own)


def reading_tokenizers(tokenizers: Sequence[Any], limit: int) -> list[Any]:
    """Return the tokenizers whose encoders read prompts up to `limit`, the result of `token_limit`."""
    return [tokenizer for tokenizer in tokenizers if (_own_limit(tokenizer) or limit) >= limit]


def _own_limit(tokenizer: Any) -> int:
    """Return the tokens that a tokenizer takes, 0 where it does not say."""
    own = int(getattr(tokenizer, "model_max_length", 0))
    return own if 0 < own < MAX_SANE_LIMIT else 0


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
        empty=sum(is_empty(item) for item in found),
        over_limit=tuple(captions.over_limit()),
        longest_words=max(words, default=0),
        longest_tokens=max(captions.tokens.values(), default=0),
        median_words=float(median(words)) if words else 0.0,
        tags=tuple(count_tags((item, split_tags(text)) for item, text in captions.learnt)),
    )


def count_tags(tagged: Iterable[tuple[ImageItem, list[str]]], least: float = 1) -> list[tuple[str, int]]:
    """Return each tag that at least `least` pictures have with their number, most common first; case does not count.

    All captions of a picture come one after another.
    """
    spelled: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for _, captions in groupby(tagged, key=lambda pair: pair[0].relative):
        folded = {tag.casefold(): tag for _, tags in captions for tag in tags}
        counts.update(folded.keys())
        for key, tag in folded.items():
            spelled.setdefault(key, tag)
    common = [(-count, folded) for folded, count in counts.items() if count >= least]
    return [(spelled[folded], -count) for count, folded in sorted(common)]
