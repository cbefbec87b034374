"""What the wizard finds out by looking: the machine, the base model, the pictures, the words. Runs in worker threads.

No screen and no torch here; engine modules are imported when a look needs them, so that the first page paints first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import ConfigError, LorasmithError
from lorasmith.tui.card import find_fit
from lorasmith.tui.checks import Checked, find_checks
from lorasmith.tui.prospects import Prospect, find_prospects
from lorasmith.tui.run_jobs import FoundRun, find_runs, resume_session

if TYPE_CHECKING:
    from lorasmith.engine.advisor import Advice
    from lorasmith.engine.config import DatasetSettings
    from lorasmith.engine.dataset.items import Dataset, ImageItem
    from lorasmith.engine.dataset.overlay import Edit
    from lorasmith.engine.families import BaseIdentity, FamilyModule
    from lorasmith.engine.fit import Fit
    from lorasmith.engine.hardware import HardwareSnapshot
    from lorasmith.engine.memory.of_run import Stored
    from lorasmith.engine.plan import Plan
    from lorasmith.engine.run_file import ResolvedConfig
    from lorasmith.engine.sources import BaseFiles
    from lorasmith.tui.draft import Draft
    from lorasmith.tui.measuring import Measuring

Tell = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is (0: unknown)."""

_MEGA = 1_000_000
_ETA_AFTER_SECONDS = 1.0

USUAL_PICTURES = 20
"""Assumed for the advice until the pictures are counted."""

HEAVY_IMPORTS = threading.Lock()
"""Held while torch or transformers is imported: two threads inside the same half-imported package can fail."""


@dataclass(frozen=True)
class FoundBase:
    """A located and recognised base model."""

    files: BaseFiles
    family: FamilyModule
    identity: BaseIdentity
    stored: Stored | None = None
    """The denoiser as the headers tell it; None: they are read when they are needed."""


@dataclass(frozen=True)
class FoundDataset:
    """A scanned dataset with its regularization pictures; `edits` is what its overlay held then."""

    dataset: Dataset
    edits: Mapping[str, Edit] = field(default_factory=dict)

    @cached_property
    def pictures(self) -> list[ImageItem]:
        """The accepted training pictures, regularization pictures left out."""
        return [item for item in self.dataset.items if not item.regularization]

    @cached_property
    def captionless(self) -> list[ImageItem]:
        """The accepted pictures without a caption."""
        from lorasmith.engine.dataset.scan import missing_captions

        return list(missing_captions(self.dataset))


@dataclass
class Look:
    """One look: what was looked at (`key`), and its result once `done`.

    `before` is what the look before it found about the same thing, the first part of the key.
    """

    key: tuple[Any, ...]
    started: float = field(default_factory=time.monotonic)
    before: Any = None
    value: Any = None
    error: LorasmithError | None = None
    done: bool = False
    label: str = ""
    count: int = 0
    total: int = 0
    stage_started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> int:
        """Whole seconds since the look began."""
        return int(time.monotonic() - self.started)

    def tell(self, label: str, count: int, total: int) -> None:
        """Note how far the look is; safe from any thread, read by the screen once a second."""
        if label != self.label:
            self.stage_started = time.monotonic()
        self.label, self.count, self.total = label, count, total
        time.sleep(50e-6)  # lets the screen's thread in during long Python loops

    def progress(self) -> str:
        """Return how far the look is and how long it will take, in words; holds foreign text."""
        share = ""
        if self.total >= _MEGA:
            share = f" {self.count / _MEGA:,.0f} of {self.total / _MEGA:,.0f} MB"
        elif self.total:
            share = f" {self.count:,} of {self.total:,}"
        left = remaining(time.monotonic() - self.stage_started, self.count, self.total)
        return f"{self.label or 'looking'}{share} · {self.seconds} s{f' · {left}' if left else ''}"


def remaining(seconds: float, count: int, total: int) -> str:
    """Return in words how long the rest takes after `count` of `total` took `seconds`; "" while that is a guess."""
    if seconds < _ETA_AFTER_SECONDS or not 0 < count < total:
        return ""
    left = seconds / count * (total - count)
    if left < 60:
        return f"about {max(1, round(left))} s left"
    minutes = round(left / 60)
    return f"about {minutes} min left" if minutes < 90 else f"about {left / 3600:.1f} h left"


def find_hardware(tell: Tell) -> Any:
    """Return the machine's snapshot, with the disk where runs go."""
    from lorasmith.engine.hardware import snapshot

    return snapshot([Path.cwd()])


def find_download(model: str, revision: str, tell: Tell) -> str:
    """Return in words what of a model on the Hub is to be downloaded, part by part; "" where nothing is."""
    from lorasmith.engine.hub import describe_download, list_download
    from lorasmith.engine.sources import hub_file, is_hub_id

    repo, file = (model, "") if is_hub_id(model) else hub_file(model) or ("", "")
    return describe_download(list_download(repo, revision, file)) if repo else ""


def find_base(
    model: str, revision: str, family: str, vae: str, text_encoders: tuple[str, ...], tell: Tell
) -> FoundBase:
    """Locate and recognise a base model and the parts given apart; raises BaseModelError or HubError."""
    from lorasmith.engine.config import BaseSettings
    from lorasmith.engine.families import identify_base
    from lorasmith.engine.memory.of_run import stored_weights
    from lorasmith.engine.sources import locate_configured

    settings = BaseSettings(model=model, revision=revision, vae=vae, text_encoders=list(text_encoders))
    files = locate_configured(settings, tell)
    module, identity = identify_base(files, family)
    return FoundBase(files, module, identity, stored_weights(files))


def find_dataset(settings: DatasetSettings, tell: Tell) -> FoundDataset:
    """Scan the folders, and read the edits that count beside them; raises DatasetError."""
    from lorasmith.engine.dataset.overlay import read_overlay
    from lorasmith.engine.dataset.scan import scan_dataset

    overlay = settings.overlay.strip()
    edits = read_overlay(Path(overlay).expanduser()) if overlay else {}
    return FoundDataset(scan_dataset(settings, lambda done, total: tell("opening pictures", done, total)), edits)


def find_tokenizers(base: FoundBase, tell: Tell) -> list[Any]:
    """Load the base's own tokenizers; takes seconds the first time, since transformers is imported."""
    tell("waiting for the libraries", 0, 0)
    with HEAVY_IMPORTS:
        tell("loading the tokenizers", 0, 0)
        return list(base.family.load_tokenizers(base.files))


def start_session(resolved: ResolvedConfig, tell: Tell) -> Any:
    """Make the run folder and start its engine thread; raises LorasmithError."""
    from lorasmith.engine.preflight import require_ready, require_usable
    from lorasmith.engine.session import Session, create_run

    require_ready(resolved.config)
    tell("trying what the settings need", 0, 0)
    require_usable(resolved.config)
    tell("loading PyTorch", 0, 0)
    with HEAVY_IMPORTS:
        pass  # the engine thread imports the same packages
    tell("making the run folder", 0, 0)
    session = Session(create_run(resolved), resolved.config)
    session.start()
    return session


def queue_run(resolved: ResolvedConfig) -> str:
    """Make the run folder, put the run at the end of the queue, and return how it goes on, in words."""
    from lorasmith.engine.preflight import require_ready, require_usable
    from lorasmith.engine.run_folder import create_run
    from lorasmith.engine.run_queue import RunQueue, entry_state

    require_ready(resolved.config)
    require_usable(resolved.config)
    queue = RunQueue()
    queue.add(create_run(resolved))
    waiting = sum(entry_state(entry).status == "waiting" for entry in queue.entries())
    words = "1 run waits" if waiting == 1 else f"{waiting} runs wait"
    if queue.work.holder() is None:
        return f"{words}. Start with: lorasmith queue run"
    return f"{words}; its worker takes them in turn."


def recommend(
    draft: Draft, hardware: HardwareSnapshot | None, base: FoundBase | None, dataset: FoundDataset | None
) -> list[Advice]:
    """Return the advised values for what is known so far.

    Nothing while the base is unknown; for the demo, the values of its own preset.
    """
    from lorasmith.engine import advisor

    if draft.is_demo:
        return advisor.demo_advice()
    if base is None:
        return []
    family = base.identity.family
    try:
        goal = goal_of(draft, family)
        pictures = len(dataset.pictures) if dataset is not None else USUAL_PICTURES
        return advisor.recommend(family, goal, pictures, base.identity.native_resolution, _vram_gib(hardware))
    except ConfigError:
        return []


def goal_of(draft: Draft, family: str) -> str:
    """Return the goal that the user chose, or the family's usual one."""
    known = _goals(family)
    chosen = draft.kept.get("goal", "")
    return chosen if chosen in known else next(iter(known), "")


@cache
def _goals(family: str) -> tuple[str, ...]:
    from lorasmith.engine.advisor import goals

    return goals(family)


def _vram_gib(hardware: HardwareSnapshot | None) -> float | None:
    gpus = hardware.gpus if hardware is not None else ()
    return max((gpu.total_gib for gpu in gpus if gpu.total_gib is not None), default=None)


def start_measuring(run_file: str) -> Measuring:
    """Return the rehearsal of a run file, not begun yet."""
    from lorasmith.tui.measuring import Measuring

    return Measuring(run_file)


def find_unusable(machine: HardwareSnapshot, try_now: bool, tell: Tell) -> dict[tuple[str, Any], str] | None:
    """Return the choices that do not work on this machine, each with its reason; None where nobody has tried yet.

    With `try_now` they are tried then, in a process of their own, which takes some seconds.
    """
    from lorasmith.engine.doctor import remembered_checks, retry, unusable_choices
    from lorasmith.engine.doctor.trials import TRIALS

    checks = remembered_checks(machine)
    if not checks and try_now:
        tell("trying what this installation can do", 0, 0)
        checks = retry(list(TRIALS))
    return unusable_choices(checks) if checks else None


def find_plan(resolved: ResolvedConfig, base: FoundBase | None, dataset: FoundDataset | None, tell: Tell) -> Plan:
    """Return what the run will do: steps, disk, memory, warnings."""
    from lorasmith.engine.plan import build_plan

    known = (base.identity, base.files) if base is not None else (None, None)
    return build_plan(resolved, known[0], dataset.dataset if dataset is not None else None, known[1])


@dataclass(frozen=True)
class Probes:
    """The looks that the wizard takes; tests put their own in."""

    hardware: Callable[..., Any] = find_hardware
    base: Callable[..., FoundBase] = find_base
    download: Callable[..., str] = find_download
    dataset: Callable[..., FoundDataset] = find_dataset
    checks: Callable[..., Checked] = find_checks
    tokenizers: Callable[..., list[Any]] = find_tokenizers
    start: Callable[..., Any] = start_session
    queue: Callable[[ResolvedConfig], str] = queue_run
    runs: Callable[..., list[FoundRun]] = find_runs
    resume: Callable[..., tuple[Any, Any]] = resume_session
    plan: Callable[..., Plan] = find_plan
    measure: Callable[[str], Measuring] = start_measuring
    fit: Callable[..., Fit | None] = find_fit
    prospects: Callable[..., list[Prospect]] = find_prospects
    unusable: Callable[..., dict[tuple[str, Any], str] | None] = find_unusable
