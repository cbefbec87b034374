"""Captioning pictures one by one into the overlay: resumable, and one failure never loses the others.

Each caption is on the disk before the next picture is opened. What a person wrote is never written over: neither a
caption of the dataset, nor an edit in the overlay. Pictures with the same bytes are captioned once.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorasmith.engine.captioners import Captioner
from lorasmith.engine.dataset.images import open_image
from lorasmith.engine.dataset.items import ImageItem
from lorasmith.engine.dataset.overlay import PERSON, Edit, append_edits, read_overlay
from lorasmith.engine.errors import DatasetError, LorasmithError

OWN_CAPTION = "it has a caption of its own"
OWN_EDIT = "you edited its caption"
LEFT_OUT = "it is left out"
_MADE_UP = ("none", "filename", "folder")
"""Caption sources that no person wrote for the picture."""


@dataclass(frozen=True)
class CaptioningStep:
    """One picture finished: `caption` is "" where it `failed` or somebody else edited it meanwhile (`skipped`).

    `seconds_left` is None where nothing can be said yet.
    """

    done: int
    total: int
    relative: str
    caption: str
    failed: str = ""
    skipped: str = ""
    seconds_left: float | None = None


@dataclass
class CaptioningResult:
    """What was captioned, failed (with the reason) and skipped (with the reason), each by `relative` path."""

    done: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


@dataclass(frozen=True)
class CaptioningPlan:
    """Which pictures get a caption, and why the others do not; `known` are captions of the same captioner by sha256."""

    wanted: tuple[ImageItem, ...]
    skipped: Mapping[str, str]
    known: Mapping[str, str]


def caption_pictures(
    items: Sequence[ImageItem],
    captioner: Captioner,
    overlay: Path,
    *,
    replace_machine: bool = False,
    on_progress: Callable[[CaptioningStep], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> CaptioningResult:
    """Caption every picture that has no caption, one overlay edit each, signed with the captioner's name.

    With `replace_machine` captions of any captioner are made anew; those of a person never are. Asks `should_stop`
    before each picture. Raises DatasetError where the overlay is damaged, and StorageError where it cannot be written;
    everything before is kept.
    """
    by = captioner.spec.name
    file = _Overlay(overlay)
    plan = plan_captioning(items, file.edits(), by, replace_machine=replace_machine)
    result = CaptioningResult(skipped=dict(plan.skipped))
    known = dict(plan.known)
    started, made = time.monotonic(), 0
    for number, item in enumerate(plan.wanted, 1):
        if should_stop is not None and should_stop():
            result.stopped = True
            break
        made += item.sha256 not in known
        caption, failed = (known[item.sha256], "") if item.sha256 in known else _try_caption(item, captioner)
        # Somebody may have edited captions while the model was at work.
        skipped = _reason_to_skip(item, file.edits().get(item.relative), replace_machine)
        if skipped:
            result.skipped[item.relative], caption, failed = skipped, "", ""
        elif failed:
            result.failed[item.relative] = failed
        else:
            file.add(item.relative, Edit((caption,), by=by))
            result.done[item.relative] = known[item.sha256] = caption
        if on_progress is not None:
            seconds = (time.monotonic() - started) / made * (len(plan.wanted) - number) if made else None
            on_progress(CaptioningStep(number, len(plan.wanted), item.relative, caption, failed, skipped, seconds))
    return result


class _Overlay:
    """The overlay as it is now: read again whenever somebody else has written to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._edits: dict[str, Edit] = {}
        self._size = -1

    def edits(self) -> Mapping[str, Edit]:
        """Return the newest edit of each picture."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size != self._size:
            self._edits, self._size = read_overlay(self._path), size
        return self._edits

    def add(self, relative: str, edit: Edit) -> None:
        """Write one edit through to the disk."""
        append_edits(self._path, {relative: edit})
        self._edits[relative] = edit
        self._size = self._path.stat().st_size


def plan_captioning(
    items: Iterable[ImageItem], edits: Mapping[str, Edit], by: str, *, replace_machine: bool = False
) -> CaptioningPlan:
    """Sort pictures into those that the captioner `by` is to caption and those that it must leave alone."""
    wanted: list[ImageItem] = []
    skipped: dict[str, str] = {}
    known: dict[str, str] = {}
    for item in items:
        edit = edits.get(item.relative)
        reason = _reason_to_skip(item, edit, replace_machine)
        if not reason:
            wanted.append(item)
            continue
        skipped[item.relative] = reason
        if edit is not None and edit.by == by and edit.captions and not replace_machine:
            known[item.sha256] = edit.captions[0]
    return CaptioningPlan(tuple(wanted), skipped, known)


def without_own_captions(items: Iterable[ImageItem]) -> list[ImageItem]:
    """Return the pictures as if their datasets had no captions, for somebody who asks to replace those.

    The files stay as they are: the overlay counts instead of them. Edits of a person in the overlay are still kept.
    """
    return [item if item.caption_source == "overlay" else replace(item, captions=()) for item in items]


def _reason_to_skip(item: ImageItem, edit: Edit | None, replace_machine: bool) -> str:
    """Return why a picture gets no caption, "" if it gets one."""
    if edit is not None and edit.exclude:
        return LEFT_OUT
    if edit is not None and edit.captions is not None:
        if edit.by == PERSON:
            return OWN_EDIT
        return "" if replace_machine else f"{edit.by} captioned it already"
    written = any(text.strip() for text in item.captions)
    return OWN_CAPTION if written and item.caption_source not in _MADE_UP else ""


def _try_caption(item: ImageItem, captioner: Captioner) -> tuple[str, str]:
    """Return (caption, "") or ("", why there is none); whatever a model raises on one picture must not end the rest."""
    try:
        caption = tidy_caption(captioner.caption(open_image(item.path)))
    except DatasetError as error:
        return "", error.why or error.what
    except LorasmithError as error:
        return "", error.what
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        return "", f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__
    return (caption, "") if caption else ("", "the captioner found nothing to say")


def tidy_caption(text: str) -> str:
    """Return a model's answer as one line without control characters."""
    shown = (each for each in text if each.isspace() or unicodedata.category(each) not in ("Cc", "Cs"))
    return " ".join("".join(shown).split())
