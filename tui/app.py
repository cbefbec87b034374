"""The application: which page is shown, what is being looked up, the draft on the disk. It only wires."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from textual import events
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen

from lorasmith.engine.errors import LorasmithError
from lorasmith.tui.actions import actions_of, bindings
from lorasmith.tui.disconnect import CONTINUE
from lorasmith.tui.draft import PAGES, Draft
from lorasmith.tui.draft_file import DraftFile
from lorasmith.tui.edits import Editing, Edits, Undo, answers_before, carry_out, put_answers, told_in_words
from lorasmith.tui.findings import Look, Probes
from lorasmith.tui.known import Known
from lorasmith.tui.screens.page import WizardPage
from lorasmith.tui.screens.too_small import TooSmall, fits
from lorasmith.tui.text import safe_str
from lorasmith.tui.theme import THEME, limited_colors

if TYPE_CHECKING:
    from lorasmith.engine.dataset.findings import Action
    from lorasmith.engine.run_file import ResolvedConfig
    from lorasmith.engine.run_folder import RunFolder

CARD_AFTER_SECONDS = 0.4
WARM_UP_AFTER_SECONDS = 0.8


class LorasmithApp(App[int]):
    """The wizard and, once a run is started, its monitor."""

    TITLE = "lorasmith"
    CSS_PATH = "app.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        *bindings("app"),
        Binding("ctrl+z", "tell_no_suspend", show=False, priority=True, id="no-suspend"),
    ]

    class Looked(Message):
        """A look that a worker thread took is done."""

        def __init__(self, name: str, look: Look) -> None:
            super().__init__()
            self.name = name
            self.look = look

    def __init__(self, draft: Draft | None = None, probes: Probes | None = None, *, warm_up: bool = False) -> None:
        limited = limited_colors(os.environ)
        super().__init__(ansi_color=True if limited else None)
        self.register_theme(THEME)
        if limited or "TEXTUAL_THEME" not in os.environ:
            self.theme = "ansi-dark" if limited else THEME.name
        self.animation_level = "none"
        self.draft = draft or Draft()
        self.probes = probes or Probes()
        self.known = Known(lambda: self.draft, self.probes, self._tell_looked)
        self.file = DraftFile()
        self.offer = self.file.load() if draft is None else None
        self.session: Any = None
        self.editing = Editing()
        self.for_tmux = False
        self._warm_up = warm_up
        self._unsaved = False

    # Pages

    def visit(self, name: str, key: str = "") -> None:
        """Show a page, at the field of `key` if one is given, and remember that it was seen."""
        if self.page is not None and self.page.ready:
            self.page.take_typed()
        for seen in (self.draft.page, name):
            if seen not in self.draft.visited:
                self.draft.visited.append(seen)
        self.draft.page = name
        self.touch()
        page = self._page(name)
        self.switch_screen(page)
        if key:
            self.call_after_refresh(page.reveal, key)

    def _page(self, name: str) -> WizardPage:
        module = importlib.import_module(f"lorasmith.tui.screens.{name}")
        return cast(WizardPage, module.PAGE_CLASS())

    @property
    def page(self) -> WizardPage | None:
        """The wizard page that is shown or lies under a help sheet."""
        pages = [screen for screen in self.screen_stack if isinstance(screen, WizardPage)]
        return pages[-1] if pages else None

    def on_mount(self) -> None:
        """Look at the machine and, when the first page stands, begin to load torch behind it."""
        self.push_screen(self._page("hardware"))
        if not fits(self.size.width, self.size.height):
            self.push_screen(TooSmall())
        self.known.look_at_hardware()
        self.call_after_refresh(self.set_timer, CARD_AFTER_SECONDS, self.known.look_at_card)
        if self.offer is not None and os.environ.pop(CONTINUE, ""):
            self.draft, self.offer = self.offer[0], None
            self.visit(self.draft.page)
        if self._warm_up:
            self.call_after_refresh(self.set_timer, WARM_UP_AFTER_SECONDS, self._begin_warm_up)

    def _begin_warm_up(self) -> None:
        from lorasmith.tui.warm_up import import_heavy

        def warm_up() -> None:
            import_heavy()
            # Who left meanwhile needs no answer.
            with contextlib.suppress(RuntimeError):
                self.call_from_thread(self.known.look_at_doctor, try_now=True)

        threading.Thread(target=warm_up, name="warm-up", daemon=True).start()

    def on_resize(self, event: events.Resize) -> None:
        """Cover the pages while the terminal is too small for them."""
        if not fits(event.size.width, event.size.height) and not isinstance(self.screen, TooSmall):
            self.push_screen(TooSmall())

    def action_tell_no_suspend(self) -> None:
        """Say why Ctrl-Z, which stops programs elsewhere, does nothing here."""
        self.notify(
            "Ctrl-Z is off: it would stop the training too. Close this terminal, or detach tmux, and training goes on.",
            markup=False,
        )

    async def action_quit(self) -> None:
        """Save the draft and leave; a screen with a running training asks first (`request_quit`)."""
        # From the top down: a sheet over the monitor must not make quitting forget the training.
        for screen in reversed(self.screen_stack):
            request = getattr(screen, "request_quit", None)
            if request is not None:
                request()
                return
        if self.page is not None and self.page.ready:
            self.page.take_typed()
        self.save_draft_now()
        self.exit(0)

    def leave_for_tmux(self) -> None:
        """Save the draft and leave, to start again inside tmux."""
        self.for_tmux = True
        self.file.save(self.draft.to_json())
        self.exit(0)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Every action of the current screen, the steps, the theme and quitting."""
        places = [place for place in getattr(screen, "PLACES", ()) if place != "app"]
        for action in actions_of(*places):
            if action.name != "step" and hasattr(screen, f"action_{action.name.partition('(')[0]}"):
                yield SystemCommand(action.label, action.help, partial(screen.run_action, action.name))
        if isinstance(screen, WizardPage):
            for name, title in PAGES.items():
                yield SystemCommand(f"Go to step: {title}", "Show that page.", partial(self.visit, name))
        yield SystemCommand("Theme", "Change the colors.", self.action_change_theme)
        yield SystemCommand("Quit", "Leave lorasmith; the draft is kept.", self.action_quit)

    # The draft

    def touch(self) -> None:
        """Note that the draft changed: it is written a moment later, and the page is redrawn."""
        if not self._unsaved:
            self._unsaved = True
            self.set_timer(0.3, self._save_draft)

    def change(self, key: str, text: str) -> str:
        """Take a typed value into the draft; return what is wrong with it, in words."""
        if text == self.draft.text(key, self.known.advice()):  # an input tells its first value too
            return ""
        problem = self.draft.put(key, text)
        self.changed()
        return problem

    def changed(self) -> None:
        """Tell the page and the disk that the draft is another."""
        self.touch()
        self._tell_screens()

    def _tell_screens(self) -> None:
        """Have the page, and what lies over it, show what is known now."""
        for screen in list(self.screen_stack):
            tell = getattr(screen, "draft_changed", None)
            if tell is not None and getattr(screen, "ready", False):
                tell()

    def _save_draft(self) -> None:
        self._unsaved = False
        self.file.save_behind(self.draft.to_json())

    def save_draft_now(self) -> None:
        """Write the draft before leaving, if it changed."""
        if self._unsaved:
            self._unsaved = False
            self.file.save(self.draft.to_json())

    # What was found

    def _tell_looked(self, name: str, look: Look) -> None:
        self.post_message(self.Looked(name, look))  # from the look's own thread

    def on_lorasmith_app_looked(self, message: Looked) -> None:
        """Take a finished look up; one that was overtaken by a newer question is dropped."""
        self.known.follow_up(message.name)
        if self.known.looks.get(message.name) is not message.look:
            return
        if message.name == "start":
            self._started(message.look)
        self._tell_screens()

    # Edits of captions and left-out pictures

    def edit(self, edits: Edits, words: str) -> None:
        """Write whole edits of pictures to the overlay and scan again; `words` tell what was done, for the undo."""
        self.change_edits(lambda present: edits, Undo(words))

    def carry_out(self, action: Action) -> None:
        """Make the change that a finding proposes: settings in the draft, pictures and captions in the overlay."""
        undo = Undo(action.label, answers=answers_before(self.draft, action.settings))
        put_answers(self.draft, action.settings)
        if action.exclude or action.captions:
            self.change_edits(carry_out(action), undo)
        else:
            self.editing.undos.append(undo)
            self.known.look_again()
        self.changed()

    def undo(self) -> str:
        """Take the newest change back and return what it was, "" where there is none."""
        undo = self.editing.take_undo()
        if undo is None:
            return ""
        put_answers(self.draft, undo.answers)
        if undo.path is not None:
            self.change_edits(lambda present: undo.edits, None)
        else:
            self.known.look_again()
        self.changed()
        return undo.words

    def change_edits(self, change: Callable[[Edits], Edits], undo: Undo | None) -> None:
        """Write to the overlay what `change` makes of the edits in it, then scan again; failures are toasts."""
        path = self.draft.overlay_path()
        if path is not None:
            self.editing.waiting += 1
            self.run_worker(self._write_edits(path, change, undo), group="edits", exit_on_error=False)

    async def _write_edits(self, path: Path, change: Callable[[Edits], Edits], undo: Undo | None) -> None:
        try:
            await self.editing.write(path, change, undo)
        except LorasmithError as error:
            self.notify(safe_str(told_in_words(error)), title="Not saved", severity="error", markup=False)
        self.known.look_again()
        self._tell_screens()

    def look_again(self) -> None:
        """Scan the dataset again after its overlay or its files changed."""
        self.known.look_again()

    async def edits_written(self) -> None:
        """Wait until every edit is on the disk."""
        await self.editing.written()

    def marks(self) -> dict[str, str]:
        """Return the mark of each step: ✓ seen and in order, ! has a problem, • not seen."""
        # Before the second page there is nothing to check, and checking imports pydantic: the first paint comes first.
        wrong = {problem.page for problem in self.known.problems()} if len(self.draft.visited) > 1 else set()
        seen = self.draft.visited
        return {name: "•" if name not in seen else "!" if name in wrong else "✓" for name in PAGES}

    def start(self, resolved: ResolvedConfig) -> Look:
        """Make the run folder and start the engine; the monitor follows."""
        self.save_draft_now()
        self.known.looks.pop("start", None)
        return self.known.look("start", (id(resolved),), partial(self._start_probe, resolved))

    def _start_probe(self, resolved: ResolvedConfig, tell: Callable[..., None]) -> tuple[Any, ResolvedConfig]:
        # Kept from this thread on: whoever leaves now must still find the run.
        self.session = self.probes.start(resolved, tell)
        return self.session, resolved

    def output_folder(self) -> str:
        """Return the folder of the runs, as the draft has it."""
        # Asked by the first page, before settings are loaded; no preset and no advice names another folder.
        return str(self.draft.answers.get("run.output_folder") or "runs")

    def look_at_runs(self, *, again: bool = False) -> Look:
        """List the runs of the output folder, in a thread."""
        if again:
            self.known.looks.pop("runs", None)
        folder = self.output_folder()
        return self.known.look("runs", (folder,), partial(self.probes.runs, folder))

    def resume(self, run: RunFolder) -> Look:
        """Go on with an earlier run; the monitor follows."""
        self.save_draft_now()
        self.known.looks.pop("start", None)
        return self.known.look("start", (run.path,), partial(self._resume_probe, run))

    def _resume_probe(self, run: RunFolder, tell: Callable[..., None]) -> tuple[Any, ResolvedConfig]:
        self.session, resolved = self.probes.resume(run, tell)
        return self.session, resolved

    def _started(self, look: Look) -> None:
        if look.value is None:
            return
        from lorasmith.tui.screens.monitor import MonitorScreen

        self.push_screen(MonitorScreen(*look.value))

    def last_words(self) -> list[str]:
        """Return what was written where, for the terminal after the screen is gone; plain and safe."""
        words = []
        if self.session is not None:
            words.append(f"The run: {self.session.run.path}")
            words += [f"LoRA: {path}" for path in sorted(self.session.run.export.glob("*.safetensors"))]
        if self.file.problem:
            words.append(f"The draft could not be saved: {self.file.problem}")
        elif self.file.saved:
            words.append(f"Your choices are kept in {self.file.path}; `lorasmith` offers them again.")
        else:
            words.append("Nothing was written.")
        return [safe_str(line) for line in words]
