"""How long the fit solver takes for each derived size on each tier, in processor time and in forecasts' worth.

    python -m benchmarks.fit_speed

The wizard asks at every change of a setting and has 50 ms; a ratio to one forecast is what holds on any machine.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lorasmith.engine.config import RunConfig
from lorasmith.engine.families import families
from lorasmith.engine.fit import solve
from lorasmith.engine.fit.tiers import TIERS, room_of
from lorasmith.engine.memory import model_memories
from lorasmith.engine.memory.forecast import Subject, forecast

BATCHES = (1, 4)
REPEATS = 3


def seconds(call: Callable[[], object]) -> float:
    """Return the least processor time of a few calls."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Print the slowest and the middle solve of each size, and one forecast beside it."""
    every: list[float] = []
    for name, module in families().items():
        for model in model_memories(name):
            solves = []
            for batch in BATCHES:
                side = module.SPEC.default_resolution
                config = RunConfig.model_validate({"dataset": {"resolution": side}, "train": {"batch_size": batch}})
                subject = Subject(config, module.SPEC, model, side**2 / 1e6)
                rooms = [room_of(tier) for tier in TIERS]
                solves += [seconds(lambda room=room, subject=subject: solve(subject, room)) for room in rooms]
            one = seconds(lambda subject=subject: [forecast(subject) for _ in range(100)]) / 100
            every += solves
            middle, most = statistics.median(solves), max(solves)
            print(
                f"{model.label:32} middle {1000 * middle:5.1f} ms  most {1000 * most:5.1f} ms"
                f"  forecast {1e6 * one:4.0f} us  ratio {most / one:4.0f}"
            )
    if every:
        print(f"{len(every)} solves, the slowest {1000 * max(every):.1f} ms")


if __name__ == "__main__":
    main()
