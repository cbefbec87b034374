"""Edited captions and left-out pictures of the draft: how they are written, and how one is taken back.

Edits never touch the user's files: they go to the overlay that `Draft.overlay_path` names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import LorasmithError
from lorasmith.tui.draft import Draft

if TYPE_CHECKING:
    from lorasmith.engine.dataset.findings import Action
    from lorasmith.engine.dataset.overlay import Edit

Edits = Mapping[str, "Edit"]
"""The whole edit of each picture by its `relative` path."""


@dataclass(frozen=True)
class Undo:
    """How to take a change back: the edits and the answers as they were; None for an answer that there was not."""

    words: str
    path: Path | None = None
    edits: Edits = field(default_factory=dict)
    answers: Mapping[str, Any] = field(default_factory=dict)


class Editing:
    """Writes edits in a thread, one after the other in the order in which they were made, and remembers what was."""

    def __init__(self) -> None:
        """Start with nothing to undo."""
        self.undos: list[Undo] = []
        self.waiting = 0
        self._lock = asyncio.Lock()

    async def write(self, path: Path, change: Callable[[Edits], Edits], undo: Undo | None) -> None:
        """Add what `change` makes of the edits so far to the overlay; raises LorasmithError where that fails.

        The caller has counted it in `waiting`. With `undo`, the change can be taken back by it together with the edits
        as they are now.
        """
        try:
            async with self._lock:
                before = await asyncio.to_thread(_replace, path, change)
                if undo is not None:
                    self.undos.append(replace(undo, path=path, edits=before))
        finally:
            self.waiting -= 1

    async def written(self) -> None:
        """Wait until every change that was made is on the disk."""
        while self.waiting:
            async with self._lock:
                pass
            await asyncio.sleep(0)

    def take_undo(self) -> Undo | None:
        """Return the newest change that can be taken back, which is then no longer the newest."""
        return self.undos.pop() if self.undos else None


def _replace(path: Path, change: Callable[[Edits], Edits]) -> Edits:
    """Append the changed edits and return what stood there before."""
    from lorasmith.engine.dataset.overlay import Edit, append_edits, read_overlay

    present = read_overlay(path)
    edits = change(present)
    if edits:
        append_edits(path, edits)
    return {relative: present.get(relative, Edit()) for relative in edits}


def set_excluded(relatives: tuple[str, ...], exclude: bool) -> Callable[[Edits], Edits]:
    """Return a change that leaves pictures out, or takes them in again; their captions stay."""

    def change(present: Edits) -> Edits:
        from lorasmith.engine.dataset.overlay import Edit

        return {relative: replace(present.get(relative, Edit()), exclude=exclude) for relative in relatives}

    return change


def carry_out(action: Action) -> Callable[[Edits], Edits]:
    """Return the change that a finding's action makes to the overlay."""

    def change(present: Edits) -> Edits:
        from lorasmith.engine.dataset.overlay import PERSON, Edit

        edits = dict(set_excluded(action.exclude, True)(present))
        for relative, caption in action.captions.items():
            before = edits.get(relative, present.get(relative, Edit()))
            edits[relative] = replace(before, captions=(caption,), by=PERSON)
        return edits

    return change


def answers_before(draft: Draft, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the draft's answers to these settings, None where it has none."""
    return {key: draft.answers.get(key) for key in settings}


def put_answers(draft: Draft, answers: Mapping[str, Any]) -> None:
    """Give the draft these answers; None takes the user's answer away."""
    from lorasmith.tui.fields import write_text

    for key, value in answers.items():
        if value is None:
            draft.reset(key)
        else:
            draft.put(key, write_text(key, value))


def told_in_words(error: LorasmithError) -> str:
    """Return the error as one sentence for a toast."""
    return " ".join(part for part in (error.what, error.why, error.fix) if part)
