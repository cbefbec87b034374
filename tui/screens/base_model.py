"""Second page: which base model, and what it turns out to be."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.widgets import Input, OptionList, Static

from lorasmith.tui.draft import DEMO
from lorasmith.tui.fields import SEPARATOR
from lorasmith.tui.forms import SafeInput, Status, told
from lorasmith.tui.prospects import of_hub_id
from lorasmith.tui.screens.page import WizardPage
from lorasmith.tui.text import safe_str
from lorasmith.tui.widgets.forecast import Forecast

if TYPE_CHECKING:
    from lorasmith.tui.findings import FoundBase

CHOICES = {
    "demo": "Demo: comes along, trains in minutes on a CPU",
    "hub": "Hugging Face Hub: owner/name",
    "local": "Folder or .safetensors file on this machine",
}
_PLACEHOLDERS = {"hub": "owner/name, or choose below", "local": "/path/to/model.safetensors"}
PARTS = {
    "base.vae": ("vae", "VAE file", "/path/to/ae.safetensors"),
    "base.text_encoders": (
        "encoders",
        "Text encoders",
        f"/path/to/clip_l.safetensors {SEPARATOR} /path/to/t5xxl.safetensors",
    ),
}
"""The inputs for parts that a file lacks: id, label and example by setting."""


class BaseModelPage(WizardPage):
    """A choice of three; what was typed for one stays when another is chosen.

    For the Hub the usual models are listed; for a file that lacks parts there are fields for those.
    """

    PAGE = "base_model"
    AUTO_FOCUS = "#choice"
    HELP_TEXT: ClassVar[str] = (
        "The base model is what the LoRA is trained for; it works with that base and its relatives only.\n\n"
        "Hub: the id as on huggingface.co, e.g. stable-diffusion-v1-5/stable-diffusion-v1-5. It is downloaded once. "
        "For a gated model accept its license on its page and run `hf auth login` first.\n"
        "Local: a diffusers folder (with model_index.json) or one .safetensors file. One that holds the denoiser alone "
        "needs its VAE and its text encoders from files of their own: two fields for them appear then."
    )

    def compose_head(self) -> ComposeResult:
        """What a run on the recognised base takes."""
        yield Forecast(id="forecast")

    def compose_body(self) -> ComposeResult:
        """The choice, the id or path, and what was found."""
        yield OptionList(*CHOICES.values(), id="choice", compact=True, markup=False)
        yield Static("", id="model-label", classes="gap", markup=False)
        yield SafeInput("", id="model")
        yield OptionList(id="usual", compact=True, markup=False)
        for name, label, example in PARTS.values():
            yield Static(label, id=f"{name}-label", classes="gap", markup=False)
            yield SafeInput("", id=name, placeholder=example)
        yield Status(id="found", classes="gap")

    def on_mount(self) -> None:
        """Choose what the draft says; the demo is looked at right away, since that costs nothing."""
        draft = self.wizard.draft
        chosen = draft.kept.get("choice") or self._guess()
        draft.kept["choice"] = chosen
        if chosen != DEMO:
            draft.kept.setdefault(chosen, str(draft.answers.get("base.model", "")))
        self.query_one("#choice", OptionList).highlighted = list(CHOICES).index(chosen)
        self._usual: list[str] = []
        self._usual_lines: list[str] = []
        self._show_usual()
        for key, (name, _, _) in PARTS.items():
            with self.prevent(Input.Changed):
                self.query_one(f"#{name}", SafeInput).value = draft.text(key)
        self._show_choice()
        super().on_mount()
        if draft.is_demo or self.wizard.known.looks.get("base_model") is not None:
            self.wizard.known.look_at_base()

    def _show_usual(self) -> None:
        """List the usual models, each with what this card makes of it once that is worked out."""
        prospects = self.wizard.known.prospects
        lines = []
        for model, family, label in (usual := usual_models()):
            found = of_hub_id(prospects, model, family)
            words = f" · {found.describe()}" if found is not None else ""
            mark = f"{found.mark} " if found is not None else ""
            lines.append(f"{mark}{model}  {label}{words}")
        if lines == self._usual_lines:
            return
        self._usual, self._usual_lines = [model for model, _, _ in usual], lines
        listed = self.query_one("#usual", OptionList)
        highlighted = listed.highlighted
        listed.clear_options()
        listed.add_options(Text(line, no_wrap=True, overflow="ellipsis") for line in lines)
        listed.highlighted = highlighted

    def _guess(self) -> str:
        model = str(self.wizard.draft.answers.get("base.model", ""))
        return DEMO if model in ("", DEMO) else "local" if model.startswith((".", "/", "~")) else "hub"

    @property
    def chosen(self) -> str:
        """The name of the current choice."""
        return self.wizard.draft.kept.get("choice", DEMO)

    def _show_choice(self) -> None:
        typed = self.chosen != DEMO
        model = self.query_one("#model", SafeInput)
        label = self.query_one("#model-label", Static)
        model.display = label.display = typed
        self.query_one("#usual", OptionList).display = self.chosen == "hub"
        self._show_parts()
        if typed:
            label.update("Hub id" if self.chosen == "hub" else "Folder or file")
            model.placeholder = _PLACEHOLDERS[self.chosen]
            with self.prevent(Input.Changed):
                model.value = self.wizard.draft.kept.get(self.chosen, "")

    @on(OptionList.OptionHighlighted, "#choice")
    def _choice_moved(self, event: OptionList.OptionHighlighted) -> None:
        # What is highlighted now: the list tells its first line too while the page is made.
        now = self.query_one("#choice", OptionList).highlighted
        name = list(CHOICES)[event.option_index if now is None else now]
        if name == self.chosen:
            return
        kept = self.wizard.draft.kept
        kept["choice"] = name
        self.wizard.change("base.model", DEMO if name == DEMO else kept.get(name, ""))
        self._show_choice()
        if name == DEMO:
            self.wizard.known.look_at_base()
        self.refresh_page()

    @on(OptionList.OptionSelected, "#choice")
    def _choice_taken(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        if self.chosen == DEMO:
            self.action_next()
        else:
            self.query_one("#model", SafeInput).focus()

    def _show_parts(self) -> None:
        """Ask for parts where the file lacks some, and while a file is named for one."""
        look = self.wizard.known.current("base_model")
        missing = look.value.identity.parts_missing if look is not None and look.value is not None else ()
        for key, (name, _, _) in PARTS.items():
            part = "vae" if key == "base.vae" else "text_encoder"
            wanted = any(item.startswith(part) for item in missing) or self.wizard.draft.changed(key)
            shown = self.chosen == "local" and wanted
            self.query_one(f"#{name}", SafeInput).display = self.query_one(f"#{name}-label", Static).display = shown

    @on(OptionList.OptionSelected, "#usual")
    def _usual_taken(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        model = self.query_one("#model", SafeInput)
        model.value = self._usual[event.option_index]
        model.focus()

    @on(Input.Changed, "#vae, #encoders")
    def _part_typed(self, event: Input.Changed) -> None:
        self._take_part(str(event.input.id), event.value)

    def _take_part(self, name: str, text: str) -> None:
        key = next(key for key, part in PARTS.items() if part[0] == name)
        if text.strip():
            self.wizard.change(key, text)
        elif self.wizard.draft.changed(key):
            self.wizard.draft.reset(key)
            self.wizard.changed()

    @on(Input.Changed, "#model")
    def _typed(self, event: Input.Changed) -> None:
        self._take_model(event.value)

    def take_typed(self) -> None:
        """Take the id or path."""
        if self.chosen != DEMO:
            self._take_model(self.query_one("#model", SafeInput).value)
        for name, _, _ in PARTS.values():
            field = self.query_one(f"#{name}", SafeInput)
            if field.display:
                self._take_part(name, field.value)

    def _take_model(self, model: str) -> None:
        self.wizard.draft.kept[self.chosen] = model
        self.wizard.change("base.model", model)

    def accept(self) -> bool:
        """Look at a new id or path first; a recognised base, or a second Enter, goes on."""
        known = self.wizard.known.current("base_model")
        if known is None and self._asks_before_download():
            self.refresh_page()
            return False
        look = self.wizard.known.look_at_base(again=True)
        self.refresh_page()
        if look is None:
            self.hint("Type an id or a path first; n or the step list goes on without.")
            return False
        return self.chosen == DEMO or (known is not None and known is look)

    def _asks_before_download(self) -> bool:
        """Look at what would be downloaded first; once that is shown, the next Enter downloads it."""
        known = self.wizard.known
        told = known.current("download")
        if self.chosen == DEMO or (told is not None and told.done and told.error is None):
            return False
        return known.look_at_download() is not None

    def refresh_page(self) -> None:
        """Show what the base turned out to be."""
        look = self.wizard.known.current("base_model")
        found = self.query_one("#found", Status)
        if look is None:
            self._show_download(found)
        elif not look.done:
            found.say(look.progress())
        elif look.error is not None:
            found.say(told(look.error))
        else:
            found.say(base_text(look.value))
        self._show_parts()
        self._show_usual()
        fitting = self.wizard.known.fitting
        recognized = look is not None and look.value is not None and self.chosen != DEMO
        self.query_one(Forecast).show(
            fitting.estimate() if recognized else None, fitting.plan() if recognized else None
        )
        self.hint("Up and down: choose · Enter: accept")

    def _show_download(self, found: Status) -> None:
        download = self.wizard.known.current("download")
        if self.chosen == DEMO:
            found.say("")
        elif download is None:
            found.say("Press Enter to look at it.")
        elif not download.done:
            found.say("Asking the Hub how large it is …")
        elif download.error is not None:
            found.say(told(download.error))
        else:
            found.say(f"{download.value}\nEnter downloads it." if download.value else "It is on this machine already.")


def usual_models() -> list[tuple[str, str, str]]:
    """Return the Hub ids of every family with the family's name, label and usual size, the smallest first."""
    from lorasmith.engine.families import families

    specs = sorted((module.SPEC for module in families().values()), key=lambda spec: spec.denoiser_parameters)
    return [
        (model, spec.name, f"{spec.label}, {spec.denoiser_parameters / 1e9:.1f} B")
        for spec in specs
        for model in spec.hub_ids
    ]


def base_text(found: FoundBase) -> Text:
    """Return label, license and its consequence, native resolution, what to know of it, and what is missing."""
    spec, identity = found.family.SPEC, found.identity
    demo = found.files.origin == DEMO
    text = Text("✓ ")
    text.append("The demo's own small base" if demo else safe_str(identity.label), "bold")
    text.append(f"\n  {safe_str(identity.label)}" if demo else "")
    if warning := identity.details.get("warning"):
        text.append(f"\n! {safe_str(warning)}")
    if identity.parts_missing:
        text.append(f"\n! Missing in these files: {safe_str(', '.join(identity.parts_missing))}")
    text.append(f"\n  Trained at {identity.native_resolution} pixels · {identity.parameters / 1e6:,.1f} M parameters\n")
    if demo:
        text.append("  Trained from nothing, on drawn scenes only\n")
    if own := identity.details.get("license"):
        card = " (from the model card)" if own == found.files.license() else ""
        text.append(f"  License: {safe_str(own)}{card}\n")
    else:
        text.append(f"  License: {safe_str(spec.license.name)}. {safe_str(spec.license.consequence)}\n")
        text.append(f"  {safe_str(spec.license.url)}\n", "dim")
    limits = ", ".join(f"{name} {tokens}" for name, tokens in spec.token_limits.items())
    text.append(f"  Reads prompts up to this many tokens: {safe_str(limits)}\n" if limits else "")
    if use := spec.uses.get(identity.variant):
        text.append(f"  {safe_str(use)}\n")
    if not demo:
        text.append(f"  {safe_str(found.files.path)}", "dim")
    text.rstrip()
    return text


PAGE_CLASS = BaseModelPage
