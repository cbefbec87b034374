"""Writing edited captions to the user's own files: asked first, with the originals kept, and told what was done."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.engine.errors import LorasmithError
from lorasmith.tui.draft import state_folder
from lorasmith.tui.screens.ask import Answer, AskScreen
from lorasmith.tui.text import safe_str

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasmith.engine.dataset.caption_edits import WrittenCaptions
    from lorasmith.engine.dataset.overlay import Edit
    from lorasmith.tui.screens.tool import ToolScreen

_NAMED = 4


async def write_to_files(screen: ToolScreen) -> None:
    """Ask, write, and tell; the edits that are in the files then leave the overlay."""
    work = screen.work
    edits = work.state.edited()
    if not edits:
        screen.hint("Nothing is edited, so there is nothing to write to your files.")
        return
    backup = backup_folder(screen.found.dataset.folder)
    answers = (Answer("w", "Write", "write"), Answer("k", "Keep beside the draft", "keep"))
    question = AskScreen(_question(len(edits)), _detail(edits, backup), answers)
    if await screen.app.push_screen_wait(question) != "write":
        screen.hint("Your files are as they were; the edits count for the training all the same.")
        return
    screen.hint(f"Writing {len(edits)} captions …")
    try:
        written = await asyncio.to_thread(_write, screen, edits, backup)
    except LorasmithError as error:
        detail = "\n".join(part for part in (error.why, error.fix) if part)
        await screen.app.push_screen_wait(AskScreen(error.what, detail, (Answer("o", "OK", "ok"),)))
        return
    work.save(work.state.learn_written(written.pictures))
    screen.refresh_all()
    done = AskScreen(_done(written), _told(written), (Answer("o", "OK", "ok"),))
    await screen.app.push_screen_wait(done)


def backup_folder(dataset: Path) -> Path:
    """Return a new folder's path, beside the draft, for the originals of this dataset's captions."""
    return state_folder() / "caption-backups" / f"{dataset.name or 'dataset'}-{time.strftime('%Y%m%d-%H%M%S')}"


def _write(screen: ToolScreen, edits: Mapping[str, Edit], backup: Path) -> WrittenCaptions:
    from lorasmith.engine.dataset.caption_edits import write_captions

    return write_captions(screen.found.dataset, edits, backup)


def _question(count: int) -> str:
    return f"Write {count} caption{'' if count == 1 else 's'} to your own files?"


def _detail(edits: Mapping[str, Edit], backup: Path) -> str:
    names = ", ".join(list(edits)[:_NAMED]) + ("…" if len(edits) > _NAMED else "")
    return (
        f"The caption files beside {names} get the edited text. The files as they are now are copied first, to\n"
        f"{backup}\n"
        "Without writing, the edits count for the training all the same."
    )


def _done(written: WrittenCaptions) -> str:
    replaced, created = len(written.replaced), len(written.created)
    return f"{replaced} caption file{'' if replaced == 1 else 's'} replaced, {created} new."


def _told(written: WrittenCaptions) -> str:
    lines = list(written.notes)
    if written.replaced or written.created:
        lines.append(f"To put the originals back: lorasmith caption restore {safe_str(written.backup)}")
    else:
        lines.append("The files held these captions already.")
    return "\n".join(lines)
