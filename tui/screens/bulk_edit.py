"""One change in many captions: what is changed is listed before it is made, and taken back as one step."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal
from textual.widgets import Button, Input, Static

from lorasmith.engine.errors import LorasmithError
from lorasmith.tui.actions import Place, bindings
from lorasmith.tui.caption_diff import diff_parts
from lorasmith.tui.caption_operations import BY_LABEL, BY_NAME, OPERATIONS, Operation
from lorasmith.tui.forms import Choice, SafeInput, Status
from lorasmith.tui.screens.tool import ToolScreen
from lorasmith.tui.while_open import while_open
from lorasmith.tui.widgets.line import Line, Part
from lorasmith.tui.widgets.row_list import RowList

if TYPE_CHECKING:
    from lorasmith.engine.dataset.caption_edits import Change
    from lorasmith.engine.dataset.items import Dataset
    from lorasmith.tui.caption_work import CaptionWork
    from lorasmith.tui.findings import FoundDataset

PAUSE_SECONDS = 0.15
"""How long typing must rest before the preview is made anew."""
USUAL_HINT = "left and right: another change · Enter: next field · tab: to the list"
SCOPES = ("training pictures", "regularization", "all")


class BulkEdit(ToolScreen):
    """Choose what to do, see which captions that changes, apply; nothing is written before."""

    TITLE_WORDS = "Bulk edit"
    AUTO_FOCUS = "#bulk-operation"
    PLACES: ClassVar[tuple[Place, ...]] = ("app", "tool", "bulk")
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("bulk")]
    HELP_TEXT: ClassVar[str] = (
        "Choose a change with left and right, type what it needs, and look at the list: - is a caption as it is, + as "
        "it would become. ctrl+s makes the change, u takes all of it back. Edits are kept beside your draft, never in "
        "your files.\n\nA tag is what stands between two commas."
    )
    DEFAULT_CSS = """
    BulkEdit #bulk-about, BulkEdit #bulk-count { color: $text-muted; }
    BulkEdit #bulk-problem { height: auto; }
    BulkEdit #bulk-count { margin-top: 1; }
    """

    def __init__(
        self, found: FoundDataset, work: CaptionWork | None = None, operation: str = "add-last", first: str = ""
    ) -> None:
        """Open with an operation's name and what its first field holds."""
        super().__init__(found, work)
        self.operation: Operation = BY_NAME[operation]
        self.changes: list[Change] = []
        self._first = first
        self._problem = ""
        self._previewed = 0
        self._fresh = False

    def compose_body(self) -> ComposeResult:
        """Operation, its fields, the pictures, the preview."""
        with Horizontal(classes="tool-row"):
            yield Static("Change", classes="label", markup=False)
            yield Choice(tuple(entry.label for entry in OPERATIONS), self.operation.label, id="bulk-operation")
        yield Static("", id="bulk-about", markup=False)
        for number, text in enumerate((self._first, ""), 1):
            with Horizontal(classes="tool-row", id=f"bulk-row-{number}"):
                yield Static("", classes="label", id=f"bulk-label-{number}", markup=False)
                yield SafeInput(text, id=f"bulk-field-{number}")
        yield Status(id="bulk-problem", classes="problem")
        with Horizontal(classes="tool-row", id="bulk-scope-row"):
            yield Static("In", classes="label", markup=False)
            yield Choice(SCOPES, SCOPES[0], id="bulk-scope")
        yield Line(id="bulk-count")
        yield RowList(id="bulk-rows", lines=3)

    def compose_buttons(self) -> ComposeResult:
        """Apply and undo."""
        yield Button("Undo (u)", id="undo", compact=True)
        yield Button("Apply (ctrl+s)", id="apply", variant="primary", compact=True)

    def on_mount(self) -> None:
        """Show the operation, and where it is prefilled move to what is still to be typed."""
        super().on_mount()
        self.query_one("#bulk-scope-row").display = any(item.regularization for item in self.work.state.items.values())
        self.show_operation()
        if self._first:
            field = "#bulk-field-2" if len(self.operation.fields) > 1 else "#bulk-rows"
            self.query_one(field).focus()

    # What is to be done

    def show_operation(self) -> None:
        """Show what the chosen operation asks for."""
        self.query_one("#bulk-about", Static).update(self.operation.about)
        for number in (1, 2):
            asked = number <= len(self.operation.fields)
            self.query_one(f"#bulk-row-{number}").display = asked
            if asked:
                self.query_one(f"#bulk-label-{number}", Static).update(self.operation.fields[number - 1])
        field = self.query_one("#bulk-field-1", SafeInput)
        if self.operation.name == "trigger" and not field.value.strip():
            field.value = self.work.settings.trigger
        self.request_preview()

    @on(Choice.Changed, "#bulk-operation")
    def _operation_chosen(self, event: Choice.Changed) -> None:
        event.stop()
        self.hint(USUAL_HINT)
        self.operation = BY_LABEL[event.value]
        self.show_operation()

    @on(Choice.Changed, "#bulk-scope")
    def _scope_chosen(self, event: Choice.Changed) -> None:
        event.stop()
        self.request_preview()

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self.request_preview()

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        if event.input.id == "bulk-field-1" and len(self.operation.fields) > 1:
            self.query_one("#bulk-field-2").focus()
        else:
            self.query_one("#apply").focus()

    # The preview

    def request_preview(self) -> None:
        """Make the preview anew when typing rests."""
        self._previewed += 1
        self._fresh = False
        self.query_one("#apply", Button).disabled = True
        self.run_worker(while_open(self, self._preview(self._previewed)), exclusive=True, group="preview")

    async def _preview(self, number: int) -> None:
        await asyncio.sleep(PAUSE_SECONDS)
        first, second = (self.query_one(f"#bulk-field-{n}", SafeInput).value for n in (1, 2))
        if self.operation.fields and not first:
            self._show_preview([], "", waiting=f"Type the {self.operation.fields[0].lower()}.")
            return
        try:
            changes = await asyncio.to_thread(self._changes, first, second, self._scope())
        except LorasmithError as error:
            self._show_preview([], " ".join(part for part in (error.what, error.why, error.fix) if part))
            return
        if number == self._previewed:
            self._show_preview(changes, "")

    def _scope(self) -> str:
        return self.query_one("#bulk-scope", Choice).value

    def _changes(self, first: str, second: str, scope: str) -> list[Change]:
        from lorasmith.engine.dataset.caption_edits import each_line, preview_changes

        dataset = _within(self.work.state.current(), scope)
        edit = self.operation.build(first, second)
        edit("")  # says what is wrong with the fields even where there are no pictures
        if self.work.settings.lines == "choose":
            edit = each_line(edit)
        return preview_changes(dataset, edit)

    def _show_preview(self, changes: Sequence[Change], problem: str, waiting: str = "") -> None:
        self.changes, self._problem, self._fresh = list(changes), problem, True
        shown = self.query_one("#bulk-problem", Status)
        shown.display = bool(problem)
        shown.say(f"✗ {problem}" if problem else "")
        total = sum(1 for item in self.work.state.items.values() if _in_scope(item.regularization, self._scope()))
        counted = f"{len(changes):,} of {total:,} captions change" if not waiting and not problem else waiting
        self.query_one("#bulk-count", Line).show([(counted, "strong" if changes else "dim")])
        self.query_one("#apply", Button).disabled = not changes
        rows = self.query_one("#bulk-rows", RowList)
        rows.show(len(changes), self._row, 0)

    def _row(self, index: int, line: int) -> list[Part]:
        change = self.changes[index]
        if line == 0:
            return [(change.relative, "strong")]
        width = self.query_one("#bulk-rows", RowList).size.width - 6
        parts = diff_parts(change.before or "(no caption)", change.after or "(empty)", width)[line - 1]
        return [("- " if line == 1 else "+ ", "dim"), *parts]

    def refresh_all(self) -> None:
        """Show the captions as they stand now."""
        super().refresh_all()
        if self.is_mounted:
            self.hint(USUAL_HINT)

    # Actions

    def action_apply(self) -> None:
        """Make the change that is listed, as one step."""
        if not self._fresh:
            self.hint("The list is being made anew; look at it, then apply.")
            return
        if not self.changes:
            self.hint(self._problem or "There is nothing to change yet.")
            return
        count = len(self.changes)
        label = f"{self.operation.label} in {count:,} caption{'' if count == 1 else 's'}"
        self.work.save(self.work.state.put({change.relative: change.captions for change in self.changes}, label))
        self.request_preview()
        self.show_title()
        self.hint(f"✓ Done: {label}. u takes all of it back.")

    def action_undo(self) -> None:
        """Take the last change back, all of it."""
        label, edits = self.work.state.undo()
        if not label:
            self.hint("There is nothing to undo.")
            return
        self.work.save(edits)
        self.request_preview()
        self.show_title()
        self.hint(f"Undone: {label}.")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Do what the button says."""
        if event.button.id in ("apply", "undo"):
            event.stop()
            getattr(self, f"action_{event.button.id}")()


def _in_scope(regularization: bool, scope: str) -> bool:
    return scope == SCOPES[2] or regularization == (scope == SCOPES[1])


def _within(dataset: Dataset, scope: str) -> Dataset:
    from dataclasses import replace

    return replace(dataset, items=tuple(item for item in dataset.items if _in_scope(item.regularization, scope)))
