"""Datasets made of values alone, for tests of what a check says about them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.buckets import plan_buckets
from lorasmith.engine.dataset.check import check_dataset
from lorasmith.engine.dataset.findings import CheckContext, Finding
from lorasmith.engine.dataset.items import Dataset, ImageItem, Measures
from lorasmith.engine.run_file import Layer, resolve_config

GOOD = Measures(perceptual_hash=0, sharpness=0.95, brightness=0.5, contrast=0.2, border=0.0)
"""A crisp, well lit picture."""


class LetterTokenizer:
    """Knows some words; every other word is split into its letters. Start and end take a token each."""

    unk_token = "<unk>"
    model_max_length = 77

    def __init__(self, *known: str) -> None:
        self.known = known
        self.read: list[str] = []

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        for word in text.split():
            letters = [letter if letter.isascii() else "<unk>" for letter in word]
            tokens += [word] if word.strip(",") in self.known else letters
        return tokens

    def __call__(self, texts: Sequence[str], verbose: bool = True) -> Any:
        assert not verbose
        self.read += texts
        return SimpleNamespace(input_ids=[[0, *range(len(self.tokenize(text))), 1] for text in texts])


def measures(**changes: Any) -> Measures:
    return Measures(**(vars(GOOD) | changes))


def picture(name: str, caption: str | None = "a thing", **changes: Any) -> ImageItem:
    """A crisp 512 x 512 picture unlike all others, unless `changes` say so."""
    draw = random.Random(name)
    facts: dict[str, Any] = {
        "sha256": f"{draw.getrandbits(256):064x}",
        "width": 512,
        "height": 512,
        "captions": () if caption is None else (caption,),
        "measures": measures(perceptual_hash=draw.getrandbits(64)),
    }
    return ImageItem(Path("/data") / name, name, **(facts | changes))


def pictures(count: int, **changes: Any) -> list[ImageItem]:
    """Different pictures with different captions."""
    return [picture(f"{number:03}.png", f"a thing of kind {number}", **changes) for number in range(count)]


def dataset(items: Sequence[ImageItem]) -> Dataset:
    return Dataset(Path("/data"), tuple(items), (), len(items))


def config(**values: Any) -> RunConfig:
    """Settings by dotted key with `__` for the dot."""
    tree: dict[str, dict[str, Any]] = {"captions": {"trigger": "zqx"}}
    for key, value in values.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return resolve_config([Layer("test", tree)]).config


def context(facts: Mapping[str, Any] | None = None, **values: Any) -> CheckContext:
    return CheckContext(config(**values), **(facts or {}))


def found(items: Sequence[ImageItem], facts: Mapping[str, Any] | None = None, **values: Any) -> list[Finding]:
    """Everything a check says about the pictures with these settings."""
    about = context(facts, **values)
    return check_dataset(dataset(items), plan_buckets(items, about.config.dataset), about)


def finding(code: str, items: Sequence[ImageItem], facts: Mapping[str, Any] | None = None, **values: Any) -> Finding:
    """The one finding of that code; fails where there is none, or several."""
    [one] = [finding for finding in found(items, facts, **values) if finding.code == code]
    return one


def codes(items: Sequence[ImageItem], facts: Mapping[str, Any] | None = None, **values: Any) -> set[str]:
    return {finding.code for finding in found(items, facts, **values)}
