"""Each event as one plain line for a log."""

from __future__ import annotations

from pathlib import PurePath

from lorasmith.engine import events


def describe_event(event: events.Event) -> str:
    """Return the event as one plain line for a log, or "" for what a log leaves out (steps, gauges, progress)."""
    match event:
        case events.RunStarted(resumed_from=0):
            return f"Run {event.run} started on {event.device}, {event.total_steps} steps"
        case events.RunStarted():
            return f"Run {event.run} resumed at step {event.resumed_from} of {event.total_steps} on {event.device}"
        case events.StageChanged():
            return event.label
        case events.DatasetReady():
            regular = f" ({event.regularization} of them for regularization)" if event.regularization else ""
            return f"{event.images} pictures{regular}, {event.refused} refused"
        case events.Validated():
            return f"Validation at step {event.step}: loss {event.mean:.4f} on {event.pictures} held-out pictures"
        case events.CheckpointSaved():
            return f"Checkpoint of step {event.step} saved in {event.seconds:.1f} s: {_in_run(event.path)}"
        case events.PreviewReady():
            return f"Preview of step {event.step}: {_in_run(event.path)}"
        case events.ExportDone():
            proved = f"written and proved, {event.keys} keys ({event.layout})"
            return f"LoRA of step {event.step} {proved}: {_in_run(event.path)}"
        case events.Paused():
            return f"Paused at step {event.step}" + (f": {event.reason}" if event.reason else "")
        case events.Parked():
            freed = (
                f"{event.freed_gib:.1f} GiB of the card are free" if event.freed_gib else "there was nothing on a card"
            )
            return f"Parked at step {event.step}: {freed}"
        case events.NotFinite():
            return f"The {event.what} of step {event.step} is no number; it is left out ({some_names(event.files)})"
        case events.RolledBack():
            return f"Back from step {event.given_up} to step {event.step}: {event.reason}"
        case events.MemoryReduced():
            return f"Out of memory ({event.phase}, step {event.step}): {event.change}; tried again"
        case events.Stalled():
            return f"Stalled for {event.seconds:.0f} s in {event.where}; all stacks: {_in_run(event.stacks)}"
        case events.StallEnded():
            return f"Goes on after a stall of {event.seconds:.0f} s"
        case events.Resumed():
            return f"Going on at step {event.step}"
        case events.CommandReceived():
            return f"Command at step {event.step}: {event.command.replace('_', ' ')}"
        case events.Logged():
            return event.message
        case events.RunEnded():
            return " ".join(part for part in (event.message, event.why, event.fix) if part)
    return ""


def _in_run(path: str) -> str:
    """Return a result's path inside its run folder, such as `previews/step-00000050_p0_s1.png`."""
    return "/".join(PurePath(path).parts[-2:])


def some_names(names: list[str], most: int = 3) -> str:
    """Return at most `most` names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
