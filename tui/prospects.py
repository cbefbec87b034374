"""What this machine's card can train: every usual base model with the plan that fits it best. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from lorasmith.tui.text import safe_str

if TYPE_CHECKING:
    from lorasmith.engine.hardware import HardwareSnapshot

MARKS = {"fits": "✓", "tight": "!", "no": "✗"}
_WORDS = {"fits": "fits", "tight": "tight", "no": "too large"}


@dataclass(frozen=True)
class Prospect:
    """One size of a base model on this card; `hub` is its id on the Hub, `hours` the usual length of a run in words."""

    family: str
    hub: str
    label: str
    verdict: str
    peak_gib: float
    hours: str
    words: str

    @property
    def mark(self) -> str:
        """The verdict as one character."""
        return MARKS.get(self.verdict, " ")

    def describe(self) -> str:
        """Return verdict, memory and time in a few words."""
        if self.verdict == "no":
            return f"{_WORDS['no']}, needs {self.peak_gib:.1f} GiB"
        return f"{_WORDS[self.verdict]} {self.peak_gib:.1f} GiB, {self.hours}"


def find_prospects(snapshot: HardwareSnapshot, tell: Any) -> list[Prospect]:
    """Return every usual base model with its plan on this machine's card, the smallest first; [] without a card."""
    from lorasmith.engine.costs import hours_words
    from lorasmith.engine.fit.tiers import plans_for
    from lorasmith.tui.card import card_of

    card = card_of(snapshot, "auto", "", {})
    if card is None:
        return []
    found = []
    for plan in plans_for(card.room, round(card.gpu.total_gib or card.room.vram_gib)):
        if plan.fit is None:
            continue
        hours = f"about {hours_words(plan.fit.time.seconds * plan.steps)}"
        peak = plan.fit.forecast.peak.total
        found.append(Prospect(plan.family, plan.hub, plan.label, plan.fit.verdict, peak, hours, plan.reason))
    return found


def of_hub_id(prospects: list[Prospect], hub_id: str, family: str) -> Prospect | None:
    """Return the prospect of a model on the Hub: its own, or that of its family where that has one size only."""
    own = next((prospect for prospect in prospects if prospect.hub == hub_id), None)
    kin = [prospect for prospect in prospects if prospect.family == family]
    return own or (kin[0] if len(kin) == 1 else None)


def prospects_text(prospects: list[Prospect]) -> Text:
    """Return the base models by verdict, one row each; those that fit first."""
    text = Text()
    for verdict, words in (("fits", "trains"), ("tight", "just about trains"), ("no", "cannot train")):
        names = [prospect.label for prospect in prospects if prospect.verdict == verdict]
        if names:
            text.append(f"{MARKS[verdict]} {words}: ", "bold")
            text.append(f"{safe_str(', '.join(names))}\n")
    text.rstrip()
    return text
