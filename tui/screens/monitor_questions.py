"""What the monitor asks before it changes a running training, or leaves it."""

from __future__ import annotations

from lorasmith.tui.screens.ask import Answer, AskScreen
from lorasmith.tui.state import RunState

STOP, PARK, LEAVE = "stop", "park", "leave"


def ask_stop(state: RunState) -> AskScreen:
    """Return the question before a run is stopped; its answer is STOP or ""."""
    return AskScreen(
        f"Stop at step {state.step} of {state.total_steps}?",
        "A checkpoint is saved first; the run can be resumed from it exactly.",
        (Answer("y", "Stop and save", STOP), Answer("n", "Keep going", "")),
    )


def ask_park(state: RunState) -> AskScreen:
    """Return the question before a run is parked; its answer is PARK or ""."""
    detail = [
        "A checkpoint is saved, then everything moves off the card into this machine's memory, so that another program"
        " can use the card. p brings it back, and training goes on exactly as if nothing had happened.",
        *_memory(state),
    ]
    return AskScreen(
        f"Park at step {state.step} of {state.total_steps}?",
        "\n".join(detail),
        (Answer("y", "Park", PARK), Answer("n", "Keep going", "")),
    )


def ask_quit(attach: str) -> AskScreen:
    """Return the question of a monitor whose own process trains; its answer is STOP, LEAVE or "".

    `attach` is the command that shows the run again, "" where that is not known.
    """
    again = f" {attach} shows it again, here or in another terminal." if attach else ""
    detail = [
        "Stopping saves a checkpoint first; the run can be resumed from it exactly. Quitting waits for it.",
        "Leaving the screen ends neither the training nor this command: plain lines follow, the shell is free when the"
        f" run is over, and closing the terminal is safe.{again}",
    ]
    return AskScreen(
        "Training goes on. What shall become of it?",
        "\n".join(detail),
        (
            Answer("y", "Stop, save, quit", STOP),
            Answer("l", "Leave the screen", LEAVE),
            Answer("n", "Keep going", ""),
        ),
    )


def _memory(state: RunState) -> list[str]:
    sample = state.hardware
    if sample is None or sample.vram_used_gib is None:
        return []
    free = max(0.0, sample.ram_total_gib - sample.ram_used_gib)
    return [f"In use on the card now: {sample.vram_used_gib:.1f} GiB; free memory of this machine: {free:.1f} GiB."]
