"""The plan that fits the card, and the estimate of the run as it stands, kept for each state of the draft."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

from lorasmith.tui.card import Card, CardQuestion, Estimate, card_of, estimate
from lorasmith.tui.findings import USUAL_PICTURES, Look

if TYPE_CHECKING:
    from lorasmith.engine.advisor import Advice
    from lorasmith.engine.fit import Fit
    from lorasmith.engine.foot_guns import Circumstances, FootGun
    from lorasmith.tui.known import Known


class Fitting:
    """Asks `known` for the machine, the base model and the draft; the search runs in a look's thread."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._cards: tuple[tuple[object, ...], Card | None] = ((), None)
        self._estimates: tuple[tuple[object, ...], Estimate] | None = None
        self._guns: tuple[tuple[object, ...], list[FootGun]] = ((), [])
        self._circumstances: tuple[tuple[object, ...], Circumstances | None] = ((), None)

    def card(self) -> Card | None:
        """Return the card that would train; None without one, and while the machine is looked at."""
        look, base = self._known.looks.get("hardware"), self._known.base
        if look is None or look.value is None:
            return None
        family = base.identity.family if base is not None else ""
        device = str(self._known.draft.answers.get("train.device", "auto"))
        unusable = self._known.unusable()
        key = (id(look.value), device, family, frozenset(unusable))
        if self._cards[0] != key:
            self._cards = (key, card_of(look.value, device, family, unusable))
        return self._cards[1]

    def look(self) -> Look | None:
        """Look for the plan that fits; None without a base model or a card."""
        base, card = self._known.base, self.card()
        if base is None or card is None or self._known.draft.is_demo:
            return None
        question = CardQuestion(
            self._known.unfitted.config(),
            base,
            card,
            self._pictures(),
            frozenset(self._known.draft.answers),
        )
        key = (base.files.origin, id(card), self._pictures(), self._known.unfitted.everything())
        return self._known.look("fit", key, partial(self._known.probes.fit, question))

    def plan(self) -> Fit | None:
        """Return the plan that fits, or the one before while another is searched for; None where there is none."""
        look = self.look()
        return None if look is None else cast("Fit | None", look.value if look.done else look.before)

    def caution(self) -> list[Advice]:
        """Return what is advised where a card is there and nothing could be forecast."""
        look = self.look()
        if look is None or not look.done:
            return []
        from lorasmith.engine.advisor import Advice

        why = "The memory of this base model is not known, and this saves most of it for a third of the speed."
        return [Advice("train.gradient_checkpointing", True, why, "A judgement", "fit")]

    def estimate(self) -> Estimate | None:
        """Return memory, time and money of the run as it stands; None while the machine or the base is not known."""
        base, look = self._known.base, self._known.looks.get("hardware")
        if base is None or look is None or look.value is None:
            return None
        config, card = self._known.check_config(), self.card()
        key = (id(config), id(card), id(base), self._pictures())
        if self._estimates is None or self._estimates[0] != key:
            self._estimates = (key, estimate(config, base, self._pictures(), look.value, card))
        return self._estimates[1]

    def foot_guns(self) -> list[FootGun]:
        """Return what is known to spoil a LoRA of this base with the settings as they stand, the gravest first."""
        base, config = self._known.base, self._known.check_config()
        if base is None or self._known.draft.is_demo:
            return []
        around = self._around()
        key = (id(config), id(base), id(around), self._pictures())
        if self._guns[0] != key:
            from lorasmith.engine.foot_guns import find_foot_guns

            found = find_foot_guns(config, base.family.SPEC, base.identity, self._pictures(), around=around)
            self._guns = (key, found)
        return self._guns[1]

    def _around(self) -> Circumstances | None:
        """Return how the captions are written, counted once for each scan."""
        dataset, goal = self._known.dataset, self._known.goal()
        key = (id(dataset), goal)
        if self._circumstances[0] != key:
            from lorasmith.engine.foot_guns import circumstances_of

            found = circumstances_of(dataset.dataset, goal) if dataset is not None else None
            self._circumstances = (key, found)
        return self._circumstances[1]

    def _pictures(self) -> int:
        dataset = self._known.dataset
        return len(dataset.pictures) if dataset is not None else USUAL_PICTURES
