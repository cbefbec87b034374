"""Last page: what will be trained, everything that is still wrong, the run file and the command that does the same."""

from __future__ import annotations

import asyncio
import os
import shlex
from typing import TYPE_CHECKING, ClassVar

from rich.table import Table
from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.widgets import Button, OptionList, Static

from lorasmith.engine.errors import LorasmithError
from lorasmith.tui.actions import bindings
from lorasmith.tui.clipboard import copy_text
from lorasmith.tui.disconnect import disconnect_words, ends_at_logout, find_tmux, is_unprotected
from lorasmith.tui.draft import PAGES, state_folder
from lorasmith.tui.edits import told_in_words
from lorasmith.tui.fields import label_of
from lorasmith.tui.forms import Status, told
from lorasmith.tui.measuring import Measuring
from lorasmith.tui.screens.page import WizardPage
from lorasmith.tui.text import safe_str, safe_text
from lorasmith.tui.while_open import while_open

if TYPE_CHECKING:
    from lorasmith.engine.run_file import ResolvedConfig
    from lorasmith.tui.draft import Problem


class ReviewPage(WizardPage):
    """Start is blocked until every problem is solved; Enter on a problem leads to its field."""

    PAGE = "review"
    AUTO_FOCUS = None
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("review")]
    HELP_TEXT: ClassVar[str] = (
        "Everything that will be trained, as the run file that `lorasmith train` takes. y copies the command, "
        "t the file. a adds the run to the queue, which `lorasmith queue run` trains one by one.\n\n"
        "Start makes a run folder and begins. While problems are listed, Enter on one leads to its field."
    )

    def __init__(self) -> None:
        super().__init__()
        self._waiting = False
        self._shown: list[Problem] | None = None
        self._measuring: Measuring | None = None

    def compose_body(self) -> ComposeResult:
        """State, problems, command, run file."""
        yield Status(id="state")
        yield OptionList(id="problems", markup=False, compact=True)
        yield Status(id="measured", classes="gap")
        yield Status(id="plan", classes="gap")
        yield Status(id="command", classes="gap")
        yield Static("", id="toml", classes="gap", markup=False)

    def compose_buttons(self) -> ComposeResult:
        """Copy and Start."""
        yield Button("Copy command (y)", id="copy", compact=True)
        yield Button("Start training", id="next", variant="success", compact=True)

    def on_unmount(self) -> None:
        """Stop a rehearsal that nobody waits for any more."""
        if self._measuring is not None:
            self._measuring.stop()

    def on_mount(self) -> None:
        """Look at what was skipped, and show everything."""
        self.wizard.known.look_at_base()
        self.wizard.known.look_at_dataset()
        self.wizard.known.look_at_checks()
        super().on_mount()
        self.query_one("#problems" if self._shown else "#next").focus(scroll_visible=False)

    def _pending(self) -> list[str]:
        names = {
            "base_model": "the base model",
            "dataset": "the pictures",
            "checks": "pictures and captions",
            "fit": "what fits the card",
            "start": "the start",
        }
        found = [(words, self.wizard.known.current(name)) for name, words in names.items()]
        return [f"{words}: {look.progress()}" for words, look in found if look is not None and not look.done]

    def draft_changed(self) -> None:
        """Show the change, and start by itself if that was asked for before the checks were done."""
        super().draft_changed()
        if self._waiting and not self._pending():
            self._waiting = False
            self.action_next()

    def refresh_page(self) -> None:
        """Show the problems, or the run."""
        problems = self.wizard.known.problems()
        self._show_problems(problems)
        self._show_state(problems)
        resolved = self._resolved()
        if resolved is None:
            self.query_one("#toml", Static).update("The run file can be shown when the problems above are solved.")
            self.query_one("#command", Status).say("")
            self.query_one("#plan", Status).say("")
            self.query_one("#measured", Status).say("")
            return
        from lorasmith.engine.run_file import to_toml

        self._show_measured()
        self._show_plan(resolved)
        command = Text()
        command.append("The same without the wizard (y copies it)\n", "bold")
        command.append(f"  {safe_str(self._command())}")
        self.query_one("#command", Status).say(command)
        self.query_one("#toml", Static).update(safe_text(to_toml(resolved), lines=True))

    def _show_plan(self, resolved: ResolvedConfig) -> None:
        shown = self.query_one("#plan", Status)
        look = self.wizard.known.look_at_plan(resolved)
        if not look.done:
            return
        if look.error is not None:
            shown.say(told(look.error))
            return
        table = Table.grid(padding=(0, 2, 0, 0))
        for label, words in [*look.value.rows(), *self._fit_rows()]:
            table.add_row(safe_text(f"! {label}" if label == "warning" else f"  {label}", "bold"), safe_text(words))
        shown.update(table)

    def _fit_rows(self) -> list[tuple[str, str]]:
        """Say what was done to fit the card, how long the run takes, and what that costs."""
        fitting = self.wizard.known.fitting
        fit, estimate = fitting.plan(), fitting.estimate()
        rows = [("to fit", switch.words) for switch in fit.switches] if fit is not None else []
        if fit is not None and fit.nearest:
            rows.append(("or", fit.nearest))
        if estimate is not None:
            rows += [("time" if index == 0 else "cost", words) for index, words in enumerate(estimate.words)]
        return rows

    def action_measure(self) -> None:
        """Try each stage of the run once in another process, or stop that."""
        running = self.wizard.known.looks.get("measure")
        if running is not None and not running.done and self._measuring is not None:
            self._measuring.stop()
            return
        resolved = self._resolved()
        if resolved is None or self.wizard.known.problems() or self._pending():
            self.hint("The run can be tried when everything was checked and nothing is left to solve.")
            return
        if path := self._write_run_file():
            self._measuring = self.wizard.probes.measure(path)
            self.wizard.known.looks.pop("measure", None)
            self.wizard.known.look("measure", (resolved.config.model_dump_json(),), self._measuring.measure)
            self._show_measured()

    def _show_measured(self) -> None:
        """Show how far the rehearsal is, or what it found for the settings as they stand."""
        look, shown = self.wizard.known.looks.get("measure"), self.query_one("#measured", Status)
        resolved = self._resolved()
        if look is None or resolved is None or look.key != (resolved.config.model_dump_json(),):
            shown.say("m tries each stage of this run once and measures memory and time.")
        elif not look.done:
            shown.say(f"Trying each stage once · {look.seconds} s · m stops it\n  {look.label}")
        elif look.error is not None:
            shown.say(told(look.error))
        else:
            shown.say("\n".join(["✓ Tried on this machine", *(f"  {line}" for line in look.value)]))

    def _resolved(self) -> ResolvedConfig | None:
        try:
            return self.wizard.draft.resolve(self.wizard.known.advice())
        except LorasmithError:
            return None

    def _show_problems(self, problems: list[Problem]) -> None:
        listed = self.query_one("#problems", OptionList)
        listed.display = bool(problems)
        start = self.query_one("#next", Button)
        led = start.has_focus or listed.has_focus
        start.disabled = bool(problems)
        if led and listed.has_focus != bool(problems):
            # Enter leads to the first problem, or starts: never to where a vanished focus happens to fall.
            (listed if problems else start).focus(scroll_visible=False)
        if problems == self._shown:
            return
        self._shown = problems
        listed.clear_options()
        for problem in problems:
            listed.add_option(safe_text(f"! {PAGES[problem.page]} · {label_of(problem.key)}: {problem.message}"))
        if problems:
            listed.highlighted = 0

    def _show_state(self, problems: list[Problem]) -> None:
        state = self.query_one("#state", Status)
        start = self.wizard.known.looks.get("start")
        pending = self._pending()
        text = Text()
        if start is not None and start.error is not None:
            text.append_text(told(start.error)).append("\n")
        if problems:
            count = len(problems)
            text.append(
                f"✗ {count} thing{'s' if count > 1 else ''} to solve before the start; Enter leads there", "bold"
            )
        else:
            starting = start is not None and not start.done
            text.append("Starting" if starting else "Checking" if pending else "✓ Ready to train", "bold")
            text.append(f"\n{safe_str(self._summary(), lines=True)}")
        for line in pending:
            text.append(f"\n  {safe_str(line)}")
        if self._waiting:
            text.append("\n  Training starts by itself when this is done.")
        if note := self._connection_note():
            text.append(f"\n! {note}")
        state.say(text)
        self.hint("Enter: start training · Page Up and Down: scroll")

    def _connection_note(self) -> str:
        """Say what a dropped connection would do, once that was found out."""
        if not is_unprotected(os.environ):
            return ""
        look = self.wizard.known.look("logout", (), lambda tell: ends_at_logout())
        return disconnect_words(look.value, bool(find_tmux())) if look.done else ""

    def action_in_tmux(self) -> None:
        """Leave, and start the wizard again inside tmux with the same draft."""
        if not is_unprotected(os.environ):
            self.hint("This terminal is kept already: it is local, or inside tmux or screen.")
        elif not find_tmux():
            self.hint("tmux is not installed here; for example: sudo apt install tmux")
        elif self.wizard.session is not None:
            self.hint("A training was started here already; it goes on when the connection drops.")
        else:
            self.wizard.leave_for_tmux()

    def _summary(self) -> str:
        resolved = self._resolved()
        if resolved is None:
            return ""
        from lorasmith.engine.config_adapter import effective_scale

        config = resolved.config
        adapter, optimizer = config.adapter, config.optimizer
        overlay = config.dataset.overlay
        edits = f"\n  with the captions and left-out pictures that you edited: {overlay}" if overlay else ""
        return (
            f"  {config.run.name} · trigger {config.captions.trigger}\n"
            f"  {adapter.kind} rank {adapter.rank}, scale {effective_scale(adapter):.3g} · "
            f"{optimizer.name} at {optimizer.learning_rate:g} · {config.dataset.resolution} pixels{edits}"
        )

    def _command(self) -> str:
        return f"lorasmith train {shlex.quote(str(state_folder() / 'run.toml'))}"

    def accept(self) -> bool:
        """Start, now or when the checks are done; never leave the page by itself."""
        if self.wizard.known.problems():
            self.hint("Solve what is listed first; Enter on a line leads to its field.")
            return False
        if self._pending():
            self._waiting = True
            self.refresh_page()
            return False
        resolved = self._resolved()
        if resolved is not None:
            self.wizard.start(resolved)
            self.refresh_page()
        return False

    def action_add_to_queue(self) -> None:
        """Make the run and put it at the end of the queue instead of training it now."""
        resolved = self._resolved()
        if resolved is None or self.wizard.known.problems() or self._pending():
            self.hint("The run can be added when everything was checked and nothing is left to solve.")
            return
        self.run_worker(while_open(self, self._add_to_queue(resolved)), exclusive=True, group="queue")

    async def _add_to_queue(self, resolved: ResolvedConfig) -> None:
        try:
            words = await asyncio.to_thread(self.wizard.probes.queue, resolved)
        except LorasmithError as error:
            self.notify(safe_str(told_in_words(error)), title="Not added", severity="error", markup=False)
        else:
            self.notify(safe_str(words), title="Added to the queue", markup=False)

    @on(OptionList.OptionSelected, "#problems")
    def _problem_taken(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        if self._shown:
            problem = self._shown[event.option_index]
            self.wizard.visit(problem.page, problem.key)

    @on(Button.Pressed, "#copy")
    def _copy_pressed(self) -> None:
        self.action_copy_command()

    def action_copy_command(self) -> None:
        """Write the run file and copy the command that trains from it."""
        if path := self._write_run_file():
            self.notify(copy_text(self.app, self._command(), path), markup=False)

    def action_copy_toml(self) -> None:
        """Write the run file and copy its text."""
        resolved = self._resolved()
        if resolved is not None and (path := self._write_run_file()):
            from lorasmith.engine.run_file import to_toml

            self.notify(copy_text(self.app, to_toml(resolved), path), markup=False)

    def _write_run_file(self) -> str:
        from lorasmith.engine.run_file import to_toml
        from lorasmith.engine.storage import atomic_write

        resolved = self._resolved()
        if resolved is None:
            self.hint("The run file can be copied when the problems are solved.")
            return ""
        path = state_folder() / "run.toml"
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            atomic_write(path, to_toml(resolved).encode())
        except (OSError, LorasmithError) as error:
            self.hint(f"Cannot write {path}: {error}")
            return ""
        return str(path)


PAGE_CLASS = ReviewPage
