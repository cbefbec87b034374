"""The frame around the screens that work on captions: title, body, help line, buttons, footer; escape goes back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar, cast

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Container, Horizontal
from textual.screen import Screen
from textual.widgets import Button, Footer, Static

from lorasmith.tui.actions import Place, bindings
from lorasmith.tui.screens.ask import Answer, AskScreen
from lorasmith.tui.text import safe_text
from lorasmith.tui.widgets.line import Line, Part

if TYPE_CHECKING:
    from lorasmith.tui.app import LorasmithApp
    from lorasmith.tui.caption_work import CaptionWork
    from lorasmith.tui.findings import FoundDataset

TICK_SECONDS = 0.5


class ToolScreen(Screen[bool]):
    """Works on the captions of `found`, over the page; returns whether anything was edited.

    Several of these share one `CaptionWork` where one opens the other.
    """

    TITLE_WORDS: ClassVar[str] = ""
    HELP_TEXT: ClassVar[str] = ""
    PLACES: ClassVar[tuple[Place, ...]] = ("app", "tool")
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("tool")]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (80, "-normal"), (110, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-short"), (32, "-tall")]  # noqa: RUF012
    DEFAULT_CSS = """
    ToolScreen #tool-body { height: 1fr; padding: 0 1; }
    ToolScreen #tool-title { background: $panel; text-style: bold; padding: 0 1; }
    ToolScreen .tool-row { height: 1; }
    ToolScreen .tool-row .label { width: 14; }
    ToolScreen.-wide .tool-row .label { width: 20; }
    """

    def __init__(self, found: FoundDataset, work: CaptionWork | None = None) -> None:
        """Open on a scanned dataset; with `work`, go on with the captions of the screen below."""
        super().__init__()
        self.found = found
        self._given = work

    @property
    def wizard(self) -> LorasmithApp:
        """The app, by its own type."""
        return cast("LorasmithApp", self.app)

    @property
    def work(self) -> CaptionWork:
        """The captions; made when the screen first needs them."""
        if self._given is None:
            from lorasmith.engine.dataset.overlay import default_overlay
            from lorasmith.tui.caption_work import CaptionWork

            overlay = self.wizard.draft.overlay_path() or default_overlay(self.found.dataset.folder)
            self._given = CaptionWork(self.wizard.known, self.found, overlay)
        return self._given

    def compose(self) -> ComposeResult:
        """The frame; the middle is the subclass's."""
        yield Line(id="tool-title")
        with Container(id="tool-body"):
            yield from self.compose_body()
        yield Static("", id="hint", markup=False)
        with Horizontal(id="buttons"):
            yield from self.compose_buttons()
            yield Button("Back", id="close", compact=True)
        yield Footer(show_command_palette=False, compact=True)

    def compose_body(self) -> ComposeResult:
        """The screen's own widgets."""
        yield from ()

    def compose_buttons(self) -> ComposeResult:
        """The buttons left of Back."""
        yield from ()

    def on_mount(self) -> None:
        """Show what is known, then look twice a second for what threads found out."""
        self.work.writer.told = self._tell_written
        self.refresh_all()
        self.set_interval(TICK_SECONDS, self._tick)

    def on_screen_resume(self) -> None:
        """Take the news of the writer again, after another screen had them."""
        self.work.writer.told = self._tell_written
        self.refresh_all()

    def _tell_written(self) -> None:
        self.call_later(self.show_title)  # from the writing thread: it only puts a message into the queue

    def _tick(self) -> None:
        if self.is_current and self.work.tick():
            self.refresh_all()

    def refresh_all(self) -> None:
        """Show the captions as they stand; subclasses add their own parts."""
        self.show_title()

    def title_parts(self) -> list[Part]:
        """Return what stands in the title behind the screen's name."""
        return []

    def show_title(self) -> None:
        """Show the title, and whether the edits are on the disk."""
        writer = self.work.writer
        if writer.problem:
            saved: Part = ("! not saved", "high")
            self.hint(f"! {writer.problem}")
        else:
            count = len(self.work.state.edited())
            words = f"{count} edited" if count else "nothing edited"
            saved = (f"{words}{' · saving' if writer.waiting else ' · saved' if writer.written else ''}", "dim")
        left = [(f"lorasmith · {self.TITLE_WORDS}", ""), *self.title_parts()]
        self.query_one("#tool-title", Line).show(left, [saved])

    def hint(self, text: str) -> None:
        """Show one line of help under the body."""
        self.query_one("#hint", Static).update(safe_text(text), layout=False)

    def action_help(self) -> None:
        """Explain the screen and list its keys."""
        from lorasmith.tui.screens.help import HelpScreen

        self.app.push_screen(HelpScreen(self.TITLE_WORDS, self.HELP_TEXT, self.PLACES))

    def keep_typed(self) -> None:
        """Take what stands in a text field, before leaving."""

    def action_close(self) -> None:
        """Go back when everything is on the disk."""
        self.run_worker(self._close(quit_too=False), exclusive=True, group="close")

    def request_quit(self) -> None:
        """Keep everything, close, and leave the wizard."""
        self.run_worker(self._close(quit_too=True), exclusive=True, group="close")

    async def _close(self, *, quit_too: bool) -> None:
        self.keep_typed()
        while not await asyncio.to_thread(self.work.writer.finish):
            answer = await self.app.push_screen_wait(self._ask_unsaved())
            if answer == "stay":
                return
            if answer == "leave":
                break
        self.dismiss(self.work.edited)
        if quit_too:
            await self.app.action_quit()

    def _ask_unsaved(self) -> AskScreen:
        answers = (
            Answer("t", "Try again", "again"),
            Answer("l", "Leave, lose the edits", "leave"),
            Answer("s", "Stay", "stay"),
        )
        return AskScreen("The edits could not be saved.", self.work.writer.problem, answers)

    @on(Button.Pressed, "#close")
    def _close_pressed(self) -> None:
        self.action_close()
