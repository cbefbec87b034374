"""What the findings and the gallery share: a sheet over the dataset page whose keys change the pictures in use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from textual import on
from textual.binding import BindingType
from textual.screen import Screen
from textual.widgets import Button, Static

from lorasmith.tui.actions import Place, bindings
from lorasmith.tui.checks import Checked, worst_mark
from lorasmith.tui.edits import Undo, set_excluded
from lorasmith.tui.text import safe_text
from lorasmith.tui.widgets.tiles import Tile

if TYPE_CHECKING:
    from lorasmith.engine.dataset.items import ImageItem
    from lorasmith.tui.app import LorasmithApp
    from lorasmith.tui.findings import FoundDataset


SAID_SECONDS = 6.0


class DatasetSheet(Screen[None]):
    """A screen over the dataset page; it is redrawn whenever the draft changes or something is found."""

    CSS_PATH = Path(__file__).with_name("dataset_sheet.tcss")
    TITLE_WORDS: ClassVar[str] = ""
    HELP_TEXT: ClassVar[str] = ""
    PLACES: ClassVar[tuple[Place, ...]] = ("app", "sheet")
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("sheet")]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-tiny"), (24, "-short"), (32, "-tall")]  # noqa: RUF012

    def __init__(self) -> None:
        """Open over the dataset page."""
        super().__init__()
        self.ready = False
        """Whether the widgets exist; a look may end before they do."""
        self._said, self._said_at = "", 0.0

    @property
    def wizard(self) -> LorasmithApp:
        """The app, by its own type."""
        return cast("LorasmithApp", self.app)

    @property
    def found(self) -> FoundDataset | None:
        """The last scan of the folder."""
        return self.wizard.known.shown_dataset

    @property
    def checked(self) -> Checked | None:
        """The last checks of the folder."""
        return self.wizard.known.shown_checks

    def on_mount(self) -> None:
        """Show what is known, and keep waits ticking."""
        self.ready = True
        self.call_after_refresh(self.refresh_bindings)
        self.draft_changed()
        self.set_interval(1.0, self._tick)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Refuse keys that were pressed before the screen stands."""
        return self.ready and super().check_action(action, parameters)

    def _tick(self) -> None:
        if self.wizard.known.looking() or self._said:
            self.show_progress()

    def draft_changed(self) -> None:
        """Show what is known now."""

    def say(self, words: str) -> None:
        """Tell what was done, for some seconds, in the line of help."""
        self._said, self._said_at = words, time.monotonic()
        self.show_progress()

    def show_progress(self) -> None:
        """Say what was just done and how far a look that is under way is, else what the keys do."""
        words = [self._said] if self._said and time.monotonic() - self._said_at < SAID_SECONDS else []
        looks = [self.wizard.known.looks.get(name) for name in ("dataset", "checks")]
        words += [f"looking again: {look.progress()}" for look in looks if look is not None and not look.done][:1]
        self.hint(" · ".join(words) or self.usual_hint())

    def usual_hint(self) -> str:
        """Return what the keys do, in one line."""
        return ""

    def hint(self, text: str) -> None:
        """Show one line of help at the bottom."""
        self.query_one("#hint", Static).update(safe_text(text), layout=False)

    def selected(self) -> str:
        """Return the `relative` path of the selected picture, "" where there is none."""
        return ""

    def action_back(self) -> None:
        """Go back to the page."""
        self.dismiss()

    def action_help(self) -> None:
        """Explain the screen."""
        from lorasmith.tui.screens.help import HelpScreen

        self.app.push_screen(HelpScreen(self.TITLE_WORDS, self.HELP_TEXT, self.PLACES))

    def action_exclude(self) -> None:
        """Leave the selected picture out, or take one in again that was left out."""
        relative, found = self.selected(), self.found
        if not relative or found is None:
            return
        edit = found.edits.get(relative)
        back = edit is not None and edit.exclude
        words = f"{'Used again' if back else 'Left out'}: {relative}"
        self.wizard.change_edits(set_excluded((relative,), not back), Undo(words))
        self.say(f"{words} (u takes it back)")

    def action_edit_caption(self) -> None:
        """Edit the caption of the selected picture."""
        if self.found is not None:
            open_captions(self.wizard, self.found, self.selected())

    def action_undo(self) -> None:
        """Take the newest change back."""
        words = self.wizard.undo()
        self.say(f"Taken back: {words}" if words else "Nothing to take back.")

    @on(Button.Pressed)
    async def _pressed(self, event: Button.Pressed) -> None:
        event.stop()
        await self.run_action(str(event.button.id))


def open_captions(wizard: LorasmithApp, found: FoundDataset, relative: str = "") -> None:
    """Open the caption editor, at one picture if one is given, and look again at the dataset after it."""
    from lorasmith.tui.screens.caption_editor import CaptionEditor

    def closed(edited: bool | None) -> None:
        if edited:
            wizard.look_again()

    wizard.push_screen(CaptionEditor(found, start=relative), closed)


def tiles_of(items: Sequence[ImageItem], checked: Checked | None) -> list[Tile]:
    """Return a tile for each picture, with its size and the mark of its worst finding."""
    found = checked.by_file if checked is not None else {}
    return [
        Tile(
            item.relative,
            item.path,
            f"{item.width}×{item.height}",
            worst_mark(found.get(item.relative, ())),
            item.height / item.width,
        )
        for item in items
    ]
