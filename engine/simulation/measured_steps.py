"""What training steps of a full-size model take, by the layers that are adapted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from lorasmith.engine.adapter_layers import plan_layers, tensor_shapes
from lorasmith.engine.adapters import attach_adapter
from lorasmith.engine.adapters.injection import weight_shapes
from lorasmith.engine.block_checkpointing import checkpoint_blocks
from lorasmith.engine.config import RunConfig
from lorasmith.engine.families import Family
from lorasmith.engine.memory.constants import Law, StepLaws, StepMemory
from lorasmith.engine.simulation.measured_parts import POINTS
from lorasmith.engine.simulation.shallow import (
    PIXELS,
    SIDES,
    Counted,
    Group,
    GroupSteps,
    block_groups,
    half_of,
    law_of,
    shallow_copy,
    whole_kernels,
    whole_peaks,
)
from lorasmith.engine.simulation.step import StepPeak, StepShape, simulate_step

RANK, HIGH_RANK = 16, 64
"""The rank that laws are for, and a second one, from which they tell what a rank adds."""
Precision = Literal["fp32", "base"]
Point = tuple[int, int]
Peaks = tuple[float, float, float]
"""MiB without, with half and with full checkpointing."""


class StepCounter:
    """Counts a skeleton's steps, whole or from shallow copies, with prompts of `tokens` where they vary in length.

    Steps are those of `settings` (None: the usual run) but for what the laws are by: targets, rank, the LoRA's own
    number format and checkpointing.
    """

    def __init__(self, family: Family, tokens: int, settings: RunConfig | None = None) -> None:
        self.family, self.tokens, self.settings = family, tokens, settings
        self.groups = block_groups(family)
        self.halves, self.others = half_of(family, self.groups) if self.groups else ([], 0.0)

    def layers(self, targets: str) -> dict[str, int]:
        """Return the numbers per rank of each adapted layer by path."""
        settings = self._config(targets).adapter
        shapes = weight_shapes(self.family.denoiser)
        plans = plan_layers(shapes, self.family.spec, settings, "denoiser")
        return {
            path: sum(math.prod(shape) for shape in tensor_shapes(shapes[path], plan, settings).values()) // plan.rank
            for path, plan in plans.items()
        }

    def step_memory(self, targets: str) -> StepMemory:
        """Return the memory of steps that adapt the layers of a target preset."""
        laws = [self.step_laws(targets, precision) for precision in ("fp32", "base")]
        return StepMemory(sum(self.layers(targets).values()), *laws)

    def kernels(self, targets: str) -> tuple[int, int]:
        """Return the kernels of a step without and with full checkpointing."""
        point = POINTS[0]
        if self.groups:
            return whole_kernels(self.group_steps(targets, "fp32", RANK, [point])[point])
        none, _, full = (self.whole_steps(targets, "fp32", RANK, share, [point])[point] for share in (0.0, 0.5, 1.0))
        return none.kernels, full.kernels

    def _config(self, targets: str, precision: Precision = "fp32", rank: int = RANK) -> RunConfig:
        if self.settings is None:
            return run_config(targets, precision, rank)
        changed = {"targets": targets, "rank": rank, "alpha": float(rank)}
        adapter = self.settings.adapter.model_copy(update=changed)
        memory = self.settings.memory.model_copy(update={"lora_precision": precision})
        return self.settings.model_copy(update={"adapter": adapter, "memory": memory})

    def step_laws(self, targets: str, precision: Precision) -> StepLaws:
        """Return the laws of steps whose LoRA computes in `precision`."""
        usual = self.peaks(targets, precision, RANK, POINTS)
        higher = self.peaks(targets, precision, HIGH_RANK, POINTS[:2])
        none, half, full = (law_of({point: peaks[place] for point, peaks in usual.items()}) for place in range(3))
        more = [
            _per_rank(law, {point: (peaks[place] - usual[point][place]) for point, peaks in higher.items()})
            for law, place in ((none, 0), (full, 2))
        ]
        return StepLaws(none, half, full, *more)

    def peaks(self, targets: str, precision: Precision, rank: int, points: tuple[Point, ...]) -> dict[Point, Peaks]:
        """Return the peaks of steps with so many pictures of these sides, in MiB."""
        if self.groups:
            counted = self.group_steps(targets, precision, rank, list(points))
            return {point: whole_peaks(steps, self.others) for point, steps in counted.items()}
        shares = (0.0, 0.5, 1.0) if rank == RANK else (0.0, 1.0)
        found = [self.whole_steps(targets, precision, rank, share, list(points)) for share in shares]
        return {
            point: (found[0][point].peak_mib, found[len(found) // 2][point].peak_mib, found[-1][point].peak_mib)
            for point in points
        }

    def whole_steps(
        self, targets: str, precision: Precision, rank: int, share: float, points: list[Point]
    ) -> dict[Point, StepPeak]:
        """Return what steps of the whole model take with this share of its blocks checkpointed."""
        with shallow_copy(self.family, [], None) as copied:
            return self._simulated(copied, self._config(targets, precision, rank), share, points)

    def group_steps(
        self, targets: str, precision: Precision, rank: int, points: list[Point]
    ) -> dict[Point, list[GroupSteps]]:
        """Return what shallow copies of each group of equal blocks take."""
        config = self._config(targets, precision, rank)
        steps: dict[Point, list[GroupSteps]] = {point: [] for point in points}
        for group, half in zip(self.groups, self.halves, strict=True):
            plain, spared = (self._counted(group, config, share, points) for share in (0.0, 1.0))
            for point in points:
                steps[point].append(GroupSteps(len(group.paths), half, plain[point], spared[point]))
        return steps

    def _counted(self, group: Group, config: RunConfig, share: float, points: list[Point]) -> dict[Point, Counted]:
        peaks = []
        for depth in (1, 2):
            with shallow_copy(self.family, self.groups, group, depth) as copied:
                peaks.append(self._simulated(copied, config, share, points))
        return {point: Counted(peaks[0][point], peaks[1][point]) for point in points}

    def _simulated(self, family: Family, config: RunConfig, share: float, points: list[Point]) -> dict[Point, StepPeak]:
        adapter = attach_adapter(family, config.adapter, seed=0)
        checkpoint_blocks(family, share)
        shapes = {point: StepShape(point[0], point[1], point[1], self.tokens) for point in points}
        if config.memory.lora_precision == "base":
            adapter.compute_as_base()
        return {point: simulate_step(family, adapter, config, shape) for point, shape in shapes.items()}


def run_config(targets: str, precision: Precision = "fp32", rank: int = RANK) -> RunConfig:
    """Return the settings of a run that the counts are for; only what changes a step's memory matters."""
    values: Mapping[str, Any] = {
        "base": {"model": "reference"},
        "dataset": {"folder": "reference"},
        "adapter": {"targets": targets, "rank": rank, "alpha": float(rank)},
        "memory": {"lora_precision": precision},
    }
    return RunConfig.model_validate(values)


def _per_rank(law: Law, more: Mapping[Point, float]) -> Law:
    """Return what each rank adds, of which `more` MiB from `RANK` to `HIGH_RANK` are known for one picture by size.

    Of what does not grow with the picture, the prompt has the same share of the pixels' part as in `law`; the rest is
    fixed: weights that are rounded to the base's format.
    """
    low, high = (side**2 / PIXELS for side in SIDES)
    small, large = (more[1, side] / (HIGH_RANK - RANK) for side in SIDES)
    megapixel = (large - small) / (high - low)
    picture = megapixel * law.picture / law.megapixel
    return Law(small - picture - megapixel * low, picture, megapixel)
