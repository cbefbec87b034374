"""Waiting between two steps because the user asked for it: paused, or parked with the card free for others."""

from __future__ import annotations

from lorasmith.engine.commands import Command
from lorasmith.engine.errors import HardwareError
from lorasmith.engine.events import Logged, Parked, Paused, Resumed, Severity
from lorasmith.engine.finishing import draw
from lorasmith.engine.parking import park, unpark
from lorasmith.engine.saving import Saver
from lorasmith.engine.training_parts import TrainingParts

POLL_SECONDS = 0.1
_WHILE_PARKED = {
    Command.SAVE_NOW: "Saved already: a checkpoint of this step was written before the run was parked.",
    Command.PREVIEW_NOW: "No previews while the run is parked: the model is not on the card. Resume it first.",
    Command.PAUSE: "The run is parked already, which is a pause with the card free. Resume it to go on.",
    Command.PARK: "The run is parked already.",
}


def wait(parts: TrainingParts, saver: Saver) -> None:
    """Wait as long as the user wants training to pause or park; returns at once where neither was asked for."""
    controls = parts.controls
    if not (controls.paused or Command.PARK in controls.wanted):
        return
    parts.meter.read(parts.step)
    waited = False
    while Command.STOP not in controls.wanted:
        if Command.PARK in controls.wanted:
            controls.wanted.discard(Command.PARK)
            waited |= _stay_parked(parts, saver)
        elif controls.paused:
            if not waited:
                parts.emit(Paused(step=parts.step))
            waited = True
            _stay_paused(parts, saver)
        else:
            break
    if waited and not controls.paused:
        parts.emit(Resumed(step=parts.step))


def _stay_paused(parts: TrainingParts, saver: Saver) -> None:
    """Take up one command of the user, if one comes within a moment."""
    controls = parts.controls
    command = parts.host.wait_command(POLL_SECONDS)
    if command is None:
        return
    controls.take(command)
    if Command.SAVE_NOW in controls.wanted:
        controls.wanted.discard(Command.SAVE_NOW)
        saver.save()
    if Command.PREVIEW_NOW in controls.wanted:
        controls.wanted.discard(Command.PREVIEW_NOW)
        draw(parts)


def _stay_parked(parts: TrainingParts, saver: Saver) -> bool:
    """Save, clear the card and wait until the run is back on it or stopped; return False where that was not possible.

    A save that is refused parks nothing.
    """
    controls = parts.controls
    if not saver.save():
        if Command.STOP not in controls.wanted:
            _say(
                parts, "warning", "Not parked: its checkpoint could not be written. Free some disk space and try again."
            )
        return False
    try:
        freed = park(parts)
    except HardwareError as error:
        _say(parts, "error", str(error))
        return False
    parts.emit(Parked(step=parts.step, freed_gib=freed))
    if parts.parking is None:
        _say(parts, "info", "This run computes on the processor: there is no card to free, so it simply waits.")
    controls.paused = True
    while Command.STOP not in controls.wanted and not _is_back(parts):
        pass
    return True


def _is_back(parts: TrainingParts) -> bool:
    """Take up one command while parked; return whether the run was asked to go on and is on its card again."""
    command = parts.host.wait_command(POLL_SECONDS)
    if command is None:
        return False
    controls = parts.controls
    controls.take(command)
    controls.wanted -= _WHILE_PARKED.keys()
    if command in _WHILE_PARKED:
        _say(parts, "info", _WHILE_PARKED[command])
    if controls.paused:
        return False
    try:
        unpark(parts)
    except HardwareError as error:
        controls.paused = True
        _say(parts, "error", str(error))
        return False
    return True


def _say(parts: TrainingParts, severity: Severity, message: str) -> None:
    parts.emit(Logged(severity=severity, message=message))
