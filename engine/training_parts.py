"""What the parts of a running training share: where it writes, what it learns from, what learns, and who listens."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorasmith.engine.config import RunConfig
from lorasmith.engine.controls import Controls, Host, RunPaths
from lorasmith.engine.events import Event
from lorasmith.engine.learner import Learner
from lorasmith.engine.out_of_memory import Rungs
from lorasmith.engine.run_setup import Material
from lorasmith.engine.step_meter import StepMeter
from lorasmith.engine.training_adapter import TrainingAdapter

if TYPE_CHECKING:
    from lorasmith.engine.parking import Parking


@dataclass
class TrainingParts:
    """One training in memory; `controls.step` counts finished steps, `started` is in seconds since the epoch.

    `rungs` are what the run has done so far to need less memory; `training_adapter` is what a distilled base has beside
    it while it is trained.
    """

    run: RunPaths
    config: RunConfig
    host: Host
    controls: Controls
    learner: Learner
    material: Material
    rungs: Rungs = field(default_factory=Rungs)
    training_adapter: TrainingAdapter | None = None
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.meter = StepMeter(self.learner, self.material.plan, self.host.emit)
        self.parking: Parking | None = None

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.controls.step

    def emit(self, event: Event) -> None:
        """Tell `event` to whoever runs the training."""
        self.host.emit(event)
