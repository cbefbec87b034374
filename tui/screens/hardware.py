"""First page: the machine in words, and the draft of the last time."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.widgets import OptionList, Static

from lorasmith.tui.forms import Status, told
from lorasmith.tui.prospects import prospects_text
from lorasmith.tui.run_jobs import newest_interrupted
from lorasmith.tui.screens.page import WizardPage
from lorasmith.tui.text import safe_str

if TYPE_CHECKING:
    from lorasmith.engine.hardware import Gpu, HardwareSnapshot
    from lorasmith.tui.draft import Draft

RUNS_AFTER_SECONDS = 0.3


class HardwarePage(WizardPage):
    """Shows what there is to train on; with a draft on the disk, Enter goes on with it."""

    PAGE = "hardware"
    AUTO_FOCUS = "#offer, #next"
    HELP_TEXT: ClassVar[str] = (
        "What lorasmith found on this machine. The recommended settings follow from it. Without an NVIDIA GPU training "
        "runs on the CPU: fine for the demo base, too slow for real base models.\n\n"
        "`lorasmith doctor` checks the installation in more depth."
    )

    def compose_body(self) -> ComposeResult:
        """The machine, then the draft's offer."""
        yield Status(id="machine")
        yield Status(id="prospects", classes="gap")
        yield Status(id="interrupted", classes="gap")
        if self.wizard.offer is not None:
            draft, age = self.wizard.offer
            yield Static("There is a draft from the last time:", classes="gap", markup=False)
            yield OptionList(
                safe_str(f"Go on with it: {describe_draft(draft)} · {ago(age)}"),
                "Start anew with the recommended settings",
                id="offer",
                compact=True,
                markup=False,
            )

    def on_mount(self) -> None:
        """Fill the page; when it stands, look whether an earlier run waits to be resumed."""
        super().on_mount()
        self.call_after_refresh(self.set_timer, RUNS_AFTER_SECONDS, self.wizard.look_at_runs)

    def refresh_page(self) -> None:
        """Show the snapshot, or how long it takes."""
        self._show_interrupted()
        self._show_prospects()
        look = self.wizard.known.looks.get("hardware")
        machine = self.query_one("#machine", Status)
        if look is None or not look.done:
            machine.say("Looking at the machine…" + (f" {look.seconds} s" if look is not None and look.seconds else ""))
        elif look.error is not None:
            machine.say(told(look.error))
        else:
            machine.say(machine_text(look.value))
        self.hint(
            "Press Enter to begin. Enter on every page trains the demo."
            if self.wizard.draft.is_demo
            else "Press Enter."
        )

    def _show_prospects(self) -> None:
        """Say what the card can train."""
        look = self.wizard.known.looks.get("prospects")
        shown = self.query_one("#prospects", Status)
        shown.display = look is not None
        if look is None:
            return
        if not look.done:
            shown.say("Working out what this card can train …")
        elif look.error is not None:
            shown.say(told(look.error))
        else:
            shown.say(prospects_text(look.value))

    def _show_interrupted(self) -> None:
        """Offer to resume the run that was interrupted last."""
        look = self.wizard.known.looks.get("runs")
        found = newest_interrupted(look.value or []) if look is not None and look.done else None
        if found is not None:
            words = Text(f"{safe_str(found.run.name)}: {found.summary.describe()}", "bold")
            words.append(". Resume it? F7 lists the runs.", "not bold")
            self.query_one("#interrupted", Status).say(words)

    @on(OptionList.OptionSelected, "#offer")
    def _offer_taken(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        offer = self.wizard.offer
        if offer is not None and event.option_index == 0:
            self.wizard.draft = offer[0]
            self.wizard.offer = None
            if self.wizard.draft.page != self.PAGE:
                self.wizard.visit(self.wizard.draft.page)
                return
        self.wizard.offer = None
        self.action_forward()

    def accept(self) -> bool:
        """Next without a choice begins anew; the old draft is replaced at the first change."""
        self.wizard.offer = None
        return True


def machine_text(snapshot: HardwareSnapshot) -> Text:
    """Return the snapshot in words."""
    text = Text()
    for gpu in snapshot.gpus:
        text.append_text(_gpu_text(gpu))
    if not snapshot.gpus:
        text.append("No NVIDIA GPU", "bold")
        text.append(": training runs on the CPU, fine for the demo, too slow for real base models.\n")
    if snapshot.note:
        text.append(f"  {safe_str(snapshot.note)}\n", "dim")
    memory = snapshot.memory
    limited = ", limited by a container or service" if memory.limited else ""
    text.append(f"\nCPU   {snapshot.cores} cores · {safe_str(snapshot.cpu)}\n")
    text.append(f"RAM   {memory.available_gib:.1f} of {memory.total_gib:.1f} GiB free{limited}\n")
    for disk in snapshot.disks:
        if disk.free_gib is not None and disk.total_gib is not None:
            text.append(f"Disk  {disk.free_gib:.0f} of {disk.total_gib:.0f} GiB free · {safe_str(disk.path)}\n")
    if snapshot.cuda_driver is not None:
        text.append(f"CUDA  driver runs up to {snapshot.cuda_driver[0]}.{snapshot.cuda_driver[1]}\n")
    text.rstrip()
    return text


def _gpu_text(gpu: Gpu) -> Text:
    text = Text(f"GPU {gpu.index} ")
    text.append(safe_str(gpu.name), "bold")
    text.append("\n")
    if gpu.total_gib is not None and gpu.free_gib is not None:
        text.append(f"  {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB memory free")
    else:
        text.append("  memory unknown")
    if gpu.total_gib is not None:
        text.append(f" · {tier_words(gpu.total_gib)}")
    if gpu.temperature_c is not None:
        text.append(f" · {gpu.temperature_c:.0f} °C")
    if gpu.driver:
        text.append(f" · driver {safe_str(gpu.driver)}")
    text.append("\n")
    for process in gpu.processes:
        used = f"{process.used_gib:.1f} GiB" if process.used_gib is not None else "memory"
        text.append(f"  in use: {safe_str(process.name or 'a process')} ({process.pid}) holds {used}\n", "dim")
    return text


TIERS_GIB = (6, 8, 10, 12, 16, 20, 24, 32, 48, 80)
"""Sizes of graphics memory that advice is given for."""


def tier_words(total_gib: float) -> str:
    """Return the class of a card by its memory; a card's GiB are a little less than the GB on its box."""
    below = [size for size in TIERS_GIB if size <= total_gib * 1.08]
    return f"{below[-1]} GB class" if below else "less than 6 GB"


def describe_draft(draft: Draft) -> str:
    """Return a draft in a few words; holds foreign text."""
    model = str(draft.answers.get("base.model", "no base model yet"))
    folder = draft.answers.get("dataset.folder")
    return f"{model}, {folder}" if folder else model


def ago(seconds: float) -> str:
    """Return an age in words."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


PAGE_CLASS = HardwarePage
