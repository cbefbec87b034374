"""Opening the caption screens over a real scan, and waiting for what their threads do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from lorasmith.engine.dataset.overlay import Edit, append_edits, read_overlay
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.draft import Draft
from lorasmith.tui.screens.tool import ToolScreen
from tests.tui.conftest import settle


def a_draft(folder: Path, **edits: Edit) -> Draft:
    """A draft with these pictures and the trigger zqx; `edits` by file name without .png are in its overlay."""
    draft = Draft(answers={"base.model": "owner/name"})
    draft.put("dataset.folder", str(folder))
    draft.put("captions.trigger", "zqx")
    if edits:
        append_edits(overlay_of(draft), {f"{name}.png": edit for name, edit in edits.items()})
    return draft


def overlay_of(draft: Draft) -> Path:
    path = draft.overlay_path()
    assert path is not None
    return path


def edits_of(app: LorasmithApp) -> dict[str, Edit]:
    return read_overlay(overlay_of(app.draft))


async def until(pilot: Pilot[Any], condition: Callable[[], bool]) -> None:
    """Wait for a thread of the screen."""
    for _ in range(400):
        if condition():
            break
        await asyncio.sleep(0.03)
    assert condition()
    await pilot.pause()


async def open_over_scan(pilot: Pilot[Any], make: Callable[[Any], ToolScreen]) -> list[bool | None]:
    """Scan, open the screen that `make` gives for what was found; return a list that gets what the screen returns."""
    app = pilot.app
    assert isinstance(app, LorasmithApp)
    await settle(pilot)
    app.known.look_at_base()
    app.known.look_at_dataset()
    await settle(pilot)
    app.known.look_at_words()
    await settle(pilot)
    assert app.known.dataset is not None, app.known.looks["dataset"].error
    returned: list[bool | None] = []
    screen = make(app.known.dataset)
    app.push_screen(screen, returned.append)
    await pilot.pause()
    await until(pilot, lambda: not app.known.looking() and not screen.work.measuring)
    screen.work.tick()
    screen.refresh_all()
    await pilot.pause()
    return returned
