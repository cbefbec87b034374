"""Which part of pictures is learnt: transparency that nobody decided about, masks that are missing, black or white."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.findings import Action, CheckContext, Finding, counted
from lorasmith.engine.dataset.items import Dataset, ImageItem

BLACK, WHITE = 0.005, 0.995
"""A mask darker or whiter than this is so all over, but for specks."""


def check_masks(dataset: Dataset, context: CheckContext) -> list[Finding]:
    """Return what is to be said of masks and transparent pictures."""
    learnt = [item for item in dataset.items if not item.regularization]
    return [finding for check in _CHECKS if (finding := check(learnt, context.config)) is not None]


def _black(learnt: Sequence[ImageItem], config: RunConfig) -> Finding | None:
    black = tuple(item.relative for item in learnt if item.mask_share is not None and item.mask_share < BLACK)
    if not black:
        return None
    weight = config.objective.unmasked_weight
    return Finding(
        "masks-black",
        "warning",
        f"{counted(len(black), 'mask is', 'masks are')} black all over: nothing of the picture is to be learnt.",
        "Such pictures take their share of the steps and teach nothing."
        if weight == 0
        else f"All of such a picture counts only {weight:g} times as much as what is white in others.",
        "White is what is learnt: draw the mask again, or leave the picture out.",
        files=black,
        action=Action(f"Leave {counted(len(black), 'picture', 'pictures')} out", exclude=black)
        if len(black) < len(learnt)
        else None,
    )


def _white(learnt: Sequence[ImageItem], config: RunConfig) -> Finding | None:
    white = tuple(item.relative for item in learnt if item.mask_share is not None and item.mask_share > WHITE)
    if not white:
        return None
    return Finding(
        "masks-white",
        "note",
        f"{counted(len(white), 'mask is', 'masks are')} white all over, and changes nothing.",
        "The whole picture is learnt, background included.",
        "Paint black what is not to be learnt, or remove the mask.",
        files=white,
    )


def _missing(learnt: Sequence[ImageItem], config: RunConfig) -> Finding | None:
    alpha = config.dataset.masks == "alpha"
    without = tuple(i.relative for i in learnt if i.mask_path is None and not (alpha and i.transparent))
    if not without or len(without) == len(learnt):
        return None
    return Finding(
        "masks-missing",
        "note",
        f"{counted(len(without), 'picture has', 'pictures have')} no mask, {len(learnt) - len(without)} have one.",
        "Pictures without a mask are learnt whole, background included.",
        "Add the missing masks if the background is not to be learnt, or set dataset.masks to off.",
        files=without,
    )


def _transparent(learnt: Sequence[ImageItem], config: RunConfig) -> Finding | None:
    settings = config.dataset
    transparent = tuple(item.relative for item in learnt if item.transparent)
    # White is the default: whoever chose another background, or masks, has decided.
    if not transparent or settings.masks == "alpha" or settings.alpha_background != "white":
        return None
    return Finding(
        "transparent",
        "note",
        f"{counted(len(transparent), 'picture is', 'pictures are')} partly transparent; white shows through.",
        "One background behind every picture is learnt with the concept.",
        "Keep white, or set dataset.alpha_background to checker (another board for each picture), or dataset.masks to "
        "alpha (only what is opaque is learnt).",
        files=transparent,
        action=Action("Learn only what is opaque", settings={"dataset.masks": "alpha"}),
    )


_CHECKS: tuple[Callable[[Sequence[ImageItem], RunConfig], Finding | None], ...] = (
    _black,
    _transparent,
    _missing,
    _white,
)
