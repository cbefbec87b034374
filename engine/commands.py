"""Everything that a user may ask of a running training; handled by the engine at a step boundary."""

from __future__ import annotations

from enum import StrEnum


class Command(StrEnum):
    """One request to a run."""

    PAUSE = "pause"
    RESUME = "resume"
    """Go on after a pause or out of the parking place."""
    PARK = "park"
    """Save a checkpoint, move everything off the card and wait; `RESUME` brings it back, exact to the bit."""
    SAVE_NOW = "save_now"
    PREVIEW_NOW = "preview_now"
    STOP = "stop"
    """Save a checkpoint at the current step and end; the run can be resumed."""
