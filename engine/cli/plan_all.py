"""`lorasmith plan --all` and `--fit`: what fits on which card, and the settings that make a run fit this one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.engine.cli.output import columns, say, say_json
from lorasmith.engine.errors import ConfigError, HardwareError

if TYPE_CHECKING:
    from lorasmith.engine.fit import Fit, Room
    from lorasmith.engine.fit.tiers import TierPlan
    from lorasmith.engine.memory.forecast import Subject
    from lorasmith.engine.run_file import ResolvedConfig
    from lorasmith.engine.step_time import StepTime

_MARKS = {"fits": "fits", "tight": "tight", "no": "no"}


def show_all(family: str, vram_gb: int | None, goal: str, *, as_json: bool) -> None:
    """Print what fits of every family, or of one, on every tier, or on one."""
    from lorasmith.engine.fit.tiers import TIERS, tier_of, tier_plans

    plans = tier_plans(family, TIERS if vram_gb is None else (tier_of(vram_gb),), goal)
    if as_json:
        say_json([plan.to_json() for plan in plans])
        return
    label = ""
    for plan in plans:
        if plan.label != label:
            label = plan.label
            say(f"{label} (goal: {plan.goal})")
        for line in columns([_row(plan)]):
            print(line)


def _row(plan: TierPlan) -> tuple[str, ...]:
    size = f"{plan.tier.vram_gb:3} GB"
    if plan.fit is None:
        return size, "?", plan.reason
    fit = plan.fit
    if fit.verdict == "no":
        return size, "no", plan.reason
    switches = "; ".join(switch.words for switch in fit.switches) or "nothing needs to be done"
    time = f"{fit.time.seconds:.2g} s a step"
    peak = f"{fit.forecast.peak.total:.1f} GiB"
    return size, f"{_MARKS[fit.verdict]:5}", f"{plan.resolution} px", f"{peak:>8}", f"{time:>13}", switches


def show_fit(resolved: ResolvedConfig, run_file: Path, *, write: bool, as_json: bool) -> None:
    """Print the settings with which a run fits this machine; with `write` put them into its file, comments kept.

    What the file says of memory is chosen anew; what it says otherwise, and all that was given by --set, stays.
    Raises HardwareError without a card or where the run fits in no way, ConfigError where its memory is not known.
    """
    from lorasmith.engine.fit import solve
    from lorasmith.engine.fit.machine import room_here, subject_of

    subject = subject_of(resolved.config)
    room = room_here(resolved.config, subject.spec.name)
    fit = solve(subject, room, _fixed(resolved))
    if as_json:
        say_json(_as_json(fit))
    else:
        _show(fit, subject, room)
    if fit.verdict == "no":
        raise HardwareError(f"This run does not fit: it {fit.reason}.", fix=f"{fit.nearest}." if fit.nearest else "")
    if write:
        _write(run_file, fit)


def _fixed(resolved: ResolvedConfig) -> frozenset[str]:
    """Return the keys that stay: those given by --set, and those of the file that are not there to make it fit."""
    given = {key for key, origin in resolved.origins.items() if origin == "--set"}
    of_file = {key for key, origin in resolved.origins.items() if origin != "default"}
    chosen = {key for key in of_file if key.startswith("memory.") or key == "train.gradient_checkpointing"}
    return frozenset(given | (of_file - chosen))


def _show(fit: Fit, subject: Subject, room: Room) -> None:
    from lorasmith.engine.costs import run_costs

    say(f"{fit.verdict}: {fit.reason}")
    for switch in fit.switches:
        say(f"  {switch.words}")
    for key, value in fit.settings.items():
        say(f"  {key} = {_toml(value)}")
    if not fit.settings:
        say("  The settings are already the best for this card.")
    if fit.nearest and fit.verdict != "no":
        say(f"  or: {fit.nearest}")
    for words in _costs(run_costs(subject.config, subject.spec.name, fit.time, room.card, subject).words):
        say(f"  {words}")


def _costs(words: tuple[str, ...]) -> list[str]:
    return [f"{line[0].upper()}{line[1:]}." for line in words]


def _as_json(fit: Fit) -> dict[str, object]:
    time: StepTime = fit.time
    return {
        "verdict": fit.verdict,
        "reason": fit.reason,
        "nearest": fit.nearest,
        "settings": dict(fit.settings),
        "switches": fit.switches,
        "seconds": {"usual": time.seconds, "low": time.low, "high": time.high, "basis": time.basis},
        "forecast": fit.forecast.to_json(),
    }


def _write(run_file: Path, fit: Fit) -> None:
    from lorasmith.engine.run_file import update_toml
    from lorasmith.engine.storage import atomic_write, read_error

    try:
        text = run_file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise read_error(run_file, error) from error
    atomic_write(run_file, update_toml(text, fit.settings).encode())
    say(f"Written to {run_file}.", to_stderr=True)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def require_run_file(run_file: Path | None) -> Path:
    """Return the run file that `--fit` works on; raises ConfigError where none was given."""
    if run_file is None:
        raise ConfigError("--fit needs the file of a run.", fix="Write: lorasmith plan --fit RUN.toml")
    return run_file
