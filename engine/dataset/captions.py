"""What the text encoder reads: the trigger exactly once and first, then the caption.

"Exactly once" counts whole words without regard to case: with the trigger `zqx`, `ZQX` counts and `zqxy` does not.
`[trigger]` in a caption stands for the trigger and is treated as one.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.engine.config import CaptionSettings
from lorasmith.engine.draws import python_rng
from lorasmith.engine.errors import ConfigError

if TYPE_CHECKING:
    from lorasmith.engine.dataset.items import ImageItem

PLACEHOLDER = "[trigger]"
MAX_CAPTION_BYTES = 64_000


def compose(caption: str | None, trigger: str, regularization: bool = False) -> str:
    """Return the prompt for a caption: the trigger once and first, e.g. "zqx, a red circle".

    Without a caption it is the trigger alone. With `regularization` the trigger is taken out and not put back.
    """
    trigger = _tidy(trigger)
    rest = _without_trigger(caption or "", trigger)
    if regularization or not trigger:
        return rest
    return f"{trigger}, {rest}" if rest else trigger


def caption_for(item: ImageItem, settings: CaptionSettings, seed: int, epoch: int, index: int) -> str:
    """Return the prompt for one use of a picture, with dropout and shuffling drawn anew for each use.

    `index` is the place of this use in the epoch. Dropped captions leave the trigger alone, or nothing for a
    regularization picture.
    """
    rng = python_rng(seed, "caption", epoch, index)
    if rng.random() < settings.dropout:
        return compose(None, settings.trigger, item.regularization)
    prompt = compose(item.caption, settings.trigger, item.regularization)
    if not settings.shuffle:
        return prompt
    tags = [tag.strip() for tag in prompt.split(",")]
    kept = settings.keep_tokens if item.regularization else max(1, settings.keep_tokens)
    tail = tags[kept:]
    rng.shuffle(tail)
    return ", ".join(tags[:kept] + tail)


def require_trigger(settings: CaptionSettings) -> None:
    """Raise ConfigError where there is no trigger word."""
    if not settings.trigger.strip():
        raise ConfigError(
            "captions.trigger is empty.",
            why="Without a trigger word nothing calls the LoRA.",
            fix="Set captions.trigger to a rare word such as zqx.",
        )


def read_caption(path: Path) -> tuple[str | None, str]:
    """Return a caption file's text and a remark for the user; None and the reason where it cannot be a caption."""
    try:
        if not path.is_file():
            return None, "not an ordinary file"
        if path.stat().st_size > MAX_CAPTION_BYTES:
            return None, f"larger than {MAX_CAPTION_BYTES // 1000} kB"
        data = path.read_bytes()
    except OSError as error:
        return None, error.strerror or str(error)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text, note = data.decode("utf-16", errors="replace"), "read as UTF-16"
    else:
        try:
            text, note = data.decode("utf-8-sig"), ""
        except UnicodeDecodeError:
            text, note = data.decode("cp1252", errors="replace"), "not UTF-8, read as Windows-1252"
    if "\0" in text:
        return None, "not a text file"
    return text, note or ("" if text.strip() else "empty")


def has_trigger(text: str, trigger: str) -> bool:
    """Say whether `text` holds the trigger as a whole word, in any case."""
    trigger = _tidy(trigger)
    return bool(trigger) and _pattern(trigger).search(text) is not None


def _without_trigger(caption: str, trigger: str) -> str:
    text = _tidy(caption)
    while True:
        # Again until nothing changes: taking "a b" out of "a a b b" leaves another one.
        shorter = _tidy(_pattern(trigger).sub(" ", text))
        if shorter == text:
            return text
        text = shorter


@lru_cache(maxsize=64)
def _pattern(trigger: str) -> re.Pattern[str]:
    placeholder = re.escape(PLACEHOLDER)
    if not trigger:
        return re.compile(placeholder, re.IGNORECASE)
    word = r"\s+".join(re.escape(part) for part in trigger.split())
    return re.compile(rf"(?:{placeholder}|(?<!\w){word}(?!\w))(?:['’]s(?!\w))?", re.IGNORECASE)


def _tidy(text: str) -> str:
    """Return the text on one line, single spaces, without the empty tags that a removed word leaves."""
    text = " ".join(text.split())
    text = re.sub(r"\s*,(?:\s*,)+", ",", text)
    return re.sub(r"\s+,", ",", text).strip(" ,")
