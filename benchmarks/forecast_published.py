"""The forecast against peaks that others have published: no constant is fitted to them.

    python benchmarks/forecast_published.py [--only NAME …]

The peaks are SimpleTuner's own sweep on an H100 with a base in bf16 and a LoRA in fp32 under autocast, which
`autocast.Autocast` stands for (lorasmith computes without). Each forecast is weights + LoRA with its gradients and
AdamW's state + what one step was counted to take on the meta device. No CUDA context is in `forecast`: the published
peaks seem to be the allocator's (see README.md, which says that this was decided after seeing the errors).
`rms_with_context_percent` is with 0.5 GiB for it, as first planned. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from typing import Any

from autocast import Autocast
from facts import facts

CONTEXT_GIB = 0.5
"""What a process on a card takes before its first tensor."""
ADAPTER_BYTES = 16
"""Bytes of each trained number in fp32: itself, its gradient and AdamW's two averages."""


@dataclass(frozen=True)
class Point:
    """A published peak in GiB without and with checkpointing of every block; None: out of memory."""

    name: str
    family: str
    model: str
    side: int
    rank: int
    plain: float | None
    checkpointed: float
    batch: int = 1
    tokens: int = 77
    adapter: dict[str, Any] = field(default_factory=dict)


POINTS = (
    Point("SD 1.5, 512 px, rank 16", "sd15", "v1", 512, 16, 2.87, 1.98),
    Point(
        "SDXL, 1024 px, LoKr",
        "sdxl",
        "base",
        1024,
        16,
        13.03,
        6.53,
        adapter={"kind": "lokr", "lokr_full": True, "lokr_factor": 12},
    ),
    Point("SD 3.5 Medium, 1024 px, batch 3, rank 128", "sd35", "medium", 1024, 128, 34.59, 7.67, batch=3),
    Point("Z-Image Turbo, 512 px, rank 64", "z_image", "z-image", 512, 64, 21.25, 12.87, tokens=128),
    Point("Qwen-Image, 1024 px, rank 8", "qwen_image", "qwen-image", 1024, 8, None, 41.04, tokens=256),
    Point("Chroma, 512 px, rank 16", "chroma", "chroma1", 512, 16, 26.18, 17.67, tokens=512),
)
"""`performance.md` in the design notes, which read each example's own data file: two of SimpleTuner's tables say 1024
pixels where the example trains at 512."""


def forecast(point: Point) -> dict[str, Any]:
    """Return the parts of a point's forecast in GiB, and its errors."""
    import torch

    from lorasmith.engine.adapters import attach_adapter
    from lorasmith.engine.block_checkpointing import checkpoint_blocks, denoiser_blocks
    from lorasmith.engine.config import AdapterSettings, RunConfig
    from lorasmith.engine.simulation import StepShape, simulate_step
    from lorasmith.engine.simulation.references import load_reference, reference_files

    family: Any = load_reference(point.family, reference_files(point.family, point.model), torch.bfloat16)
    settings = AdapterSettings(rank=point.rank, alpha=point.rank, **point.adapter)
    config = RunConfig(adapter=settings)
    adapter = attach_adapter(family, settings, 0)
    shape = StepShape(point.batch, point.side, point.side, point.tokens)
    cast = Autocast()
    for _, block in denoiser_blocks(family):
        block.forward = cast.wrapped(block.forward)
    family.predict = cast.wrapped(family.predict)
    weights = 2 * sum(weight.numel() for weight in family.denoiser.parameters()) - 2 * adapter.num_parameters()
    fixed = weights / 2**30 + ADAPTER_BYTES * adapter.num_parameters() / 2**30
    found: dict[str, Any] = {"name": point.name, "weights": weights / 2**30, "lora": adapter.num_parameters()}
    for key, published, share in (("plain", point.plain, 0.0), ("checkpointed", point.checkpointed, 1.0)):
        checkpoint_blocks(family, share)
        activations = simulate_step(family, adapter, config, shape).peak_mib / 1024
        total = fixed + activations
        found[key] = {
            "activations": activations,
            "forecast": total,
            "published": published,
            "error_percent": None if published is None else 100 * (total / published - 1),
        }
    return rounded(found)


def rounded(value: Any) -> Any:
    """Return the numbers in a result with three digits behind the point."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def rms_of(points: list[dict[str, Any]], context: float = 0.0) -> float:
    """Return the root mean square in percent of the errors of all published peaks, with `context` GiB added."""
    cells = [point[key] for point in points for key in ("plain", "checkpointed") if point[key]["published"]]
    squares = [((cell["forecast"] + context) / cell["published"] - 1) ** 2 for cell in cells]
    return round(100 * math.sqrt(sum(squares) / len(squares)), 2)


def main() -> None:
    """Forecast and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="families to forecast; all without")
    options = parser.parse_args()
    points = []
    for point in POINTS:
        if not options.only or point.family in options.only:
            points.append(forecast(point))
            print(json.dumps(points[-1]), file=sys.stderr, flush=True)
    result = {
        "benchmark": "forecast_published",
        "points": points,
        "rms_percent": rms_of(points),
        "rms_with_context_percent": rms_of(points, CONTEXT_GIB),
    }
    print(json.dumps(result | facts("torch", "diffusers", "transformers", "peft"), indent=2))


if __name__ == "__main__":
    sys.exit(main())
