"""From a key press to the painted answer, in a real pty, while a torch thread trains in the same process.

    python benchmarks/key_latency.py [--keys 300]

Keys are pressed at random gaps of 50 to 150 ms; the answer is the chart's title, painted anew. Goal: p99 at most 50 ms.
The same is measured without an engine. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from facts import facts, percentile
from pty_child import PtyChild

COLUMNS, ROWS = 160, 45
ANSWERS = (b"log y", b"linear y")
TIMEOUT_SECONDS = 10.0


def measure(engine: str, keys: int, warm_up_seconds: float) -> dict[str, Any]:
    """Press `keys` keys on a monitor over `engine` and return the latencies in milliseconds."""
    program = str(Path(__file__).with_name("monitored.py"))
    child = PtyChild([sys.executable, program, engine], COLUMNS, ROWS)
    try:
        if not child.read_until(b"linear y", 60.0):
            raise SystemExit(f"the monitor did not start over {engine}")
        child.read_for(warm_up_seconds)
        gaps = random.Random(0)
        latencies = []
        for number in range(keys):
            child.read_for(gaps.uniform(0.05, 0.15))
            pressed = time.perf_counter()
            child.write(b"l")
            if not child.read_until(ANSWERS[number % 2], TIMEOUT_SECONDS):
                raise SystemExit(f"key {number} was not answered within {TIMEOUT_SECONDS} s")
            latencies.append(1e3 * (time.perf_counter() - pressed))
    finally:
        child.close()
    return {
        "p50_ms": round(percentile(latencies, 50), 1),
        "p99_ms": round(percentile(latencies, 99), 1),
        "max_ms": round(max(latencies), 1),
        "keys": keys,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=300)
    options = parser.parse_args()
    result = {
        "goal_p99_ms": 50,
        "training": measure("torch", options.keys, warm_up_seconds=8.0),
        "no_engine": measure("idle", options.keys, warm_up_seconds=2.0),
    }
    print(json.dumps({"benchmark": "key_latency", **result, **facts("textual", "torch", "numpy")}, indent=2))


if __name__ == "__main__":
    main()
