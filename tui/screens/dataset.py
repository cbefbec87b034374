"""Third page: the pictures, what is used and what is not, what was found, and the prompts as the encoder reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Button, Input, Static

from lorasmith.tui.actions import Place, bindings
from lorasmith.tui.fields import choices_of, help_of, label_of
from lorasmith.tui.forms import Choice, SafeInput, SettingField, Status, field_id, told
from lorasmith.tui.screens import dataset_text as say
from lorasmith.tui.screens.page import WizardPage
from lorasmith.tui.widgets.gallery import Gallery
from lorasmith.tui.widgets.picture import can_draw_pictures

if TYPE_CHECKING:
    from lorasmith.tui.findings import FoundDataset, Look

FOLDERS = {"folder": "dataset.folder", "regularization": "dataset.regularization_folder"}
MORE = (
    "dataset.more_folders",
    "dataset.weights",
    "dataset.masks",
    "dataset.alpha_background",
    "dataset.overlay",
)
"""Settings of the page that few people need; they are shown on request."""
STRIP_PICTURES = 60


class DatasetPage(WizardPage):
    """Two folders; Enter on a new one scans it and shows the result before going on."""

    PAGE = "dataset"
    AUTO_FOCUS = "#folder"
    CSS_PATH = Path(__file__).with_name("dataset.tcss")
    PLACES: ClassVar[tuple[Place, ...]] = ("app", "page", "dataset")
    BINDINGS: ClassVar[list[BindingType]] = [*bindings("dataset")]
    HELP_TEXT: ClassVar[str] = (
        "The folder with your pictures and, beside each, its caption in a .txt or .caption file of the same name. "
        "12 to 40 good pictures are plenty for one subject. The folder is only read, never written to; a ZIP archive "
        "or a Kohya dataset file (.toml) does as well.\n\n"
        "Sub-folders named 10_name repeat their pictures ten times.\n"
        "Regularization pictures (optional) show the same kind of thing without your subject; they keep the LoRA from "
        "changing prompts without the trigger.\n\n"
        "Every picture is opened and checked here. Findings lists what is wrong and what to do about it, the gallery "
        "shows all pictures, and captions can be edited; edits are kept beside the draft, not in your folder."
    )

    def compose_body(self) -> ComposeResult:
        """Folders, the question about captions, and what was found."""
        draft, advice = self.wizard.draft, self.wizard.known.advice()
        for name, key in FOLDERS.items():
            yield Static(f"{label_of(key)}{' (optional)' if name == 'regularization' else ''}", markup=False)
            yield SafeInput(draft.text(key, advice), id=name, placeholder="/path/to/folder")
        with Vertical(id="captions"):
            yield Static("", id="captions-question", markup=False)
            key = "dataset.missing_captions"
            yield Choice(choices_of(key), draft.text(key, advice), id="captions-choice")
        yield Status(id="found", classes="gap")
        with Horizontal(id="closer"):
            yield Button("Findings (f)", id="open-findings", compact=True)
            yield Button("Gallery (g)", id="open-gallery", compact=True)
            yield Button("Captions (c)", id="open-captions", compact=True)
        yield Gallery(id="strip")
        yield Status(id="findings", classes="gap")
        yield Status(id="details", classes="gap")
        yield Vertical(id="more")

    def compose_buttons(self) -> ComposeResult:
        """The toggle and Next."""
        yield Button("More settings (m)", id="more-settings", compact=True)
        yield from super().compose_buttons()

    def on_mount(self) -> None:
        """Show what is known; the demo's own pictures are scanned right away."""
        super().on_mount()
        self.wizard.known.look_at_base()
        self.wizard.known.look_at_dataset()
        self.refresh_page()
        if self.wizard.draft.kept.get("more_settings"):
            self.run_worker(self._show_more())

    def on_screen_resume(self) -> None:
        """Look at the dataset again where a screen over this one changed its captions."""
        if self.ready and self.wizard.known.shown_dataset is not None:
            self.wizard.known.look_again()
            self.refresh_page()

    # Typing

    @on(Input.Changed, "#folder, #regularization")
    def _typed(self, event: Input.Changed) -> None:
        self.wizard.change(FOLDERS[str(event.input.id)], event.value)

    @on(Input.Blurred)
    def _left(self) -> None:
        self.wizard.known.look_at_dataset()
        if self.is_current:
            self.refresh_page()

    @on(Choice.Changed, "#captions-choice")
    def _captions_decided(self, event: Choice.Changed) -> None:
        self.wizard.change("dataset.missing_captions", event.value)

    @on(SettingField.Changed)
    def _setting_changed(self, event: SettingField.Changed) -> None:
        self.wizard.change(event.key, event.text)
        if self.query_one(f"#{field_id(event.key)}", SettingField).query(Choice):
            self.wizard.known.look_at_dataset()

    def reveal(self, key: str) -> None:
        """Move to the folder, the question or the setting that a problem is about."""
        names = {path: f"#{name}" for name, path in FOLDERS.items()} | {"dataset.missing_captions": "#captions-choice"}
        if key in names:
            self.query_one(names[key]).focus()
        elif key in MORE:
            self.run_worker(self._reveal(key))

    async def _reveal(self, key: str) -> None:
        await self._show_more()
        self.query_one(f"#{field_id(key)}", SettingField).control.focus()

    def take_typed(self) -> None:
        """Take every text field."""
        for name, key in FOLDERS.items():
            self.wizard.change(key, self.query_one(f"#{name}", SafeInput).value)
        for field in self.query(SettingField):
            if isinstance(field.control, SafeInput):
                self.wizard.change(field.key, field.control.value)

    def accept(self) -> bool:
        """Scan a new folder first; a scanned one goes on."""
        known = self.wizard.known.current("dataset")
        if known is not None and known.error is None:
            return True
        look = self.wizard.known.look_at_dataset(again=known is not None and known.done)
        self.refresh_page()
        if look is None:
            self.hint("Type the folder's path first; the step list (s) goes on without.")
        else:
            self._leave_text_field(look)
        return False

    def _leave_text_field(self, look: Look) -> None:
        """Move on to Next, so that the letters of the page work; what a field was typed for is done."""
        if isinstance(self.focused, SafeInput) and look.error is None:
            self.query_one("#next").focus(scroll_visible=False)

    # Opening what lies over the page

    def action_findings(self) -> None:
        """Show each finding with its pictures."""
        from lorasmith.tui.screens.dataset_findings import FindingsScreen

        if self._scanned():
            self.app.push_screen(FindingsScreen())

    def action_gallery(self) -> None:
        """Show all pictures."""
        from lorasmith.tui.screens.dataset_gallery import GalleryScreen

        if self._scanned():
            self.app.push_screen(GalleryScreen())

    def action_captions(self) -> None:
        """Edit the captions."""
        from lorasmith.tui.screens.dataset_sheet import open_captions

        found = self._scanned()
        if found is not None:
            open_captions(self.wizard, found)

    def _scanned(self) -> FoundDataset | None:
        found = self.wizard.known.shown_dataset
        if found is None:
            self.hint("The pictures must be looked at first: type their folder and press Enter.")
        return found

    async def action_more_settings(self) -> None:
        """Show the settings that few people need, or put them away."""
        if self.wizard.draft.kept.pop("more_settings", None):
            await self.query_one("#more").remove_children()
        else:
            await self._show_more()
            self.query(SettingField).first().control.focus()
        self.wizard.touch()

    async def _show_more(self) -> None:
        self.wizard.draft.kept["more_settings"] = "yes"
        if not self.query(SettingField):
            advice = self.wizard.known.advice()
            fields = [SettingField(key, self.wizard.draft.text(key, advice)) for key in MORE]
            await self.query_one("#more").mount(Static("More settings", classes="gap", markup=False), *fields)
        self.refresh_page()

    @on(Button.Pressed)
    async def _pressed(self, event: Button.Pressed) -> None:
        opens = {"open-findings": "findings", "open-gallery": "gallery", "open-captions": "captions"}
        if event.button.id in opens:
            event.stop()
            await self.run_action(opens[event.button.id])
        elif event.button.id == "more-settings":
            event.stop()
            await self.action_more_settings()

    @on(Gallery.Opened, "#strip")
    def _picture_opened(self) -> None:
        self.action_gallery()

    # Showing

    def refresh_page(self) -> None:
        """Show the scan, or how far it is."""
        known = self.wizard.known
        look, dataset = known.current("dataset"), known.shown_dataset
        captions = self.query_one("#captions")
        captions.display = dataset is not None and bool(dataset.captionless)
        self.hint(self._usual_hint(dataset is not None))
        self._show_fields()
        self._show_state(look, dataset)
        shown = dataset is not None and (look is None or look.error is None)
        for name in ("#findings", "#closer", "#details"):
            self.query_one(name).display = shown
        strip = self.query_one("#strip", Gallery)
        strip.display = shown and can_draw_pictures() and self.has_class("-tall")
        if dataset is not None and shown:
            self._show(dataset, strip)

    def _show_state(self, look: Look | None, dataset: FoundDataset | None) -> None:
        found = self.query_one("#found", Status)
        if look is None:
            found.say("Press Enter to look at the pictures.")
        elif look.error is not None:
            found.say(told(look.error))
        elif dataset is None:
            found.say(look.progress())
        else:
            text = say.dataset_text(dataset)
            found.say(text if look.done else text.append(f"\n  {look.progress()}"))

    def _show(self, dataset: FoundDataset, strip: Gallery) -> None:
        from lorasmith.tui.screens.dataset_sheet import tiles_of

        known = self.wizard.known
        known.look_at_base()
        known.look_at_words()
        known.look_at_checks()
        look, checked = known.looks.get("checks"), known.shown_checks
        if dataset.captionless:
            self.query_one("#captions-question", Static).update(say.missing_text(dataset.captionless))
        strip.show(tiles_of(dataset.pictures[:STRIP_PICTURES], checked))
        findings, details = self.query_one("#findings", Status), self.query_one("#details", Status)
        if look is not None and look.error is not None:
            findings.say(told(look.error))
        elif checked is None:
            findings.say(look.progress() if look is not None else "")
        else:
            findings.say(say.findings_text(checked.findings))
        details.say(say.details_text(dataset, checked) if checked is not None else say.refusals_text(dataset))

    def _usual_hint(self, scanned: bool) -> str:
        node = self.focused
        field = next((parent for parent in node.ancestors if isinstance(parent, SettingField)), None) if node else None
        if field is not None:
            return f"{label_of(field.key)}: {help_of(field.key)}"
        if not scanned:
            return "Enter: scan, then go on · Page Up and Down: scroll"
        tab = "tab, then " if isinstance(node, SafeInput) else ""
        return f"Enter: next · {tab}f findings, g gallery, c captions"

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """Explain what got the focus."""
        if self.ready:
            self.hint(self._usual_hint(self.wizard.known.shown_dataset is not None))

    def _show_fields(self) -> None:
        draft, advice = self.wizard.draft, self.wizard.known.advice()
        fields = list(self.query(SettingField))
        if not fields:
            return
        merged = draft.merged(advice)
        problems = {problem.key: problem.message for problem in self.wizard.known.problems()}
        for field in fields:
            origin = "wizard" if draft.changed(field.key) else merged[field.key][1]
            field.tell(origin, "", problems.get(field.key, ""))


PAGE_CLASS = DatasetPage
