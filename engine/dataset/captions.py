"""What the text encoder reads: the trigger exactly once and first, then prefix, caption and suffix.

"Exactly once" counts whole words without regard to case: with the trigger `zqx`, `ZQX` counts and `zqxy` does not.
`[trigger]` in a caption stands for the trigger and is treated as one.

One use of a picture goes this way: one of its captions is drawn, or one line of them → wildcards → the trigger is taken
out → tags are dropped and shuffled → prefix and suffix are put around, with a space → the trigger first. A dropped
caption leaves the trigger alone. Every draw is keyed by the picture, the epoch and the use, whatever the batches are.

Wildcards: `{red|green|blue}` draws one choice, an empty one too (`{|very} big`); groups can hold groups. Braces without
a `|`, and braces that do not pair up, are ordinary text; so is what follows a backslash (`\\{`, `\\|`, `\\}`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
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
_SEPARATOR = re.compile(r",(?!(?<=\d,)\d{3}(?!\d))")
_ESCAPED = ("\\{", "\\|", "\\}")
_WILDCARD_TOKEN = re.compile(r"\\[{|}]|[{|}]|[^{|}\\]+|\\")


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
    """Return the prompt for one use of a picture; `index` counts its uses in the epoch from 0.

    Dropped captions leave the trigger alone, or nothing for a regularization picture. The tags of prefix and suffix are
    neither shuffled nor dropped; `keep_tokens` counts the trigger and then the caption's own tags.
    """
    rng = python_rng(seed, f"caption {item.sha256}", epoch, index)
    if rng.random() < settings.dropout:
        return compose(None, settings.trigger, item.regularization)
    choices = caption_choices(item.captions, settings)
    caption = choices[rng.randrange(len(choices))] if choices else ""
    prefix, caption, suffix = (
        expand_wildcards(text, rng.choice) if settings.wildcards else text
        for text in (settings.prefix, caption, settings.suffix)
    )
    if settings.shuffle or settings.tag_dropout > 0:
        tags = split_tags(_without_trigger(caption, _tidy(settings.trigger)))
        with_trigger = bool(settings.trigger) and not item.regularization
        kept = max(0, settings.keep_tokens - with_trigger)
        tail = [tag for tag in tags[kept:] if rng.random() >= settings.tag_dropout]
        if settings.shuffle:
            rng.shuffle(tail)
        caption = ", ".join(tags[:kept] + tail)
    return _joined(prefix, caption, suffix, settings.trigger, item.regularization)


def full_prompt(caption: str | None, settings: CaptionSettings, regularization: bool = False) -> str:
    """Return the prompt of a caption with nothing drawn or dropped: trigger, prefix, caption, suffix.

    Where one has to be drawn, the longest counts: of the lines to choose from, and of the choices of a wildcard.
    """
    caption = max(caption_choices([caption or ""], settings), key=len, default="")
    prefix, caption, suffix = (
        expand_wildcards(text, lambda choices: max(choices, key=len)) if settings.wildcards else text
        for text in (settings.prefix, caption, settings.suffix)
    )
    return _joined(prefix, caption, suffix, settings.trigger, regularization)


def with_class(prompt: str, trigger: str, name: str) -> str:
    """Return a composed prompt with `name` in the trigger's place: "zqx, a red coat" becomes "woman, a red coat"."""
    return f"{_tidy(name)}{prompt.removeprefix(_tidy(trigger))}"


def sample_prompts(
    items: Iterable[ImageItem], settings: CaptionSettings, seed: int, count: int = 3
) -> list[tuple[ImageItem, str]]:
    """Return the first `count` pictures with the exact texts of their first use in the run's first epoch."""
    first = [item for item, _ in zip(items, range(count), strict=False)]
    return [(item, caption_for(item, settings, seed, epoch=0, index=0)) for item in first]


def caption_choices(captions: Sequence[str], settings: CaptionSettings) -> list[str]:
    """Return the texts of which each use draws one: the captions, or each of their lines with `lines = choose`."""
    if settings.lines == "join":
        return [*captions]
    return [line for caption in captions for line in caption.splitlines() if line.strip()]


def is_drawn(item: ImageItem, settings: CaptionSettings) -> bool:
    """Say whether two uses of a picture can have different prompts."""
    if settings.shuffle or settings.dropout > 0 or settings.tag_dropout > 0:
        return True
    texts = (settings.prefix, *item.captions, settings.suffix)
    wild = settings.wildcards and any("{" in text for text in texts)
    return wild or len(caption_choices(item.captions, settings)) > 1


def split_tags(text: str) -> list[str]:
    """Return the comma-separated tags of a caption without empty ones; the comma of a number (1,000) separates none."""
    return [tag for part in _SEPARATOR.split(text) if (tag := " ".join(part.split()))]


def expand_wildcards(text: str, choose: Callable[[list[str]], str]) -> str:
    """Return `text` with every `{one|two}` replaced by what `choose` picks of its choices, inner groups first."""
    # Each open brace has a frame of its choices so far; the first frame is the text itself.
    frames = [[""]]
    for piece in _WILDCARD_TOKEN.findall(text):
        if piece == "{":
            frames.append([""])
        elif piece == "|" and len(frames) > 1:
            frames[-1].append("")
        elif piece == "}" and len(frames) > 1:
            choices = frames.pop()
            frames[-1][-1] += choose(choices) if len(choices) > 1 else f"{{{choices[0]}}}"
        else:
            frames[-1][-1] += piece[1:] if len(piece) == 2 and piece in _ESCAPED else piece
    while len(frames) > 1:
        unclosed = "{" + "|".join(frames.pop())
        frames[-1][-1] += unclosed
    return frames[0][0]


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
    text, note = decode_text(data)
    if "\0" in text:
        return None, "not a text file"
    return text, note or ("" if text.strip() else "empty")


def decode_text(data: bytes) -> tuple[str, str]:
    """Return the text of a file's bytes and a remark where it is not UTF-8: UTF-16 with its mark, or Windows-1252."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace"), "read as UTF-16"
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace"), "not UTF-8, read as Windows-1252"


def has_trigger(text: str, trigger: str) -> bool:
    """Say whether `text` holds the trigger as a whole word, in any case."""
    trigger = _tidy(trigger)
    return bool(trigger) and _pattern(trigger).search(text) is not None


def _joined(prefix: str, caption: str, suffix: str, trigger: str, regularization: bool) -> str:
    caption = _without_trigger(caption, _tidy(trigger))
    return compose(f"{prefix} {caption} {suffix}", trigger, regularization)


@lru_cache(maxsize=4096)
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
