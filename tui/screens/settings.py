"""Fifth page: the training settings, most important first, each with its reason and origin."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Button, Static

from lorasmith.engine.errors import ConfigError
from lorasmith.tui.actions import bindings
from lorasmith.tui.fields import help_of, label_of, page_of, settings, write_text
from lorasmith.tui.findings import goal_of
from lorasmith.tui.forms import Choice, SafeInput, SettingField, field_id
from lorasmith.tui.screens.page import WizardPage
from lorasmith.tui.text import safe_str
from lorasmith.tui.widgets.forecast import Forecast

if TYPE_CHECKING:
    from lorasmith.engine.advisor import Advice
    from lorasmith.engine.config import AdapterSettings

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

    def compose_head(self) -> ComposeResult:
        """Memory and time of the run as it is set."""
        yield Forecast(id="forecast")

    def compose_body(self) -> ComposeResult:
        """The important fields; the others follow when asked for."""
        goals = self._goals()
        with Vertical(id="fields"):
            if goals:
                with Horizontal(id="goal-row"):
                    yield Static("It shall learn a", classes="label", markup=False)
                    yield Choice(goals, goal_of(self.wizard.draft, self._family()), id="goal")
            for key in IMPORTANT:
                yield self._field(key)

    def _family(self) -> str:
        base = self.wizard.known.base
        return "" if base is None or self.wizard.draft.is_demo else base.identity.family

    def _goals(self) -> tuple[str, ...]:
        """The goals that the base's preset knows; none for the demo, whose preset is complete."""
        from lorasmith.engine.advisor import goals

        try:
            return goals(self._family()) if self._family() else ()
        except ConfigError:
            return ()

    @on(Choice.Changed, "#goal")
    def _goal_chosen(self, event: Choice.Changed) -> None:
        event.stop()
        self.wizard.draft.kept["goal"] = event.value
        self._explain_goal(event.value)
        self.wizard.changed()
        for field in self.query(SettingField):
            field.show(self.wizard.draft.text(field.key, self.wizard.known.advice()))

    def _explain_goal(self, goal: str) -> None:
        from lorasmith.engine.advisor import goal_words

        self.hint(f"It shall learn {goal_words(goal)}.")

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
        return SettingField(key, self.wizard.draft.text(key, self.wizard.known.advice()))

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
                await self.query(f"#{field_id(key)}").remove()
            await self.query(".section").remove()
        else:
            kept["all_settings"] = "yes"
            await self._show_others()
        self.wizard.changed()

    async def _show_others(self) -> None:
        others = [key for key in self._others() if key != "base.model"]
        fields: list[Static | SettingField] = []
        section = ""
        for key in others:
            if key.split(".")[0] != section:
                section = key.split(".")[0]
                fields.append(Static(section.capitalize(), classes="section", markup=False))
            fields.append(self._field(key))
        await self.query_one("#fields").mount(*fields)
        self.refresh_page()

    async def on_button_pressed(self, event: Button.Pressed) -> None:
        """Take the toggle's press."""
        if event.button.id == "all":
            event.stop()
            await self.action_toggle_all()

    def on_setting_field_changed(self, event: SettingField.Changed) -> None:
        """Take a change into the draft; the fields then show what became of it."""
        self.wizard.change(event.key, event.text)

    def take_typed(self) -> None:
        """Take every input."""
        for field in self.query(SettingField):
            if isinstance(field.control, SafeInput):
                self.wizard.change(field.key, field.control.value)

    def action_reset(self) -> None:
        """Give the focused field its recommended value again."""
        field = self._focused_field()
        if field is None:
            self.hint("Move to a field first.")
            return
        self.wizard.draft.reset(field.key)
        field.show(self.wizard.draft.text(field.key, self.wizard.known.advice()))
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
        elif isinstance(self.focused, Choice):
            self._explain_goal(self.focused.value)

    def refresh_page(self) -> None:
        """Show each field's origin and reason, its warning or its problem, and what the run takes."""
        draft, known = self.wizard.draft, self.wizard.known
        advice = {item.key: item for item in known.advice()}
        merged = draft.merged(list(advice.values()))
        problems = {problem.key: problem.message for problem in known.problems()}
        guns = known.fitting.foot_guns()
        warnings = {next(iter(gun.fix)): gun.words for gun in reversed(guns) if gun.fix and gun.severity == "warning"}
        scales = scale_words(known.check_config().adapter)
        unusable = known.unusable()
        # Not by a query: with all settings open that takes longer than all the rest.
        for field in self.query_one("#fields").children:
            if not isinstance(field, SettingField):
                continue
            key, advised = field.key, advice.get(field.key)
            field.forbid({write_text(key, value): why for (name, value), why in unusable.items() if name == key})
            if not draft.changed(key):
                field.follow(write_text(key, merged[key][0]))
            origin = "wizard" if draft.changed(key) else merged[key][1]
            reason = advised.why if advised is not None else ""
            field.tell(origin, reason, problems.get(key, ""), scales.get(key, ""), warnings.get(key, ""))
            field.source = source_text(advised) if advised is not None else ""
        told = [gun.words for gun in guns if gun.severity == "warning"]
        self.query_one(Forecast).show(known.fitting.estimate(), known.fitting.plan(), told)

    def action_mend(self) -> None:
        """Make the change that the warning of the focused field, or else the first warning, proposes."""
        field = self._focused_field()
        guns = [gun for gun in self.wizard.known.fitting.foot_guns() if gun.fix]
        gun = next((gun for gun in guns if field is not None and field.key in gun.fix), next(iter(guns), None))
        if gun is None:
            self.hint("Nothing is warned of that one key could mend.")
            return
        for key, value in gun.fix.items():
            self.wizard.draft.put(key, write_text(key, value))
        for shown in self.query(SettingField):
            shown.show(self.wizard.draft.text(shown.key, self.wizard.known.advice()))
        self.wizard.changed()
        self.hint(safe_str(gun.fix_words))

    def reveal(self, key: str) -> None:
        """Move to the field of `key`, opening all settings where it is among them."""
        self.run_worker(self._reveal(key))

    async def _reveal(self, key: str) -> None:
        if not self.query(f"#{field_id(key)}") and key in self._others():
            await self.action_toggle_all()
        for field in self.query(f"#{field_id(key)}").results(SettingField):
            field.control.focus()


def source_text(advised: Advice) -> str:
    """Return why a value is recommended, where that comes from, and what speaks for another."""
    text = f"{advised.why}\nSource: {advised.source}"
    return f"{text}\nSources disagree: {advised.disagreement}" if advised.disagreement else text


def scale_words(adapter: AdapterSettings) -> dict[str, str]:
    """Return what the LoRA's change is multiplied by, for the fields that decide it."""
    from lorasmith.engine.config_adapter import effective_scale

    plain = f"scale {effective_scale(adapter):.3g}"
    words = {"adapter.rank": plain, "adapter.alpha": plain}
    if adapter.convolutions or adapter.kind == "locon":
        convolution = f"scale {effective_scale(adapter, convolution=True):.3g}"
        words |= {"adapter.conv_rank": convolution, "adapter.conv_alpha": convolution}
    return words


PAGE_CLASS = SettingsPage
