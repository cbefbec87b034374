"""Captions by a model: which one, with which options, for which pictures; then its progress, and what it wrote."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.widgets import Button

from lorasmith.engine.errors import LorasmithError
from lorasmith.tui.actions import Place, bindings
from lorasmith.tui.captioner_form import Load, load_captioner, order_captioners
from lorasmith.tui.captioner_job import CaptionerJob, Request
from lorasmith.tui.forms import told
from lorasmith.tui.screens.ask import Answer, AskScreen
from lorasmith.tui.screens.tool import ToolScreen
from lorasmith.tui.while_open import while_open
from lorasmith.tui.widgets.captioner_panel import CaptionerPanel
from lorasmith.tui.widgets.captioner_progress import CaptionerProgress

if TYPE_CHECKING:
    from lorasmith.tui.caption_work import CaptionWork
    from lorasmith.tui.findings import FoundDataset

POLL_SECONDS = 0.5


class AutoCaption(ToolScreen):
    """A form before the start, the progress after it; what was written goes to the overlay, never to the files."""

    TITLE_WORDS = "Auto-caption"
    AUTO_FOCUS = "#captioner"
    PLACES: ClassVar[tuple[Place, ...]] = ("app", "tool", "captioner")
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("captioner")]
    HELP_TEXT: ClassVar[str] = (
        "A model looks at each picture and writes its caption. It is downloaded once, and then runs on your machine: "
        "no picture leaves it.\n\n"
        "Captions that you wrote are never replaced. You can stop at any time: what is written stays, and the next "
        "start goes on with the rest. Read what was written; models are wrong often enough, and the trigger should "
        "stand for what you teach instead of having it described."
    )

    def __init__(self, found: FoundDataset, work: CaptionWork | None = None, load: Load | None = None) -> None:
        """Open on a scanned dataset; `load` loads captioners."""
        super().__init__(found, work)
        self.job: CaptionerJob | None = None
        self._load = load or load_captioner

    def compose_body(self) -> ComposeResult:
        """The form, and the progress in its place once it runs."""
        from lorasmith.engine.captioners import captioners

        base = self.wizard.known.base
        style, name = ("", "") if base is None else (base.family.SPEC.caption_style, base.family.SPEC.label)
        yield CaptionerPanel(self.work, order_captioners(captioners(), style), style, name)
        yield CaptionerProgress(self.work.state.items)

    def compose_buttons(self) -> ComposeResult:
        """Start and stop."""
        yield Button("Stop (x)", id="stop", compact=True, disabled=True)
        yield Button("Start (ctrl+s)", id="start", variant="primary", compact=True)

    def on_mount(self) -> None:
        """Show the form."""
        super().on_mount()
        self.progress.display = False
        self.set_interval(POLL_SECONDS, self.poll)

    @property
    def panel(self) -> CaptionerPanel:
        """The form."""
        return self.query_one(CaptionerPanel)

    @property
    def progress(self) -> CaptionerProgress:
        """The progress."""
        return self.query_one(CaptionerProgress)

    @on(CaptionerPanel.Changed)
    def _panel_changed(self, event: CaptionerPanel.Changed) -> None:
        event.stop()
        self._show_buttons()

    @on(CaptionerPanel.Explained)
    def _panel_explained(self, event: CaptionerPanel.Explained) -> None:
        event.stop()
        if self.job is None:
            self.hint(event.text)

    def _show_buttons(self) -> None:
        # A disabled button cannot keep the focus: whoever pressed it is moved to the other one.
        self.query_one("#start", Button).disabled = self.job is not None or not self.panel.count
        self.query_one("#stop", Button).disabled = self.job is None

    # The run

    def action_start(self) -> None:
        """Check the options and begin."""
        if self.job is not None:
            self.hint("It is at work already.")
        elif not self.panel.count:
            self.hint("There is no picture to caption. Choose others under Pictures.")
        else:
            try:
                settings = self.panel.settings()
            except LorasmithError as error:
                self.panel.say_problem(told(error))
                return
            self.run_worker(while_open(self, self._start(settings)), exclusive=True, group="start")

    async def _start(self, settings: dict[str, Any]) -> None:
        self.panel.say_problem("")
        # What is on its way to the overlay must be there before the captioner reads it.
        if not await asyncio.to_thread(self.work.writer.finish):
            self.panel.say_problem(f"✗ {self.work.writer.problem}")
            return
        items, again = self.panel.items()
        name, overlay = self.panel.module.SPEC.name, self.work.writer.path
        self.job = CaptionerJob(Request(name, self.panel.model, settings, items, overlay, again), self._load).start()
        self._show_run(True)
        self.query_one("#stop").focus()
        self.hint("x: stop; what is written stays")
        self.poll()

    def _show_run(self, run: bool) -> None:
        self.panel.display, self.progress.display = not run, run
        self._show_buttons()

    def poll(self) -> None:
        """Show how far the captioner is; called twice a second."""
        job = self.job
        if job is None:
            return
        over = job.over  # asked first: nothing is written after it
        self.progress.show(job)
        if over:
            self.job = None
            self.run_worker(while_open(self, self._take_written(job)), group="finish")

    async def _take_written(self, job: CaptionerJob) -> None:
        """Take in what was written, and say what became of the job."""
        from lorasmith.engine.dataset.overlay import read_overlay

        count, error = 0, job.error
        try:
            edits = await asyncio.to_thread(read_overlay, self.work.writer.path)
            count = self.work.take_written(edits, f"the captions by {job.request.captioner}")
        except LorasmithError as problem:
            error = error or problem
        if error is not None:
            self.panel.say_problem(told(error).append(f"\n  {_summary(job, count)}"))
        self.panel.show_count()
        self._show_run(error is None)
        self.query_one("#captioner" if error is not None else "#close").focus()
        self.hint(_summary(job, count))
        self.show_title()

    # Leaving

    def action_stop(self) -> None:
        """End after this picture."""
        if self.job is None:
            self.hint("Nothing is at work.")
            return
        self.job.stop()
        self.hint("Stopping after this picture; what is written stays.")

    def action_close(self) -> None:
        """Go back: while a captioner is at work, ask; from its result to the form where pictures are left."""
        if self.job is not None:
            self.run_worker(self._ask_stop(quit_too=False), exclusive=True, group="close")
        elif self.progress.display and self.panel.count:
            self._show_run(False)
            self.query_one("#captioner").focus()
        else:
            super().action_close()

    def request_quit(self) -> None:
        """Quit; while a captioner is at work, ask."""
        if self.job is not None:
            self.run_worker(self._ask_stop(quit_too=True), exclusive=True, group="close")
        else:
            super().request_quit()

    async def _ask_stop(self, *, quit_too: bool) -> None:
        answers = (Answer("x", "Stop and leave", "stop"), Answer("g", "Go on", "go"))
        detail = "The captions that are written stay. The picture that is being looked at is finished first."
        if await self.app.push_screen_wait(AskScreen("Stop writing captions?", detail, answers)) != "stop":
            return
        self.action_stop()
        while self.job is not None:
            await asyncio.sleep(POLL_SECONDS / 5)
        await self._close(quit_too=quit_too)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Do what the button says."""
        if event.button.id in ("start", "stop"):
            event.stop()
            getattr(self, f"action_{event.button.id}")()


def _summary(job: CaptionerJob, count: int) -> str:
    result = job.result
    if result is None:
        return f"{count:,} captions were written before that; they stay." if count else "No caption was written."
    end = "Stopped" if result.stopped else "Done"
    failed = f", {len(result.failed):,} failed" if result.failed else ""
    words = f"{len(result.done):,} caption{'' if len(result.done) == 1 else 's'} written{failed}"
    return f"✓ {end}: {words}. In the caption editor, u undoes it."
