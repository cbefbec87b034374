"""Fifth page: the training settings, most important first, each with its reason and origin."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.widgets import Button

from lorasmith.tui.actions import bindings
from lorasmith.tui.fields import help_of, label_of, page_of, settings
from lorasmith.tui.forms import Choice, SafeInput, SettingField, field_id
from lorasmith.tui.screens.page import WizardPage

IMPORTANT = (
    "run.name",
    "train.steps",
    "adapter.rank",
    "adapter.alpha",
    "optimizer.learning_rate",
    "optimizer.name",
    "train.batch_size",
    "dataset.resolution",
    "previews.every",
)


class SettingsPage(WizardPage):
    """The important settings, or all of them; every field says where its value comes from."""

    PAGE = "settings"
    AUTO_FOCUS = "#fields SafeInput"
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("settings")]
    HELP_TEXT: ClassVar[str] = (
        "Each setting shows its value, where it comes from and why. Change what you like; r undoes it."
    )

    def compose_body(self) -> ComposeResult:
        """The important fields; the others follow when asked for."""
        with Vertical(id="fields"):
            for key in IMPORTANT:
                yield self._field(key)

    def compose_buttons(self) -> ComposeResult:
        """The toggle and Next."""
        yield Button("All settings (a)", id="all", compact=True)
        yield from super().compose_buttons()

    def on_mount(self) -> None:
        """Open all settings again where they were open."""
        super().on_mount()
        if self.wizard.draft.kept.get("all_settings"):
            self.run_worker(self._show_others())

    def _field(self, key: str) -> SettingField:
        return SettingField(key, self.wizard.draft.text(key, self.wizard.advice()))

    def _others(self) -> list[str]:
        return [
            key
            for key in settings()
            if key not in IMPORTANT and (page_of(key) == "settings" or key.startswith("base."))
        ]

    async def action_toggle_all(self) -> None:
        """Show all settings, or the important ones."""
        kept = self.wizard.draft.kept
        if kept.pop("all_settings", None):
            for key in self._others():
                await self.query_one(f"#{field_id(key)}").remove()
        else:
            kept["all_settings"] = "yes"
            await self._show_others()
        self.wizard.changed()

    async def _show_others(self) -> None:
        others = [key for key in self._others() if key != "base.model"]
        await self.query_one("#fields").mount(*(self._field(key) for key in others))
        self.refresh_page()

    async def on_button_pressed(self, event: Button.Pressed) -> None:
        """Take the toggle's press."""
        if event.button.id == "all":
            event.stop()
            await self.action_toggle_all()

    def on_setting_field_changed(self, event: SettingField.Changed) -> None:
        """Take a change into the draft; the fields then show what became of it."""
        self.wizard.change(event.key, event.text)

    def action_reset(self) -> None:
        """Give the focused field its recommended value again."""
        field = self._focused_field()
        if field is None:
            self.hint("Move to a field first.")
            return
        self.wizard.draft.reset(field.key)
        field.show(self.wizard.draft.text(field.key, self.wizard.advice()))
        self.wizard.changed()

    def _focused_field(self) -> SettingField | None:
        node = self.focused
        if not isinstance(node, SafeInput | Choice):
            return None
        return next((parent for parent in node.ancestors if isinstance(parent, SettingField)), None)

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """Explain the field that got the focus."""
        field = self._focused_field()
        if field is not None:
            self.hint(f"{label_of(field.key)}: {help_of(field.key)}")

    def refresh_page(self) -> None:
        """Show each field's origin and reason, or its problem."""
        draft, advice = self.wizard.draft, self.wizard.advice()
        merged = draft.merged(advice)
        reasons = {item.key: item.why for item in advice}
        problems = {problem.key: problem.message for problem in self.wizard.problems()}
        for field in self.query(SettingField):
            origin = "wizard" if draft.changed(field.key) else merged[field.key][1]
            advised = next((item.value for item in advice if item.key == field.key), None)
            reason = reasons.get(field.key, "") if advised == merged[field.key][0] else ""
            field.tell(origin, reason, problems.get(field.key, ""))

    def reveal(self, key: str) -> None:
        """Move to the field of `key`, opening all settings where it is among them."""
        self.run_worker(self._reveal(key))

    async def _reveal(self, key: str) -> None:
        if not self.query(f"#{field_id(key)}") and key in self._others():
            await self.action_toggle_all()
        for field in self.query(f"#{field_id(key)}").results(SettingField):
            field.control.focus()


PAGE_CLASS = SettingsPage
