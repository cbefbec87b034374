"""The form of a captioner: which one, its model, which pictures, its options, and what is known of it in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input, Static

from lorasmith.tui import captioner_form as form
from lorasmith.tui.forms import Choice, SafeInput, Status
from lorasmith.tui.text import safe_str
from lorasmith.tui.while_open import while_open
from lorasmith.tui.widgets.line import Line

if TYPE_CHECKING:
    from lorasmith.engine.captioners import CaptionerModule
    from lorasmith.engine.dataset.items import ImageItem
    from lorasmith.tui.caption_work import CaptionWork


class CaptionerPanel(VerticalScroll, can_focus=False):
    """Asks for a captioner; `count` pictures would be captioned with what stands in it."""

    DEFAULT_CSS = """
    CaptionerPanel { height: 1fr; }
    CaptionerPanel .row { height: 1; }
    CaptionerPanel .label { width: 20; }
    CaptionerPanel #captioner-facts { padding: 0 0 0 2; margin-bottom: 1; }
    CaptionerPanel #captioner-count { margin: 0 0 1 2; }
    CaptionerPanel #captioner-options { height: auto; }
    CaptionerPanel #captioner-problem { margin-bottom: 1; }
    """

    class Changed(Message):
        """Another captioner or other pictures were chosen."""

    class Explained(Message):
        """The focus moved to a field; `text` says what it is."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self, work: CaptionWork, modules: Sequence[CaptionerModule], style: str, base: str) -> None:
        """Offer `modules` in their order, for a base that reads `style` ("" unknown) and is called `base`."""
        super().__init__(id="captioner-form")
        self.captions = work
        self.count = 0
        self._modules = {module.SPEC.label: module for module in modules}
        self._fit = style, base

    def compose(self) -> ComposeResult:
        """Problem first, where it is seen, then the fields."""
        labels = tuple(self._modules)
        yield Status(id="captioner-problem", classes="problem")
        yield _row("Captioner", Choice(labels, labels[0], id="captioner"))
        yield Status(id="captioner-facts")
        yield _row("Model", SafeInput("", id="captioner-model"))
        yield _row("Pictures", Choice(form.WANTED, form.WANTED[0], id="captioner-wanted"))
        yield Line(id="captioner-count")
        yield Vertical(id="captioner-options")

    def on_mount(self) -> None:
        """Show the first captioner, which is the recommended one."""
        self.say_problem("")
        self.run_worker(while_open(self.screen, self._show_captioner()), exclusive=True, group="captioner")

    @property
    def module(self) -> CaptionerModule:
        """The chosen captioner."""
        return self._modules[self.query_one("#captioner", Choice).value]

    @property
    def model(self) -> str:
        """The model's folder or Hub id, "" for the captioner's own."""
        return self.query_one("#captioner-model", SafeInput).value.strip()

    def settings(self) -> dict[str, object]:
        """Return the options as they stand; raises ConfigError naming one that is not allowed."""
        return form.read_options(self.module, self._texts())

    def items(self) -> tuple[list[ImageItem], bool]:
        """Return the pictures for the captioner, and whether captions of models are made anew."""
        return form.items_for(self.captions.state.own_items(), self.query_one("#captioner-wanted", Choice).value)

    def say_problem(self, problem: str | Text) -> None:
        """Show what is wrong, or nothing."""
        shown = self.query_one("#captioner-problem", Status)
        shown.display = bool(problem)
        shown.say(problem)
        if problem:
            self.scroll_home(animate=False)

    def show_count(self) -> None:
        """Count anew which pictures would be captioned."""
        from lorasmith.engine.dataset.captioning import plan_captioning

        items, again = self.items()
        edits = self.captions.state.edited()
        self.count = len(plan_captioning(items, edits, self.module.SPEC.name, replace_machine=again).wanted)
        about = form.ABOUT_WANTED[form.WANTED.index(self.query_one("#captioner-wanted", Choice).value)]
        counted = f"{self.count:,} picture{'' if self.count == 1 else 's'}"
        line = self.query_one("#captioner-count", Line)
        line.show([(counted, "strong" if self.count else "high"), (f" · {about}", "dim")])
        self.post_message(self.Changed())

    async def _show_captioner(self) -> None:
        spec = self.module.SPEC
        text = Text()
        for line, role in form.facts_of(spec, *self._fit):
            style = self.query_one("#captioner-count", Line).role_style(role) if role else ""
            text.append(f"{safe_str(line)}\n", style)
        text.rstrip()
        self.query_one("#captioner-facts", Status).say(text)
        self.query_one("#captioner-model", SafeInput).placeholder = f"{spec.default_model}, or a folder"
        options = self.query_one("#captioner-options")
        await options.remove_children()
        await options.mount_all(_option_row(option) for option in form.options_of(self.module))
        self.show_count()

    def _texts(self) -> Mapping[str, str]:
        texts = {}
        for option in form.options_of(self.module):
            control = self.query_one(f"#option-{option.key}")
            texts[option.key] = control.value if isinstance(control, SafeInput | Choice) else option.default
        return texts

    @on(Choice.Changed, "#captioner")
    def _captioner_chosen(self, event: Choice.Changed) -> None:
        event.stop()
        self.say_problem("")
        self.run_worker(while_open(self.screen, self._show_captioner()), exclusive=True, group="captioner")

    @on(Choice.Changed, "#captioner-wanted")
    def _wanted_chosen(self, event: Choice.Changed) -> None:
        event.stop()
        self.show_count()

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.screen.focus_next()

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """Explain the field that got the focus."""
        name = (event.widget.id or "").removeprefix("option-")
        option = next((option for option in form.options_of(self.module) if option.key == name), None)
        usual = "left and right: another choice · tab: next field · ctrl+s: start"
        self.post_message(self.Explained(option.about if option is not None else usual))


def _row(label: str, control: Widget) -> Horizontal:
    return Horizontal(Static(label, classes="label", markup=False), control, classes="row")


def _option_row(option: form.Option) -> Horizontal:
    control: Widget = SafeInput(option.default, id=f"option-{option.key}")
    if option.choices:
        control = Choice(option.choices, option.default, id=f"option-{option.key}")
    return _row(option.label, control)
