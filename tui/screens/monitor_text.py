"""What the monitor says about a run, as text parts: pure functions of the run's state."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from pathlib import Path

from lorasmith.engine.commands import Command
from lorasmith.tui.glyphs import GlyphSet
from lorasmith.tui.state import LogLine, RunState
from lorasmith.tui.widgets.line import Part
from lorasmith.tui.widgets.plot import short_number

STAGES = {"load": "loading", "scan": "scanning", "cache": "caching", "train": "training", "finish": "finishing"}
QUIET_SECONDS = 20.0
"""A living run of another process writes its gauges every second; after this long without a word it is said."""
ASKED = {
    Command.PAUSE: "pausing after this step",
    Command.RESUME: "going on",
    Command.PARK: "parking after this step",
    Command.SAVE_NOW: "saving after this step",
    Command.PREVIEW_NOW: "preview after this step",
    Command.STOP: "stopping: saving a checkpoint",
}


def duration(seconds: float) -> str:
    """Return seconds as 0:07, 12:30 or 3:05:00, "-" where they are not known."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def speed(seconds_per_step: float) -> str:
    """Return the speed in the unit that reads well."""
    if not math.isfinite(seconds_per_step) or seconds_per_step <= 0:
        return "-"
    return f"{1 / seconds_per_step:.1f} steps/s" if seconds_per_step < 1 else f"{seconds_per_step:.2f} s/step"


def headline(
    state: RunState, asked: Command | None, charts_paused: bool, marks: GlyphSet
) -> tuple[list[Part], list[Part]]:
    """Return the first row: run, stage and device; right, what is asked, paused or over."""
    mark = f" {marks.separator} "
    stage = STAGES.get(state.stage or "", "starting") if state.ended is None else state.ended.outcome
    left: list[Part] = [(state.run or "run", "strong"), (mark + stage, "")]
    if state.device:
        left.append((mark + state.device, "dim"))
    right: list[Part] = []
    if charts_paused:
        right.append(("charts paused (space)  ", "high"))
    if state.ended is not None:
        roles = {"finished": "good", "stopped": "high", "failed": "critical"}
        right.append((state.ended.outcome.upper(), roles[state.ended.outcome]))
    elif state.stopping:
        right.append((ASKED[Command.STOP].upper(), "high"))
    elif asked is not None:
        right.append((ASKED[asked], "high"))
    elif state.stalled is not None:
        right.append(("STALLED", "critical"))
    elif state.parked is not None:
        right.append(("PARKED - p brings it back", "high"))
    elif state.pause_reason:
        right.append(("WAITING - p tries again", "critical"))
    elif state.paused:
        right.append(("PAUSED - p goes on", "high"))
    return left, right


def is_answered(asked: Command, state: RunState, after: LogLine | None) -> bool:
    """Tell whether the run did what was `asked`, or said something since the log line `after` that tells why not."""
    done = {
        Command.PAUSE: state.paused,
        Command.RESUME: not state.paused,
        Command.PARK: state.parked is not None,
        Command.STOP: state.stopping,
    }
    since = list(itertools.takewhile(lambda line: line is not after, reversed(state.logs)))
    commands = [line.message for line in since if line.message.startswith("Command at")]
    # Saving and previews are told by the log as they happen; the word goes when the engine took the command up.
    took_up = any(message.endswith(asked.replace("_", " ")) for message in commands)
    # Another terminal may have asked for something else by now.
    overtaken = took_up and not commands[0].endswith(asked.replace("_", " "))
    return overtaken or any(line.severity != "info" for line in since) or done.get(asked, took_up)


def attached_words(source: object) -> list[Part]:
    """Return how this monitor stands to a run of another process, and since when that has been silent, if it has."""
    quiet = float(getattr(source, "quiet_seconds", 0.0))
    parts: list[Part] = [("attached  " if getattr(source, "in_control", False) else "watching only  ", "dim")]
    if quiet > QUIET_SECONDS:
        parts.append((f"NO SIGN OF LIFE for {duration(quiet // 10 * 10)}  ", "critical"))
    return parts


def notice_rows(state: RunState, problem: str = "") -> list[list[Part]]:
    """Return what needs a person's eye while the run goes on, most urgent first; `problem` is the monitor's own."""
    rows: list[list[Part]] = []
    if state.stalled is not None:
        since = clock(state.stalled.time - state.stalled.seconds)
        where = (
            f"No sign of life since {since}, in {state.stalled.where}. All stacks: {short_path(state.stalled.stacks)}"
        )
        rows.append([("Stalled: ", "critical"), (where, "")])
    if state.parked is not None:
        words = f"{state.parked.freed_gib:.1f} GiB of the card are free for other programs; the model waits in memory."
        if state.parked.freed_gib < 0.05:
            words = "there was nothing on a card; it simply waits."
        rows.append([(f"Parked at step {state.parked.step}: ", "high"), (words, "")])
    elif state.pause_reason:
        rows.append([("Waiting: ", "critical"), (state.pause_reason, "")])
    if problem:
        rows.append([(problem, "high")])
    return rows


def clock(moment: float) -> str:
    """Return the local time of day."""
    return time.strftime("%H:%M:%S", time.localtime(moment))


def progress_line(state: RunState, now: float, width: int, marks: GlyphSet) -> tuple[list[Part], list[Part]]:
    """Return the second row: how far the run or its present stage is, and at what speed."""
    if state.stage in (None, "load", "scan", "cache") and state.ended is None:
        return _stage_progress(state, now, width, marks)
    right = f"{speed(state.seconds_per_step)}   ETA {duration(state.eta_seconds)}"
    if state.ended is not None:
        right = f"took {duration(state.ended.time - state.started_at)}"
    words = f"Step {state.step}/{state.total_steps} "
    return _with_bar(words, state.fraction, right, width, marks)


def _stage_progress(state: RunState, now: float, width: int, marks: GlyphSet) -> tuple[list[Part], list[Part]]:
    elapsed = duration(max(0.0, now - state.stage_since)) if state.stage_since else "0:00"
    label = state.stage_label or "Starting the engine"
    progress = state.progress
    if progress is None or not progress.total:
        return [(label, "")], [(f"{elapsed} so far", "dim")]
    words = f"{progress.label or label} {progress.done}/{progress.total} "
    left = f"   ETA {duration(progress.seconds_left)}" if progress.seconds_left else ""
    return _with_bar(words, progress.done / progress.total, f"{elapsed} so far{left}", width, marks)


def _with_bar(words: str, fraction: float, right: str, width: int, marks: GlyphSet) -> tuple[list[Part], list[Part]]:
    percent = f" {100 * fraction:.0f} %"
    room = min(60, width - len(words) - len(percent) - len(right) - 3)
    parts: list[Part] = [(words, "strong")]
    if room >= 5:
        full = round(room * fraction)
        parts += [(marks.bar_full * full, "bar"), (marks.bar_empty * (room - full), "dim")]
    return [*parts, (percent, "")], [(right, "")]


def numbers_line(state: RunState, smoothed: str, width: int, marks: GlyphSet) -> list[Part]:
    """Return the third row: loss, learning rate, gradient, epoch, newest checkpoint; before the loss, the dataset."""
    if not len(state.losses):
        if state.dataset is None:
            return []
        data = state.dataset
        buckets = ", ".join(f"{count} of {size}" for size, count in list(data.buckets.items())[:4])
        return [
            (
                f"{data.images} pictures ({buckets}), {data.refused} refused, {data.steps_per_epoch} steps an epoch",
                "dim",
            )
        ]
    mark = f" {marks.separator} "
    last = float(state.losses.values[-1])
    parts: list[Part] = [("loss ", "dim"), (short_number(last) if math.isfinite(last) else "not finite", "strong")]
    invalid = state.num_invalid_losses
    if invalid:
        parts += [(mark, "dim"), (f"{invalid} not finite", "critical")]
    if state.memory_reduced:
        parts += [(mark, "dim"), ("memory reduced", "high")]
    wide = width >= 100
    facts = [
        ("smoothed", smoothed),
        ("learning rate" if wide else "lr", _rate(state.learning_rate)),
        ("epoch", str(state.epoch)),
        ("checkpoint" if wide else "saved", f"step {state.checkpoints[-1].step}" if state.checkpoints else "none yet"),
        ("gradient" if wide else "grad", _rate(state.grad_norm)),
    ]
    for name, value in facts:
        if sum(len(text) for text, _ in parts) + len(mark) + len(name) + 1 + len(value) > width:
            break
        parts += [(f"{mark}{name} ", "dim"), (value, "")]
    return parts


def _rate(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")


def summary_rows(state: RunState, *, watching: bool = False, sudden_end: str = "") -> list[list[Part]]:
    """Return what to know when the run is over: how it ended, where the LoRA and the previews are, what to do next.

    `watching` says that the run belongs to another process, which then also measures the demo's trigger; `sudden_end`
    is what is known of a process that died without a word.
    """
    ended = state.ended
    measured = not watching and is_measured_next(state)
    then = " Then the demo's trigger is measured (about 20 s)." if measured else ""
    leave: list[Part] = [(f"Enter or q leaves.{then}", "strong" if then else "dim")]
    if ended is None:
        at = f"Interrupted at step {state.step} of {state.total_steps}: " if state.total_steps else "Interrupted: "
        why = (
            sudden_end
            or "its process ended without a word (killed, no memory, no power?); run.log in its folder may say why."
        )
        return [[(at, "critical"), (why, "")], *_next_rows(state), leave]
    role = {"finished": "good", "stopped": "high", "failed": "critical"}[ended.outcome]
    rows: list[list[Part]] = [[(f"{ended.outcome.capitalize()}: ", role), (ended.message, "strong")]]
    rows += [[(text, "")] for text in (ended.why, ended.fix) if text]
    rows += [[("LoRA      ", "dim"), (short_path(item.path), "strong")] for item in state.exports]
    sheet = preview_sheet(state)
    if sheet:
        rows.append([("Previews  ", "dim"), (short_path(sheet), "")])
    return [*rows, *_next_rows(state), leave]


def _next_rows(state: RunState) -> list[list[Part]]:
    return [[("Next      ", "dim"), (text, "")] for text in next_steps(state)]


def short_path(path: str) -> str:
    """Return `path` as it is reached from the working folder where it lies inside, else whole."""
    with contextlib.suppress(OSError, ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def is_measured_next(state: RunState) -> bool:
    """Whether leaving this run's monitor goes on with measuring the trigger: a finished demo."""
    if state.ended is None or state.ended.outcome != "finished":
        return False
    from lorasmith.engine.demo_run import is_demo

    model, pictures = (state.config.get(name, {}) for name in ("base", "dataset"))
    return is_demo(str(model.get("model", "")), str(pictures.get("folder", "")))


def preview_sheet(state: RunState) -> str:
    """Return the sheet of all previews where one was written, else the folder of the previews, "" without previews."""
    if not state.previews:
        return ""
    folder = Path(state.previews[-1].path).parent
    for path in (folder / "sheet.png", folder.parent / "previews.png", folder / "index.html"):
        if path.exists():
            return str(path)
    return str(folder)


def run_folder(state: RunState) -> str:
    """Return the run's folder as its results tell it, "" before there are any."""
    paths = [item.path for item in state.checkpoints] + [item.path for item in state.previews]
    for path in paths:
        for parent in Path(path).parents:
            if parent.name in ("checkpoints", "previews"):
                return str(parent.parent)
    return ""


def _where_to_copy(programs: set[str]) -> str:
    places = {"ComfyUI": "models/loras", "Forge": "models/Lora", "A1111": "models/Lora"}
    known = [f"{folder} ({program})" for program, folder in places.items() if program in programs]
    if known:
        return f"Copy the LoRA to {' or '.join(known)}."
    if "diffusers" in programs:
        return "Load the LoRA with load_lora_weights (diffusers)."
    return "Copy the LoRA to where your program looks for LoRAs."


def next_steps(state: RunState) -> list[str]:
    """Return what the user can do now, one sentence each."""
    ended = state.ended
    steps = []
    if state.exports:
        trigger = str(state.config.get("captions", {}).get("trigger", ""))
        steps.append(_where_to_copy({program for item in state.exports for program in item.programs}))
        if trigger:
            steps.append(f'Write "{trigger}" in the prompt.')
    if (ended is None or ended.outcome != "finished") and state.checkpoints:
        steps.append(
            f"Go on from step {state.checkpoints[-1].step}: lorasmith train --resume {short_path(run_folder(state))}"
        )
    return steps
