"""A config field as a form field: label, control, origin, bounds and help, all from the setting's own declaration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Input, Static

from lorasmith.tui.fields import bounds_of, choices_of, help_of, kind_of, label_of
from lorasmith.tui.text import masked, safe_str, safe_text

MANY_CHOICES = 6
_NUMBER_CHARACTERS = "0123456789.+-eE_"


class SafeInput(Input):
    """An input that shows control characters as marks, does not blink, and in number fields leaves letters to keys."""

    def __init__(self, value: str, *, id: str | None = None, placeholder: str = "", numeric: bool = False) -> None:
        super().__init__(value, id=id, placeholder=placeholder, compact=True, select_on_focus=False)
        self.cursor_blink = False
        self.numeric = numeric

    @property
    def _value(self) -> Text:
        return Text(masked(self.value), no_wrap=True, overflow="ignore", end="")

    def check_consume_key(self, key: str, character: str | None) -> bool:
        """Take printable keys; a number field only those that numbers are written with."""
        if self.numeric and character is not None:
            return character in _NUMBER_CHARACTERS
        return super().check_consume_key(key, character)

    async def _on_key(self, event: events.Key) -> None:
        # At once and here: through the app's bindings, ctrl+u would come after letters that were typed behind it.
        own = [] if event.is_printable else self._bindings.key_to_bindings.get(event.key, [])
        if own and await self.app.run_action(own[0].action, self):
            event.stop()
            event.prevent_default()
        elif not event.is_printable or self.check_consume_key(event.key, event.character):
            await super()._on_key(event)
        else:
            event.prevent_default()  # the letter bubbles on to the page's keys


class Choice(Widget, can_focus=True):
    """One of a few words on one row: `‹ adamw ›`, changed with left and right, or space.

    Words in `unusable` are shown in brackets and passed over.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "Previous", show=False, id="choice-previous"),
        Binding("right,space", "move(1)", "Next", show=False, id="choice-next"),
    ]
    value: reactive[str] = reactive("", init=False)

    class Changed(Message):
        """Another word was chosen."""

        def __init__(self, choice: Choice, value: str) -> None:
            super().__init__()
            self.choice = choice
            self.value = value

        @property
        def control(self) -> Choice:
            """The choice that changed."""
            return self.choice

    def __init__(self, options: tuple[str, ...], value: str, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.options = options
        self.unusable: frozenset[str] = frozenset()
        self.set_reactive(Choice.value, value)

    def forbid(self, words: frozenset[str]) -> None:
        """Take these words for unusable on this machine."""
        if words != self.unusable:
            self.unusable = words
            self.refresh()

    def render(self) -> Text:
        """Draw all words where they fit with the chosen one in brackets, else the chosen one alone."""
        words = [self._marked(option) for option in self.options]
        if len("  ".join(words)) > self.size.width or self.value not in self.options:
            return safe_text(f"‹ {self.value} ›")
        text = Text()
        for option, word in zip(self.options, words, strict=True):
            text.append(word, style="bold" if option == self.value else "dim")
            text.append("  ")
        return text

    def _marked(self, option: str) -> str:
        if option == self.value:
            return f"[{option}]"
        return f"({option})" if option in self.unusable else option

    def action_move(self, by: int) -> None:
        """Choose the next or previous usable word, around the end."""
        usable = [option for option in self.options if option not in self.unusable or option == self.value]
        index = usable.index(self.value) if self.value in usable else -1
        self.value = usable[(index + by) % len(usable)] if usable else self.value
        self.post_message(self.Changed(self, self.value))

    def on_click(self) -> None:
        """Choose the next word."""
        self.action_move(1)


class SettingField(Vertical):
    """One setting: a row with label and control, and a row with its origin and reason, or what is wrong."""

    class Changed(Message):
        """The user changed the field; `text` is what stands in it."""

        def __init__(self, key: str, text: str) -> None:
            super().__init__()
            self.key = key
            self.text = text

    def __init__(self, key: str, text: str) -> None:
        super().__init__(id=field_id(key))
        self.key = key
        self.source = ""
        self._shown = text
        self._control: SafeInput | Choice | None = None
        self._unusable: Mapping[str, str] = {}
        self._told = ""
        self._note: Static = Static("", classes="note", markup=False)

    def compose(self) -> ComposeResult:
        """Label, control and note."""
        with Horizontal(classes="row"):
            yield Static(label_of(self.key), classes="label", markup=False)
            self._control = self._make_control()
            yield self._control
        yield self._note

    def _make_control(self) -> SafeInput | Choice:
        kind = kind_of(self.key)
        if kind in ("switch", "choice"):
            return Choice(choices_of(self.key), self._shown)
        return SafeInput(self._shown, numeric=kind in ("whole", "number"), placeholder=bounds_of(self.key))

    @property
    def control(self) -> SafeInput | Choice:
        """The widget that takes the focus; there is none before the field is composed."""
        assert self._control is not None
        return self._control

    def show(self, text: str) -> None:
        """Put `text` into the control without calling that a change."""
        self._shown = text
        if self._control is not None and self._control.value != text:
            with self.prevent(Input.Changed, Choice.Changed):
                self._control.value = text

    def follow(self, text: str) -> None:
        """Show another recommended value, unless something was typed that nobody has taken yet."""
        if text != self._shown and (self._control is None or self._control.value == self._shown):
            self.show(text)

    def forbid(self, unusable: Mapping[str, str]) -> None:
        """Pass over the words that this machine cannot use; the help says why."""
        if unusable == self._unusable or self._control is None:
            return
        if isinstance(self._control, Choice):
            self._control.forbid(frozenset(unusable))
        self._unusable = unusable

    def tell(self, origin: str, reason: str, problem: str, fact: str = "", warning: str = "") -> None:
        """Show where the value comes from and why, or what is wrong with it; `fact` is what it amounts to."""
        if problem:
            note = safe_text(f"✗ {problem}")
        elif warning:
            note = safe_text(f"! {warning}")
        elif origin == "wizard":
            note = safe_text(" · ".join(part for part in (fact, "* changed by you; r takes it back") if part))
        else:
            note = safe_text(" · ".join(part for part in (fact, origin, reason or self._bounds()) if part))
        if note.plain == self._told:
            return
        self._told = note.plain
        self._note.set_class(bool(problem), "problem")
        self._note.update(note, layout=False)

    def _bounds(self) -> str:
        """Return the allowed range; of a long list of words only how many, since the help has them all."""
        if kind_of(self.key) == "choice" and (number := len(choices_of(self.key))) > MANY_CHOICES:
            return f"{number} to choose from, left and right; F1 lists them"
        return bounds_of(self.key)

    def help_for(self) -> tuple[str, str]:
        """Return title and explanation for the help."""
        bounds = bounds_of(self.key)
        about = f"{help_of(self.key)}\n\n{self.key}{f': {bounds}' if bounds else ''}"
        about += "".join(f"\n\n({word}) cannot be used here: {why}" for word, why in self._unusable.items())
        return label_of(self.key), f"{about}\n\n{self.source}" if self.source else about

    def on_input_changed(self, event: Input.Changed) -> None:
        """Pass a typed change on."""
        event.stop()
        self.post_message(self.Changed(self.key, event.value))

    def on_choice_changed(self, event: Choice.Changed) -> None:
        """Pass a choice on."""
        event.stop()
        self.post_message(self.Changed(self.key, event.value))


class Hanging:
    """A text whose wrapped lines begin below the first word of their line, not below its mark or indentation."""

    def __init__(self, text: Text) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Wrap each line to what its indentation leaves."""
        for line in self._text.split("\n", allow_blank=True):
            start = re.match(r"\s*([✓✗!•·] )?", line.plain)
            indent = start.end() if start else 0
            head, rest = line.divide([indent])
            for number, part in enumerate(rest.wrap(console, max(8, options.max_width - indent)) or [Text()]):
                yield Text.assemble(head if number == 0 else " " * indent, part)

    def __str__(self) -> str:
        """Return the words."""
        return self._text.plain


class Status(Static):
    """Text about what is going on or was found; foreign text comes in through `say` only."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__("", id=id, classes=classes, markup=False)

    def say(self, text: str | Text) -> None:
        """Show `text`; a string is made safe, newlines kept."""
        self.update(Hanging(text if isinstance(text, Text) else safe_text(text, lines=True)))


def field_id(key: str) -> str:
    """Return the widget id of a setting's field."""
    return "field-" + key.replace(".", "-")


def told(error: BaseException) -> Text:
    """Return an error in its three parts: what happened, why, what to do."""
    what, why, fix = (getattr(error, part, "") for part in ("what", "why", "fix"))
    text = Text()
    text.append("✗ ", "bold")
    text.append(safe_str(what or f"{type(error).__name__}: {error}", lines=True), style="bold")
    for part in (why, fix):
        if part:
            text.append("\n  " + safe_str(part, lines=True))
    return text
