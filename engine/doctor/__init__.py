"""Checks of the installation and the machine, each with what it means and a one-line fix, before hours are spent.

Everything is tried for real where that is possible: products of matrices, an 8-bit optimizer's step, attention forward
and backward, writing to the disk. Each check is isolated and has its time: what raises, crashes or hangs is a failed
check, and the doctor goes on. Torch-free: the checks that need torch are made in a process of their own
(`doctor.trials`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from lorasmith.engine.doctor import (
    disks,
    graphics,
    hub_access,
    installation,
    machine,
    terminals,
    tmux,
    trials,
)
from lorasmith.engine.doctor.check import Check as Check
from lorasmith.engine.doctor.check import Choice as Choice
from lorasmith.engine.doctor.check import Status as Status
from lorasmith.engine.doctor.check import isolated
from lorasmith.engine.doctor.choices import checks_behind as checks_behind
from lorasmith.engine.doctor.choices import fast_products as fast_products
from lorasmith.engine.doctor.choices import unusable_choices as unusable_choices
from lorasmith.engine.doctor.choices import why_unusable as why_unusable
from lorasmith.engine.doctor.remembered import remember as remember
from lorasmith.engine.doctor.remembered import remembered_checks as remembered_checks
from lorasmith.engine.doctor.set_aside import set_aside_broken_packages as set_aside_broken_packages
from lorasmith.engine.hardware import HardwareSnapshot, snapshot
from lorasmith.engine.run_log import quiet_libraries
from lorasmith.engine.storage import cache_folder

GROUPS: Final = {
    "Installation": ("python", "packages", "torch"),
    "Graphics card": ("gpu", "driver", "cuda", "vram"),
    "Computing": ("bf16", "fp16", "attention", "pinned memory"),
    "Savings": ("bitsandbytes", "nf4", "int8", "fp8", "int8 product", "fp8 product"),
    "Disks": ("output folder", "cache folder", "models folder"),
    "Machine": ("memory", "swap", "shared memory", "locked memory", "clock"),
    "Screen": ("locale", "terminal", "tmux"),
    "Hub": ("hub", "hub token", "gated models"),
}
"""The checks by subject, what matters most first: the order in which they are made and told."""
LOCAL_SECONDS: Final = 5.0
DISK_SECONDS: Final = 8.0
HUB_SECONDS: Final = 15.0
_ESSENTIAL: Final = ("python", "packages", "gpu", "driver", "memory", "output folder", "cache folder")
"""Checks without torch whose failure stops a training."""


class _Step(NamedTuple):
    """A check without torch, and how long it may take where that is not LOCAL_SECONDS."""

    check: Callable[[], Check]
    seconds: float | None = None


def run_checks(
    output_folder: Path | None = None,
    *,
    ask_hub: bool = False,
    on_check: Callable[[Check], None] | None = None,
    on_start: Callable[[str], None] | None = None,
) -> list[Check]:
    """Run every check in order, telling its name to `on_start` and its result to `on_check`; never raises.

    `output_folder` is where runs will be made (default: `runs` in the current folder). The Hub is only asked with
    `ask_hub`. Takes some seconds, most of them the import of torch in a child process; this process imports neither
    torch nor holds a CUDA context afterwards. What the trials found is remembered for `remembered_checks`.
    """
    quiet_libraries()
    state = snapshot()
    steps = _steps(state, output_folder or Path("runs"), ask_hub)
    start = on_start or _nothing
    wanted = [name for names in GROUPS.values() for name in names if name in steps or name in trials.TRIALS]
    found: list[Check] = []
    with closing(trials.run_trials([name for name in wanted if name in trials.TRIALS], start)) as tried:
        for name in wanted:
            if name in steps:
                start(name)
                check = _run(name, steps[name])
            else:
                check = next(tried)
            found.append(check)
            if on_check:
                on_check(check)
    remember([check for check in found if check.name in trials.TRIALS], state)
    return found


def retry(names: list[str], device: str = "auto") -> list[Check]:
    """Make the trials `names` again, at once, and remember what they find now; never raises.

    `device` is what `train.device` is set to.
    """
    with closing(trials.run_trials(names, device=device)) as tried:
        checks = list(tried)
    # What is known is known of the card, where there is one.
    if device != "cpu" or not snapshot().gpus:
        remember(checks)
    return checks


def group_of(name: str) -> str:
    """Return the subject of the check with this name."""
    return next((group for group, names in GROUPS.items() if name in names), "Other")


def _run(name: str, step: _Step) -> Check:
    check = isolated(name, step.check, step.seconds or LOCAL_SECONDS)
    if check.status != "fail":
        return check
    fix = check.fix or "Please report this: lorasmith could not run its own check."
    return replace(check, fix=fix, optional=check.optional or name not in _ESSENTIAL)


def _steps(state: HardwareSnapshot, output: Path, ask_hub: bool) -> dict[str, _Step]:
    """Return the checks that need no torch, by name."""
    steps = {
        "python": _Step(installation.check_python),
        "packages": _Step(installation.check_packages),
        "gpu": _Step(lambda: graphics.check_gpu(state)),
        "driver": _Step(lambda: graphics.check_driver(state)),
        "vram": _Step(lambda: graphics.check_vram(state)),
        "memory": _Step(lambda: machine.check_memory(state)),
        "swap": _Step(lambda: machine.check_swap(state)),
        "shared memory": _Step(machine.check_shared_memory),
        "locked memory": _Step(machine.check_locked_memory),
        "clock": _Step(machine.check_clock),
        "locale": _Step(terminals.check_locale),
        "terminal": _Step(terminals.check_terminal),
        "tmux": _Step(tmux.check_tmux),
    }
    speeds: dict[int, disks.Speed] = {}
    folders = {disks.OUTPUT: lambda: output, disks.CACHE: cache_folder, disks.MODELS: hub_access.models_folder}
    for use, folder in folders.items():
        steps[use.name] = _Step(_disk_check(use, folder, speeds), DISK_SECONDS)
    if not ask_hub:
        return steps | {"hub": _Step(lambda: Check("hub", "skip", "not asked; lorasmith doctor --hub does"))}
    return steps | {
        "hub": _Step(hub_access.check_hub, HUB_SECONDS),
        "hub token": _Step(hub_access.check_hub_token, HUB_SECONDS),
        "gated models": _Step(hub_access.check_gated_models, HUB_SECONDS),
    }


def _disk_check(use: disks.Use, folder: Callable[[], Path], speeds: dict[int, disks.Speed]) -> Callable[[], Check]:
    return lambda: disks.check_disk(use, folder(), speeds)


def _nothing(name: str) -> None:
    """Tell nobody."""


__all__ = [
    "GROUPS",
    "Check",
    "Choice",
    "Status",
    "checks_behind",
    "group_of",
    "remember",
    "remembered_checks",
    "retry",
    "run_checks",
    "set_aside_broken_packages",
    "unusable_choices",
    "why_unusable",
]
