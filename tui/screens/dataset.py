"""Third page: the pictures, what is used and what is not, and the prompts as they reach the text encoder."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Input, Static

from lorasmith.tui.fields import label_of
from lorasmith.tui.forms import Choice, SafeInput, Status, told
from lorasmith.tui.screens.page import WizardPage
from lorasmith.tui.text import safe_str

if TYPE_CHECKING:
    from lorasmith.engine.dataset.buckets import BucketPlan
    from lorasmith.tui.findings import FoundDataset

MAX_REFUSALS = 200
NUM_PROMPTS = 3
FOLDERS = {"folder": "dataset.folder", "regularization": "dataset.regularization_folder"}


class DatasetPage(WizardPage):
    """Two folders; Enter on a new one scans it and shows the result before going on."""

    PAGE = "dataset"
    AUTO_FOCUS = "#folder"
    HELP_TEXT: ClassVar[str] = (
        "The folder with your pictures and, beside each, its caption in a .txt or .caption file of the same name. "
        "12 to 40 good pictures are plenty for one subject. The folder is only read, never written to.\n\n"
        "Sub-folders named 10_name repeat their pictures ten times.\n"
        "Regularization pictures (optional) show the same kind of thing without your subject; they keep the LoRA from "
        "changing prompts without the trigger."
    )

    def compose_body(self) -> ComposeResult:
        """Folders, the question about captions, and what was found."""
        merged = self.wizard.draft
        for name, key in FOLDERS.items():
            yield Static(f"{label_of(key)}{' (optional)' if name == 'regularization' else ''}", markup=False)
            yield SafeInput(merged.text(key, self.wizard.known.advice()), id=name, placeholder="/path/to/folder")
        with Vertical(id="captions"):
            yield Static("", id="captions-question", markup=False)
            yield Choice(("ask", "trigger", "exclude"), merged.text("dataset.missing_captions"), id="captions-choice")
        yield Status(id="found", classes="gap")

    def on_mount(self) -> None:
        """Show what is known; the demo's own pictures are scanned right away."""
        super().on_mount()
        self.wizard.known.look_at_base()
        self.wizard.known.look_at_dataset()
        self.refresh_page()

    @on(Input.Changed)
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

    def reveal(self, key: str) -> None:
        """Move to the folder or the question that a problem is about."""
        names = {path: f"#{name}" for name, path in FOLDERS.items()} | {"dataset.missing_captions": "#captions-choice"}
        if key in names:
            self.query_one(names[key]).focus()

    def take_typed(self) -> None:
        """Take both folders."""
        for name, key in FOLDERS.items():
            self.wizard.change(key, self.query_one(f"#{name}", SafeInput).value)

    def accept(self) -> bool:
        """Scan a new folder first; a scanned one goes on."""
        known = self.wizard.known.current("dataset")
        if known is not None and known.error is None:
            return True
        look = self.wizard.known.look_at_dataset(again=known is not None and known.done)
        self.refresh_page()
        if look is None:
            self.hint("Type the folder's path first; the step list (s) goes on without.")
        return False

    def refresh_page(self) -> None:
        """Show the scan, or how far it is."""
        look = self.wizard.known.current("dataset")
        found = self.query_one("#found", Status)
        captions = self.query_one("#captions")
        captions.display = look is not None and look.value is not None and bool(look.value.captionless)
        self.hint("Enter: scan, then go on · Page Up and Down: scroll")
        if look is None:
            found.say("Press Enter to look at the pictures.")
        elif not look.done:
            found.say(look.progress())
        elif look.error is not None:
            found.say(told(look.error))
        else:
            self._show(look.value, found)

    def _show(self, dataset: FoundDataset, found: Status) -> None:
        missing = dataset.captionless
        if missing:
            names = ", ".join(item.relative for item in missing[:4]) + ("…" if len(missing) > 4 else "")
            question = (
                f"! {len(missing)} without a caption: {names}\n"
                "ask: stop the start · trigger: the word alone · exclude: leave them out"
            )
            self.query_one("#captions-question", Static).update(Text(safe_str(question, lines=True)))
        text = dataset_text(dataset)
        plan = self.wizard.known.plan()
        if plan is not None:
            text.append_text(buckets_text(plan))
        trigger = str(self.wizard.draft.value("captions.trigger", self.wizard.known.advice()))
        text.append_text(prompts_text(dataset, trigger))
        text.append_text(refusals_text(dataset))
        found.say(text)

    def help_for_focus(self) -> tuple[str, str]:
        """Explain the page; its fields are few."""
        return "Dataset", self.HELP_TEXT


def dataset_text(found: FoundDataset) -> Text:
    """Return the counts: found = used + not used, captions, regularization, notes about pictures."""
    dataset, pictures = found.dataset, found.pictures
    text = Text()
    text.append("✓ ")
    regular = len(dataset.items) - len(pictures)
    also = f" and {regular} regularization pictures" if regular else ""
    text.append(f"{len(pictures)} pictures{also}", "bold")
    text.append(f" · {len(dataset.refused)} of {dataset.found} files not used\n")
    text.append(f"  Captions: {len(dataset.items) - len(found.captionless)} found, {len(found.captionless)} missing\n")
    notes = Counter(note for item in dataset.items for note in item.notes)
    for note, count in notes.most_common(5):
        text.append(f"  {count}× {safe_str(note)}\n", "dim")
    return text


def buckets_text(plan: BucketPlan) -> Text:
    """Return the bucket table: size, pictures, what is cut off at most, and the most enlargement."""
    text = Text()
    text.append("\nSize          pictures  cut off at most  enlarged at most\n", "bold")
    for name, count in plan.counts().items():
        samples = [sample for sample in plan.samples if str(sample.bucket) == name]
        crop = max(sample.crop_loss for sample in samples)
        scale = max(sample.scale for sample in samples)
        enlarged = f"{scale:.2f}×" if scale > 1 else "–"
        text.append(f"{name.replace('x', ' × '):<12}{count:>10}{crop:>17.1%}{enlarged:>18}\n")
    return text


def prompts_text(found: FoundDataset, trigger: str) -> Text:
    """Return the first prompts exactly as they reach the text encoder."""
    from lorasmith.engine.dataset.captions import compose

    text = Text()
    text.append("\nPrompts as the text encoder reads them\n", "bold")
    for item in found.pictures[:NUM_PROMPTS]:
        text.append(f"  {safe_str(compose(item.caption, trigger))}\n")
        text.append(f"    {safe_str(item.relative)}\n", "dim")
    regular = next((item for item in found.dataset.items if item.regularization), None)
    if regular is not None:
        text.append(f"  {safe_str(compose(regular.caption, trigger, True))}\n")
        text.append(f"    {safe_str(regular.relative)} (regularization)\n", "dim")
    return text


def refusals_text(found: FoundDataset) -> Text:
    """Return every file that is not used, with its reason."""
    refused = found.dataset.refused
    text = Text()
    if refused:
        text.append(f"\nNot used ({len(refused)})\n", "bold")
    for refusal in refused[:MAX_REFUSALS]:
        text.append(f"  {safe_str(refusal.relative)}: {safe_str(refusal.reason)}\n")
    if len(refused) > MAX_REFUSALS:
        text.append(f"  … and {len(refused) - MAX_REFUSALS} more; `lorasmith check` lists all\n")
    text.rstrip()
    return text


PAGE_CLASS = DatasetPage
