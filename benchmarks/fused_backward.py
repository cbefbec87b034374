"""What updating each weight inside the backward pass saves: the most live bytes in a step, with and without it.

    python benchmarks/fused_backward.py [--base demo] [--resolution 64] [--rank 16]

One loaded denoiser, rank 16 on attention; live bytes are counted by torch's own profiler on the CPU, above what there
is before the step (weights and the optimizer's state). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from facts import facts


def most_live_bytes(learner: Any, step: int) -> int:
    """Return the most bytes that were live at once in a step, above those live before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        learner.run_step(step)
    live = most = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def measure(base: str, resolution: int, rank: int, optimizer: str) -> dict[str, Any]:
    """Measure one optimizer with and without the fused backward pass."""
    import torch
    from training_parts import build, load_family, settings

    found: dict[str, Any] = {}
    for fused in (False, True):
        family = load_family(base, torch.device("cpu"), torch.float32)
        config = settings(base, resolution, 1, {"rank": rank, "alpha": float(rank)}, precision="fp32", device="cpu")
        config.optimizer.name, config.optimizer.max_grad_norm = optimizer, 0.0  # type: ignore[assignment]
        config.optimizer.fused_backward = fused
        learner, _ = build(family, config)
        for step in range(2):
            learner.run_step(step)
        found["fused" if fused else "plain"] = most_live_bytes(learner, 2)
        gradients = 4 * learner.adapter.num_parameters()
        learner.close()
    saved = found["plain"] - found["fused"]
    return {
        "plain_mib": round(found["plain"] / 2**20, 2),
        "fused_mib": round(found["fused"] / 2**20, 2),
        "gradients_mib": round(gradients / 2**20, 2),
        "saved_share": round(saved / found["plain"], 4),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="demo", help="a base model as in base.model")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    measured = {
        name: measure(options.base, options.resolution, options.rank, name)
        for name in ("adamw", "adamw8bit", "adafactor", "lion")
    }
    name = options.base if options.base == "demo" else "other"
    result = {"benchmark": "fused_backward", "base": name, "rank": options.rank, "optimizers": measured}
    print(json.dumps(result | facts("torch", "diffusers", "peft", "bitsandbytes"), indent=2))


if __name__ == "__main__":
    sys.exit(main())
