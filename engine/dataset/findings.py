"""What a check of a dataset can say, and what one key can change about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lorasmith.engine.config import RunConfig

Severity = Literal["error", "warning", "note"]
"""`error`: the run cannot start or would fail; `warning`: the result suffers; `note`: worth knowing."""
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Action:
    """A change that one key makes; nothing of it touches the user's own files.

    `settings` are values by dotted key, `exclude` the pictures to leave out and `captions` new captions, both by the
    pictures' `relative` paths, for the overlay.
    """

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    captions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One thing about a dataset that the user should know.

    `code` names the check (`near-duplicates`). `title` is one sentence with the count, `why` what it does to a LoRA of
    this base and goal, `fix` what to do. `files` are `relative` paths, worst first; `groups` tells which of them belong
    together (duplicates, side by side); `details` what there is to say of one file ("1.8x enlarged").
    """

    code: str
    severity: Severity
    title: str
    why: str
    fix: str
    files: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    details: Mapping[str, str] = field(default_factory=dict)
    action: Action | None = None


@dataclass(frozen=True)
class CheckContext:
    """What the pictures are checked for; everything about the base is optional, and so are the checks that need it.

    `caption_style` is what the base's text encoders were trained on ("" unknown), `token_limit` its tokens for one
    prompt with start and end (0 unknown), `tokenizers` its own. `goal` is a goal of the presets ("" unknown).
    `other_triggers` maps the trigger words of other LoRAs to where they were found.
    """

    config: RunConfig
    base_label: str = ""
    caption_style: Literal["tags", "prose", ""] = ""
    token_limit: int = 0
    tokenizers: Sequence[Any] = ()
    pixel_multiple: int = 8
    goal: str = ""
    other_triggers: Mapping[str, str] = field(default_factory=dict)


def counted(count: int, one: str, many: str) -> str:
    """Return a count with the words that fit it: counted(2, "picture is", "pictures are") is "2 pictures are"."""
    return f"{count:,} {one if count == 1 else many}"
