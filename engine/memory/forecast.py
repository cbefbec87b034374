"""How much a run takes of the card, of main memory and of the disk, stage by stage and part by part. Torch-free.

Nothing is fitted to measurements: sizes follow from the numbers of weights, activations from the model's own graph
(`constants`, derived by `make derive-memory`). What the card's allocator takes beside that is the part "slack", until
measured steps on the same card replace it (`calibration`). Fast enough to be asked hundreds of times by `engine.fit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorasmith.engine.memory.card_parts import CardParts, Named
from lorasmith.engine.memory.host_parts import disk_parts, ram_parts

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.families import FamilySpec
    from lorasmith.engine.memory.constants import ModelMemory, StepMemory

Stage = Literal["load", "text encode", "image encode", "step", "preview", "save"]
SLACK_SHARE, SLACK_GIB = 0.08, 0.5
"""What torch's allocator takes beside what is asked of it, the larger of the two: `performance.md` of the design."""
_STAGES: tuple[tuple[Stage, Callable[[CardParts], Named]], ...] = (
    ("load", CardParts.load),
    ("text encode", CardParts.encode_text),
    ("image encode", CardParts.encode_images),
    ("step", CardParts.step),
    ("preview", CardParts.preview),
    ("save", CardParts.save),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that takes memory, such as `weights`; what each is, is said in `PART_WORDS`."""

    name: str
    gib: float


@dataclass(frozen=True, slots=True)
class StagePeak:
    """The most that a stage of the run takes of the card, by part; parts of nothing are left out."""

    stage: Stage
    parts: tuple[Part, ...]

    @property
    def total(self) -> float:
        """GiB of all parts."""
        return sum(part.gib for part in self.parts)

    @property
    def without_slack(self) -> float:
        """GiB of all parts but what the allocator takes beside them."""
        return sum(part.gib for part in self.parts if part.name != "slack")

    def of(self, name: str) -> float:
        """Return the GiB of the parts of this name."""
        return sum(part.gib for part in self.parts if part.name == name)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Peaks of the card by stage, and the most of main memory and disk, each by part. `basis` says what it rests on."""

    stages: tuple[StagePeak, ...]
    ram: tuple[Part, ...]
    disk: tuple[Part, ...]
    basis: str

    @property
    def peak(self) -> StagePeak:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def step(self) -> StagePeak:
        """The peak of an optimizer step."""
        return next(stage for stage in self.stages if stage.stage == "step")

    @property
    def ram_gib(self) -> float:
        """Main memory in GiB."""
        return sum(part.gib for part in self.ram)

    @property
    def disk_gib(self) -> float:
        """Disk space in GiB: what the run writes, and the cache."""
        return sum(part.gib for part in self.disk)

    def to_json(self) -> dict[str, Any]:
        """Return the forecast as JSON-ready values, sizes in GiB."""
        return {
            "stages": {stage.stage: {"total": round(stage.total, 3)} | _values(stage.parts) for stage in self.stages},
            "peak": {"stage": self.peak.stage, "gib": round(self.peak.total, 3)},
            "ram": {"total": round(self.ram_gib, 3)} | _values(self.ram),
            "disk": {"total": round(self.disk_gib, 3)} | _values(self.disk),
            "basis": self.basis,
        }


@dataclass(frozen=True)
class Subject:
    """What is forecast: a run's settings and its base model.

    `megapixels` (millions of pixels) are those of the largest bucket. `num_parameters` are the adapter's; None: those
    of every layer of the targets. `step` replaces the derived activations, where a step was simulated for these very
    settings. `calibration` is measured over forecast memory on this card, over `runs` runs; 1: not measured.
    `keeps_text` tells whether text encoders stay because there are too many prompts; None: judged from the settings.
    `training_adapter_bytes` are those of a frozen LoRA that works beside the run's own. `mapped` tells whether the base
    model's files have the format that is computed in, so that they need not be copied to be converted.
    """

    config: RunConfig
    spec: FamilySpec
    model: ModelMemory
    megapixels: float
    num_parameters: int | None = None
    step: StepMemory | None = None
    number_of_pictures: int = 20
    calibration: float = 1.0
    runs: int = 0
    keeps_text: bool | None = None
    training_adapter_bytes: int = 0
    mapped: bool = True


def forecast(subject: Subject) -> Forecast:
    """Return the forecast; ask `can_forecast` before. Raises KeyError where that gives a reason against it."""
    card = CardParts(subject)
    stages = []
    for stage, parts_of in _STAGES:
        named = parts_of(card)
        if named:
            stages.append(StagePeak(stage, _with_slack(named, subject)))
    found = tuple(stages)
    peak = max(stage.without_slack for stage in found)
    return Forecast(found, _parts(ram_parts(card, peak)), _parts(disk_parts(card)), _basis(subject))


def can_forecast(subject: Subject) -> str:
    """Return "" where `forecast` knows enough, else the reason why a step must be simulated or measured first."""
    if subject.step is not None:
        return ""
    adapter, label = subject.config.adapter, subject.model.label
    if adapter.targets not in subject.model.steps:
        return f"The layers of adapter.targets = {adapter.targets} were not counted for {label}."
    if adapter.kind != "lora" or adapter.convolutions:
        kind = "convolutions" if adapter.kind == "lora" else f"an adapter of kind {adapter.kind}"
        return f"A step with {kind} was not counted for {label}."
    if adapter.dropout or adapter.rank_dropout:
        return f"A step with dropout was not counted for {label}."
    return ""


def _with_slack(named: Named, subject: Subject) -> tuple[Part, ...]:
    total = sum(gib for _, gib in named)
    if subject.config.train.device == "cpu":
        slack = 0.0
    elif subject.calibration != 1.0:
        slack = total * (subject.calibration - 1.0)
    else:
        slack = max(SLACK_SHARE * total, SLACK_GIB)
    return (*_parts(named), Part("slack", slack)) if slack else _parts(named)


def _basis(subject: Subject) -> str:
    if subject.calibration != 1.0:
        times = f", {subject.runs} run{'' if subject.runs == 1 else 's'}" if subject.runs else ""
        return f"calibrated on this card{times}"
    if subject.step is not None:
        return "simulated: one step of this model with these settings was counted without its weights"
    adapter = subject.config.adapter
    limited = adapter.include or adapter.exclude or adapter.block_ranks
    return "derived from the model's own graph" + (", as if every layer of the targets were adapted" * bool(limited))


def _parts(named: Named) -> tuple[Part, ...]:
    return tuple([Part(name, gib) for name, gib in named if gib > 0])


def _values(parts: tuple[Part, ...]) -> dict[str, float]:
    return {part.name: round(part.gib, 3) for part in parts}
