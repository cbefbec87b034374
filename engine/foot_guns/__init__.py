"""Settings that are known to spoil a LoRA, each with its fix. Torch-free.

A row is a function in `_rates`, `_amounts` or `_choices` that looks at a `Case`. What a base model bears comes from the
`[advice]` of its preset and from its spec; no row knows a base model. What cannot work at all is refused by
`engine.combinations`; what is said here may be meant so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.check_wording import is_long_prose, is_tags
from lorasmith.engine.foot_guns import _amounts, _choices, _rates
from lorasmith.engine.foot_guns._case import Case, Circumstances, FootGun

if TYPE_CHECKING:
    from lorasmith.engine.dataset.items import Dataset
    from lorasmith.engine.families import BaseIdentity, FamilySpec

__all__ = ["Circumstances", "FootGun", "circumstances_of", "find_foot_guns", "loose_config", "tell_foot_guns"]

ROWS = (*_rates.ROWS, *_amounts.ROWS, *_choices.ROWS)
LOOKED_AT = 400
"""So many captions are enough to tell how all are written."""
TOLD_ELSEWHERE = frozenset({"no-meaning", "no-training-adapter"})
"""Rows of which plans and runs speak already, by `base_contradictions` and `compatibility_problems`."""


def find_foot_guns(
    config: RunConfig,
    spec: FamilySpec,
    identity: BaseIdentity | None = None,
    num_pictures: int | None = None,
    trigger_known: str = "",
    around: Circumstances | None = None,
) -> list[FootGun]:
    """Return what is known to spoil a LoRA of this base model with these settings, the gravest first.

    `num_pictures` are those to learn from, without regularization. `trigger_known` says that the base's tokenizer knows
    the trigger word (the finding `trigger-known-word` of `dataset.triggers`); "" where it does not, or nobody asked. A
    tiny base model for trying out is only told what holds for every base.
    """
    case = Case(config, spec, identity, num_pictures, trigger_known, around or Circumstances())
    found = [gun for row in ROWS if (gun := row(case)) is not None]
    return sorted(found, key=lambda gun: gun.severity != "warning")


def loose_config(values: Mapping[str, Any]) -> RunConfig:
    """Return a configuration of dotted settings that need not go together, for `find_foot_guns` alone.

    A form can so offer the fix of settings that `RunConfig` refuses. Values that are wrong by themselves are left at
    their defaults.
    """
    usual = RunConfig()
    sections: dict[str, BaseModel] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        model = sections.get(section) or getattr(usual, section, None)
        if not isinstance(model, BaseModel) or name not in type(model).model_fields:
            continue
        sections.setdefault(section, model.model_copy())
        with contextlib.suppress(ValidationError):
            type(model).__pydantic_validator__.validate_assignment(sections[section], name, value)
    return usual.model_copy(update=sections)


def circumstances_of(dataset: Dataset, goal: str = "") -> Circumstances:
    """Return how the captions of a scanned dataset are written."""
    texts = [text for item in dataset.items if not item.regularization for text in item.captions if text.strip()]
    texts = texts[:: max(1, len(texts) // LOOKED_AT)]
    return Circumstances(
        goal=goal,
        captions=len(texts),
        tag_captions=sum(map(is_tags, texts)),
        prose_captions=sum(map(is_long_prose, texts)),
    )


def tell_foot_guns(
    config: RunConfig, spec: FamilySpec, identity: BaseIdentity | None, dataset: Dataset | None
) -> list[FootGun]:
    """Return what a plan or a starting run says beside what it says of base and layouts."""
    pictures, around = None, Circumstances()
    if dataset is not None:
        pictures = sum(not item.regularization for item in dataset.items)
        around = circumstances_of(dataset)
    found = find_foot_guns(config, spec, identity, pictures, around=around)
    return [gun for gun in found if gun.key not in TOLD_ELSEWHERE]
