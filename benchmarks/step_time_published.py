"""Estimated seconds of a step against those that others published, without anything fitted to a model.

    python -m benchmarks.step_time_published

Other trainers launch more kernels than lorasmith (autocast, a synchronization each step) or fewer (compiled blocks), so
a point counts as met where it lies in the stated range; the ratio of the usual estimate is printed beside it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from lorasmith.engine.config import RunConfig
from lorasmith.engine.families import families
from lorasmith.engine.memory import ModelMemory, model_memories
from lorasmith.engine.memory.forecast import Subject
from lorasmith.engine.step_time import card_speed, step_seconds

SIMPLETUNER = "SimpleTuner's table"
QLORA = "Hugging Face, flux-qlora"
UNSLOTH = "Unsloth's table"


@dataclass(frozen=True)
class Point:
    """A published time: which model by the number of its weights in billions, on which card, with which settings."""

    family: str
    billions: float
    card: str
    width: int
    height: int
    seconds: float
    source: str
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


CHECKPOINTED = {"train": {"gradient_checkpointing": True}}
BATCH_3 = {"train": {"batch_size": 3}, "adapter": {"rank": 128, "alpha": 128.0}}
NF4 = {"memory": {"quantize": "nf4"}, "train": {"gradient_checkpointing": True}}
H100 = "H100 80GB HBM3"
POINTS = (
    Point("sd15", 0.86, H100, 512, 512, 0.181, SIMPLETUNER),
    Point("sd15", 0.86, H100, 512, 512, 0.305, SIMPLETUNER, CHECKPOINTED),
    Point("sdxl", 2.57, H100, 1024, 1024, 0.606, SIMPLETUNER),
    Point("sdxl", 2.57, "L40S", 1024, 1024, 0.585, SIMPLETUNER),
    Point("sdxl", 2.57, H100, 1024, 1024, 1.080, SIMPLETUNER, CHECKPOINTED),
    Point("sd35", 2.24, H100, 1024, 1024, 0.529, SIMPLETUNER, BATCH_3),
    Point("z_image", 6.15, H100, 512, 512, 0.243, SIMPLETUNER),
    Point("z_image", 6.15, H100, 512, 512, 0.479, SIMPLETUNER, CHECKPOINTED),
    Point("qwen_image", 20.4, H100, 1024, 1024, 1.202, SIMPLETUNER, CHECKPOINTED),
    Point("chroma", 8.9, H100, 512, 512, 0.454, SIMPLETUNER),
    Point("chroma", 8.9, H100, 512, 512, 1.276, SIMPLETUNER, CHECKPOINTED),
    Point("flux1", 11.9, "GeForce RTX 4090", 512, 768, 41 * 60 / 700 / 4, QLORA, NF4),
    Point("flux1", 11.9, "Tesla T4", 512, 768, 4 * 3600 / 700 / 4, QLORA, NF4),
    Point("flux1", 11.9, "B200", 512, 512, 1 / 1.81, UNSLOTH, NF4),
    Point("flux1", 11.9, "B200", 512, 512, 1 / 4.12, UNSLOTH, CHECKPOINTED),
    Point("z_image", 6.15, "B200", 768, 768, 1 / 6.38, UNSLOTH, CHECKPOINTED),
)
"""SimpleTuner: its own sweep; Hugging Face: 700 optimizer steps of four pictures in 41 minutes, on a T4 about 4 hours;
Unsloth: bf16 with compiled blocks, which launch fewer kernels than are assumed here, and NF4."""


def main() -> None:
    """Print each point with its estimate, and the root mean square of the logarithms' errors."""
    errors, met = [], 0
    for point in POINTS:
        model = _model(point)
        if model is None:
            print(f"{point.family:10} {point.billions} B: not derived")
            continue
        subject = Subject(
            RunConfig.model_validate(point.settings),
            families()[point.family].SPEC,
            model,
            point.width * point.height / 1e6,
        )
        time = step_seconds(subject, card_speed(point.card))
        ratio = time.seconds / point.seconds
        inside = time.low <= point.seconds <= time.high
        errors.append(math.log(ratio))
        met += inside
        kept = "again" if point.settings.get("train", {}).get("gradient_checkpointing") else ""
        print(
            f"{point.family:10} {point.card:18} {point.width}x{point.height} {kept:5} published {point.seconds:6.3f}"
            f"  estimate {time.seconds:6.3f} ({time.low:.3f} to {time.high:.3f})  x{ratio:.2f}"
            f"  {'in range' if inside else 'OUTSIDE'}  {point.source}"
        )
    if errors:
        rms = math.sqrt(sum(error**2 for error in errors) / len(errors))
        print(f"{met} of {len(errors)} in range; off by a factor of {math.exp(rms):.2f} (rms of the logarithms)")


def _model(point: Point) -> ModelMemory | None:
    sizes = model_memories(point.family)
    nearest = min(sizes, key=lambda model: abs(model.parameters / 1e9 - point.billions), default=None)
    return nearest if nearest is not None and abs(nearest.parameters / 1e9 / point.billions - 1) < 0.1 else None


if __name__ == "__main__":
    main()
