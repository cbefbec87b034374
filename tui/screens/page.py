"""The frame around every wizard page: title, list of steps, body, help line, buttons, footer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import Screen
from textual.widgets import Button, Footer, Input, OptionList, Static

from lorasmith.tui.actions import Place, bindings
from lorasmith.tui.draft import PAGES
from lorasmith.tui.text import safe_text

if TYPE_CHECKING:
    from lorasmith.tui.app import LorasmithApp


class StepList(OptionList):
    """All steps with their marks: ✓ seen and in order, ! has a problem, • not seen yet."""

    def __init__(self) -> None:
        super().__init__(id="steps", compact=True, markup=False)


class WizardPage(Screen[None]):
    """One step of the wizard; subclasses give its body, and say what Enter does."""

    PAGE: ClassVar[str] = "hardware"
    HELP_TEXT: ClassVar[str] = ""
    PLACES: ClassVar[tuple[Place, ...]] = ("app", "page", "settings", "review")
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("page")]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (80, "-normal"), (120, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-short"), (32, "-tall")]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self._labels: list[str] = []
        self.ready = False
        """Whether the page's widgets exist; a look may end between the page's push and its mount."""

    @property
    def wizard(self) -> LorasmithApp:
        """The app, by its own type."""
        return cast("LorasmithApp", self.app)

    def compose(self) -> ComposeResult:
        """The frame; the middle is the subclass's."""
        names = list(PAGES)
        number = names.index(self.PAGE) + 1
        with Horizontal(id="title"):
            yield Static(f"lorasmith · Step {number}/{len(names)} · {PAGES[self.PAGE]}", id="title-left", markup=False)
            yield Static("", id="title-right", markup=False)
        with Horizontal(id="frame"):
            yield StepList()
            with Vertical(id="main"):
                yield from self.compose_head()
                with VerticalScroll(id="body", can_focus=False):
                    yield from self.compose_body()
                yield Static("", id="hint", markup=False)
                with Horizontal(id="buttons"):
                    yield Button("Back", id="back", compact=True, disabled=number == 1)
                    yield from self.compose_buttons()
        yield Footer(show_command_palette=False, compact=True)

    def compose_head(self) -> ComposeResult:
        """What stays above the body while that scrolls."""
        yield from ()

    def compose_body(self) -> ComposeResult:
        """The page's own widgets."""
        yield from ()

    def compose_buttons(self) -> ComposeResult:
        """The buttons right of Back."""
        yield Button("Next", id="next", variant="primary", compact=True)

    def on_mount(self) -> None:
        """Fill the page from the draft and what was found, then keep waits ticking."""
        self.ready = True
        self.call_after_refresh(self.refresh_bindings)
        self.show_steps()
        self.refresh_page()
        self.set_interval(1.0, self._tick)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Refuse keys that were pressed before the page stands: what cannot be seen must not be accepted."""
        return self.ready and super().check_action(action, parameters)

    def _tick(self) -> None:
        if self.wizard.known.looking():
            self.refresh_page()

    def refresh_page(self) -> None:
        """Show what the draft and the findings hold now; called after each change and each second of a wait."""

    def draft_changed(self) -> None:
        """Called after the draft changed, by a field or a finding."""
        self.show_steps()
        self.refresh_page()

    def show_steps(self) -> None:
        """Redraw the marks of the step list and say whether the draft is on the disk."""
        file = self.wizard.file
        saved = f"draft not saved: {file.problem}" if file.problem else "draft saved" if file.saved else ""
        self.query_one("#title-right", Static).update(safe_text(saved))
        steps = self.query_one(StepList)
        marks = self.wizard.marks()
        labels = [f"{marks[name]} {index} {title}" for index, (name, title) in enumerate(PAGES.items(), 1)]
        here = list(PAGES).index(self.PAGE)
        if labels == self._labels:
            return
        self._labels = labels
        highlighted = steps.highlighted if steps.option_count else here
        steps.clear_options()
        # The current step is marked by reverse video, which every terminal has.
        steps.add_options(Text(label, "bold reverse" if index == here else "") for index, label in enumerate(labels))
        steps.highlighted = highlighted

    def reveal(self, key: str) -> None:
        """Move to the field of a setting; pages with more than one field know where it is."""

    def hint(self, text: str) -> None:
        """Show one line of help under the body."""
        self.query_one("#hint", Static).update(safe_text(text), layout=False)

    def take_typed(self) -> None:
        """Take what stands in the inputs into the draft: a quick key may overtake the message of a change."""

    def accept(self) -> bool:
        """Take what the page holds; False keeps the user here (for example while a new folder is shown first)."""
        return True

    def help_for_focus(self) -> tuple[str, str]:
        """Return title and text of the help for the focused widget."""
        node = self.focused
        while node is not None and node is not self:
            if hasattr(node, "help_for"):
                return cast(tuple[str, str], node.help_for())
            node = cast(object, node.parent)  # type: ignore[assignment]
        return PAGES[self.PAGE], self.HELP_TEXT

    def action_next(self) -> None:
        """Accept the page and go on; first comes what the page wants to show."""
        if self.accept():
            self.action_forward()

    def action_forward(self) -> None:
        """Go to the next page, whatever this one holds."""
        names = list(PAGES)
        index = names.index(self.PAGE)
        if index + 1 < len(names):
            self.wizard.visit(names[index + 1])

    def action_back(self) -> None:
        """Go to the page before."""
        names = list(PAGES)
        index = names.index(self.PAGE)
        if index:
            self.wizard.visit(names[index - 1])
        else:
            self.hint("This is the first page. ctrl+q leaves lorasmith; the draft is kept.")

    def action_step(self, number: int) -> None:
        """Go to the step of that number."""
        self.wizard.visit(list(PAGES)[number - 1])

    def action_scroll_body(self, pages: int) -> None:
        """Scroll what does not fit, wherever the focus is."""
        body = self.query_one("#body")
        body.scroll_relative(y=pages * max(1, body.size.height - 1), animate=False)

    def action_focus_steps(self) -> None:
        """Move to the list of steps."""
        self.query_one(StepList).focus()

    def action_runs(self) -> None:
        """List the earlier runs."""
        from lorasmith.tui.screens.runs import RunsScreen

        self.take_typed()
        self.app.push_screen(RunsScreen())

    def action_help(self) -> None:
        """Explain the focused widget."""
        from lorasmith.tui.screens.help import HelpScreen

        self.app.push_screen(HelpScreen(*self.help_for_focus(), self.PLACES))

    @on(Button.Pressed, "#next")
    def _next_pressed(self) -> None:
        self.action_next()

    @on(Button.Pressed, "#back")
    def _back_pressed(self) -> None:
        self.action_back()

    @on(OptionList.OptionSelected, "#steps")
    def _step_chosen(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.wizard.visit(list(PAGES)[event.option_index])

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.action_next()
