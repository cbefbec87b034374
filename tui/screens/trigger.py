"""Fourth page: the word that calls the LoRA, as the base's own tokenizers read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.widgets import Input, Static

from lorasmith.tui.forms import SafeInput, Status, told
from lorasmith.tui.screens.page import WizardPage
from lorasmith.tui.text import safe_str

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.dataset.findings import Finding
    from lorasmith.engine.dataset.triggers import Word


class TriggerPage(WizardPage):
    """One word; the warnings change while it is typed."""

    PAGE = "trigger"
    AUTO_FOCUS = "#trigger"
    HELP_TEXT: ClassVar[str] = (
        "The trigger word is put once and first into every caption, and you put it into a prompt to call the LoRA. "
        "A short rare word of letters works best, such as zqx or ohwx: the base then has no meaning of its own for "
        "it.\n\n"
        "Captions should describe what may change (pose, background, light); what they leave out goes into the trigger."
    )

    def compose_body(self) -> ComposeResult:
        """The word, its tokens, and a caption with it."""
        yield Static("Trigger word", markup=False)
        yield SafeInput(
            self.wizard.draft.text("captions.trigger", self.wizard.known.advice()), id="trigger", placeholder="zqx"
        )
        yield Status(id="problem")
        yield Status(id="tokens", classes="gap")
        yield Status(id="example", classes="gap")

    def on_mount(self) -> None:
        """Load the tokenizers while the word is typed."""
        super().on_mount()
        known = self.wizard.known
        known.look_at_base()
        config = known.check_config()
        known.look("trained", (config.run, config.dataset.folder), lambda tell: _find_trained(config))
        self._look_at_words()

    def _look_at_words(self) -> None:
        if self.wizard.known.looks.get("base_model") is not None:
            self.wizard.known.look_at_words()
        self.refresh_page()

    def draft_changed(self) -> None:
        """A base that was recognised meanwhile brings its tokenizers."""
        super().draft_changed()
        if self.wizard.known.base is not None and self.wizard.known.current("words") is None:
            self._look_at_words()

    @on(Input.Changed, "#trigger")
    def _typed(self, event: Input.Changed) -> None:
        self.wizard.change("captions.trigger", event.value)

    def take_typed(self) -> None:
        """Take the word."""
        self.wizard.change("captions.trigger", self.query_one("#trigger", SafeInput).value)

    def refresh_page(self) -> None:
        """Show problems, tokens and warnings for the word as it stands."""
        trigger = self.query_one("#trigger", SafeInput).value
        problem = next((p.message for p in self.wizard.known.problems() if p.key == "captions.trigger"), "")
        shown = self.query_one("#problem", Status)
        shown.display = bool(problem)
        shown.say(f"✗ {problem}" if problem else "")
        self._show_tokens(trigger.strip())
        self._show_example(trigger)
        self.hint("Enter: accept · F1: how to choose a trigger")

    def _show_tokens(self, trigger: str) -> None:
        from lorasmith.engine.dataset.triggers import check_trigger, read_word

        look = self.wizard.known.current("words")
        tokenizers = look.value if look is not None and look.value else ()
        text = Text()
        if look is None:
            text.append("The base model is not known yet, so the word cannot be checked against its vocabulary.\n")
        elif not look.done:
            text.append(f"Checking the word against the base's vocabulary: {look.progress()}\n")
        elif look.error is not None:
            text.append_text(told(look.error)).append("\n")
        else:
            text.append_text(tokens_text([read_word(tokenizer, trigger) for tokenizer in tokenizers]))
        trained = self.wizard.known.looks.get("trained")
        others = trained.value if trained is not None and trained.value else {}
        text.append_text(findings_text(check_trigger(trigger, tokenizers, others), sure=bool(tokenizers)))
        text.rstrip()
        self.query_one("#tokens", Status).say(text if trigger else "")

    def _show_example(self, trigger: str) -> None:
        from lorasmith.engine.dataset.captions import full_prompt

        found = self.wizard.known.dataset
        if found is None or not found.pictures or not trigger.strip():
            return
        text = Text()
        text.append("The first caption with it\n", "bold")
        settings = self.wizard.known.check_config().captions.model_copy(update={"trigger": trigger})
        text.append(f"  {safe_str(full_prompt(found.pictures[0].caption, settings))}")
        self.query_one("#example", Status).say(text)


def _find_trained(config: RunConfig) -> dict[str, str]:
    """Return the triggers of other LoRAs where this run will lie."""
    from lorasmith.engine.dataset.trained_triggers import find_other_triggers

    return find_other_triggers(Path(config.run.output_folder), own=config)


def tokens_text(words: Sequence[Word]) -> Text:
    """Return how each text encoder reads the word."""
    text = Text()
    text.append("How the base reads it\n", "bold")
    for word in words:
        shown = "  ".join(safe_str(token).replace("</w>", "·") for token in word.tokens)
        count = len(word.tokens)
        text.append(f"  {shown}   ({count} token{'s' if count != 1 else ''})\n")
    return text


def findings_text(findings: Sequence[Finding], sure: bool) -> Text:
    """Return what is doubtful about the word, warnings first; praise where the base was asked (`sure`) and none is."""
    text = Text()
    for finding in sorted(findings, key=lambda finding: finding.severity != "warning"):
        mark = "!" if finding.severity == "warning" else "·"
        text.append(f"{mark} {safe_str(finding.title)} {safe_str(finding.fix)}\n")
    if sure and not findings:
        text.append("✓ A rare word: nothing else is called by it.")
    return text


PAGE_CLASS = TriggerPage
