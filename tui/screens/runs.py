"""The earlier runs: what became of each and how large it is; resume, attach, extend, rename, delete."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar, cast

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.screen import Screen
from textual.widgets import Footer, OptionList, Static

from lorasmith.engine.errors import LorasmithError
from lorasmith.tui.actions import Place, bindings
from lorasmith.tui.forms import told
from lorasmith.tui.run_jobs import RESUMABLE, FoundRun
from lorasmith.tui.screens.ask import Answer, AskScreen
from lorasmith.tui.screens.ask_text import AskText
from lorasmith.tui.text import safe_str, safe_text

if TYPE_CHECKING:
    from lorasmith.engine.run_folder import RunFolder
    from lorasmith.tui.app import LorasmithApp

READ_SECONDS, SAID_SECONDS = 0.1, 6.0
WIDE, NAME_CELLS, STATE_CELLS = 100, 48, 30
T = TypeVar("T")


class RunsScreen(Screen[None]):
    """Lists the runs of the output folder; whatever touches the disk happens in threads."""

    PLACES: ClassVar[tuple[Place, ...]] = ("app", "runs")
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("runs")]
    HELP_TEXT: ClassVar[str] = (
        "Every run has a folder of its own with its settings, checkpoints, previews and LoRA files. A run that was "
        "interrupted or stopped goes on from its newest checkpoint as if nothing had happened.\n\n"
        "A run that another process trains is watched and commanded, not started a second time.\n\n"
        "Extending plans the learning rate's schedule anew; what comes is said before anything is changed."
    )
    # `CSS` and not `DEFAULT_CSS`: the application's rules for lists on pages must not count here.
    CSS = """
    RunsScreen #runs-title { background: $panel; text-style: bold; padding: 0 1; height: 1; }
    RunsScreen #runs { height: 1fr; max-height: 100%; border: none; padding: 0 1; }
    RunsScreen #run-detail { height: 5; padding: 0 1; border-top: solid $panel; }
    RunsScreen #hint { height: 1; padding: 0 1; color: $foreground 70%; }
    """

    def __init__(self) -> None:
        """Open over a page of the wizard."""
        super().__init__()
        self.ready = False
        """Whether the widgets exist; a look may end before they do."""
        self._shown: list[FoundRun] = []
        self._said, self._said_at = "", 0.0
        self._error: tuple[Path, Text] | None = None

    @property
    def wizard(self) -> LorasmithApp:
        """The app, by its own type."""
        return cast("LorasmithApp", self.app)

    @property
    def selected(self) -> FoundRun | None:
        """The run under the cursor."""
        index = self.query_one(OptionList).highlighted
        return self._shown[index] if index is not None and index < len(self._shown) else None

    def compose(self) -> ComposeResult:
        """Title, list, what is known of the selected run, one line of help, keys."""
        yield Static("", id="runs-title", markup=False)
        yield OptionList(id="runs", compact=True, markup=False)
        yield Static("", id="run-detail", markup=False)
        yield Static("", id="hint", markup=False)
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        """Look at the runs anew."""
        self.ready = True
        self.wizard.look_at_runs(again=True)
        self.draft_changed()
        self.set_interval(1.0, self._tick)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Refuse keys that were pressed before the screen stands."""
        return self.ready and super().check_action(action, parameters)

    def on_resize(self) -> None:
        """Fit the rows into the new width."""
        if self.ready:
            self._show_rows()

    def _tick(self) -> None:
        if self.is_current and (self._said or self.wizard.known.looking()):
            self._show_hint()

    def draft_changed(self) -> None:
        """Show what the looks found: the list, or why a run cannot be started."""
        looks = self.wizard.known.looks
        runs, start = looks.get("runs"), looks.get("start")
        if runs is not None and runs.done:
            self._shown = runs.value or []
            self._show_rows()
        if start is not None and start.done and start.error is not None:
            self.say_error(start.error)
            del looks["start"]
        self._show_hint()

    def _show_rows(self) -> None:
        rows, width = self.query_one(OptionList), max(40, self.size.width - 2)
        here = self.selected.run.path if self.selected else None
        at = rows.highlighted or 0
        rows.clear_options()
        rows.add_options(row_text(found, width) for found in self._shown)
        paths = [found.run.path for found in self._shown]
        if paths:
            rows.highlighted = paths.index(here) if here in paths else min(at, len(paths) - 1)
        folder = os.path.abspath(os.path.expanduser(self.wizard.output_folder()))
        self.query_one("#runs-title", Static).update(safe_text(f"lorasmith · Runs in {folder}"))
        self._show_detail()

    def _show_detail(self) -> None:
        found = self.selected
        words = safe_text("" if found is None else "\n".join(detail_lines(found)), lines=True)
        self.query_one("#run-detail", Static).update(self._error[1] if self._error else words, layout=False)

    def _show_hint(self) -> None:
        looks = self.wizard.known.looks
        waits = [looks[name] for name in ("start", "runs") if name in looks and not looks[name].done]
        if waits:
            words = f"{waits[0].progress() or 'Looking…'}"
        elif self._said and time.monotonic() - self._said_at < SAID_SECONDS:
            words = self._said
        elif not self._shown:
            words = "There are no runs in this folder yet."
        else:
            words = _what_enter_does(self.selected)
        self.query_one("#hint", Static).update(safe_text(words), layout=False)

    def say(self, words: str) -> None:
        """Tell what was done, for some seconds."""
        self._said, self._said_at = words, time.monotonic()
        self._show_hint()

    def say_error(self, error: LorasmithError) -> None:
        """Show an error in its three parts, until the cursor moves to another run."""
        found = self.selected
        if found is not None:
            self._error = (found.run.path, told(error))
            self._show_detail()

    @on(OptionList.OptionHighlighted, "#runs")
    def _moved(self, event: OptionList.OptionHighlighted) -> None:
        event.stop()
        if self.selected is not None and self._error is not None and self._error[0] != self.selected.run.path:
            self._error = None
        self._show_detail()
        self._show_hint()

    @on(OptionList.OptionSelected, "#runs")
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.action_open()

    def action_back(self) -> None:
        """Go back to the page."""
        self.dismiss()

    def action_reload(self) -> None:
        """Look at the runs again."""
        self.wizard.look_at_runs(again=True)
        self._show_hint()

    def action_help(self) -> None:
        """Explain the screen."""
        from lorasmith.tui.screens.help import HelpScreen

        self.app.push_screen(HelpScreen("Runs", self.HELP_TEXT, self.PLACES))

    def action_open(self) -> None:
        """Go on with the selected run, or watch it where another process trains it."""
        found = self.selected
        if found is None:
            return
        if found.summary.live:
            self.run_worker(self._watch_run(found.run), exclusive=True, group="run")
        elif found.summary.state in RESUMABLE:
            self._error = None
            self.wizard.resume(found.run)
            self._show_hint()
        else:
            self.say("This run is finished; e extends it.")

    async def _watch_run(self, run: RunFolder) -> None:
        from lorasmith.tui.bridge import AttachedRun
        from lorasmith.tui.screens.monitor import MonitorScreen

        source = AttachedRun(run)
        source.start()
        while source.share_read < 1.0:
            self.say(f"Reading what {run.name} did so far: {100 * source.share_read:.0f} %")
            await asyncio.sleep(READ_SECONDS)

        def back() -> None:
            source.close()
            self.app.pop_screen()
            self.action_reload()

        self.app.push_screen(MonitorScreen(source, state=source.state, when_left=back))

    def action_extend(self) -> None:
        """Plan more steps for the selected run."""
        if self.selected is not None:
            self.run_worker(self._extend(self.selected), exclusive=True, group="run")

    async def _extend(self, found: FoundRun) -> None:
        from lorasmith.engine.extension import apply_extension, plan_extension

        total = found.summary.total_steps
        detail = f"It has {total} steps now." if total else "How many steps is it to have in all?"
        answer = await self.app.push_screen_wait(
            AskText(f"Train {found.run.name} on to step", detail, str(total * 3 // 2))
        )
        if not answer.strip():
            return
        if not answer.strip().isdigit():
            self.say(f"{answer.strip()} is no number of steps.")
            return
        extension = await self._in_thread(partial(plan_extension, found.run, int(answer), None))
        if extension is None:
            return
        question = AskScreen(
            f"Extend {found.run.name} so?",
            "\n".join(extension.words),
            (Answer("e", "Extend", "extend"), Answer("c", "Cancel", "cancel")),
        )
        if await self.app.push_screen_wait(question) != "extend":
            return
        if await self._done(partial(apply_extension, found.run, extension)):
            self.wizard.resume(found.run)
            self._show_hint()

    def action_rename(self) -> None:
        """Give the selected run another name."""
        if self.selected is not None:
            self.run_worker(self._rename(self.selected), exclusive=True, group="run")

    async def _rename(self, found: FoundRun) -> None:
        from lorasmith.engine.run_actions import rename_run

        detail = "The time in the folder's name stays; LoRA files that are written already keep their names."
        answer = await self.app.push_screen_wait(AskText(f"Rename {found.run.name} to", detail))
        if not answer.strip():
            return
        renamed = await self._in_thread(partial(rename_run, found.run, answer))
        if renamed is not None:
            self.say(f"Renamed to {renamed.name}.")
            self.wizard.look_at_runs(again=True)

    def action_delete(self) -> None:
        """Delete the selected run after a question."""
        if self.selected is not None:
            self.run_worker(self._delete(self.selected), exclusive=True, group="run")

    async def _delete(self, found: FoundRun) -> None:
        from lorasmith.engine.run_actions import delete_run

        if found.summary.live:
            self.say("Somebody works on this run: stop it first.")
            return
        answers = (Answer("d", "Delete for ever", "delete"), Answer("k", "Keep", "keep"))
        detail = f"{found.sizes.describe()}. It cannot be brought back."
        if await self.app.push_screen_wait(AskScreen(f"Delete {found.run.name}?", detail, answers)) != "delete":
            return
        if await self._done(partial(delete_run, found.run)):
            self.say(f"Deleted {found.run.name}.")
            self.wizard.look_at_runs(again=True)

    async def _done(self, work: Callable[[], None]) -> bool:
        """Do what gives nothing back, as `_in_thread` does; return whether it was done."""

        def tell() -> bool:
            work()
            return True

        return await self._in_thread(tell) is True

    async def _in_thread(self, work: Callable[[], T]) -> T | None:
        """Do what may wait for the disk away from the screen's thread; an error is shown, and None returned."""
        try:
            return await asyncio.to_thread(work)
        except LorasmithError as error:
            self.say_error(error)
            return None


def row_text(found: FoundRun, width: int) -> Text:
    """Return one row of the list: when it changed where there is room, its name, its size, what became of it."""
    from lorasmith.engine.storage import readable_size

    state, size = found.summary.describe(), readable_size(found.sizes.total).rjust(9)
    changed = time.strftime("%Y-%m-%d %H:%M  ", time.localtime(found.summary.changed)) if width >= WIDE else ""
    room = max(12, width - cell_len(changed) - cell_len(size) - STATE_CELLS - 4)
    name = set_cell_size(safe_str(found.run.name), min(room, NAME_CELLS))
    return safe_text(f"{changed}{name}  {size}  {state}")


def detail_lines(found: FoundRun) -> list[str]:
    """Return what is known of a run beside its row: why it waits or ended, its sizes, its LoRA files."""
    summary, sizes = found.summary, found.sizes
    lines = [f"{summary.run.path}", sizes.describe()]
    if summary.message and summary.state != "finished":
        lines.insert(0, summary.message)
    if summary.process is not None:
        lines.append(f"Process {summary.process} works on it.")
    elif summary.checkpoint_step is not None:
        lines.append(f"Newest checkpoint: step {summary.checkpoint_step}.")
    return lines


def _what_enter_does(found: FoundRun | None) -> str:
    if found is None:
        return ""
    if found.summary.live:
        return "Enter watches this run; another process trains it."
    if found.summary.state in RESUMABLE:
        step = found.summary.checkpoint_step
        return f"Enter resumes it from step {step}." if step is not None else "Enter starts it from the beginning."
    return "This run is finished. e extends it: more steps from its last checkpoint on."
