"""What the monitor costs a training in the same process: steps with the monitor on against off, in paired segments.

    python benchmarks/monitor_overhead.py [--pairs 40] [--seconds 2]

The training is a loop of many tiny torch operations, the worst case. Goal: at most 1 %. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

from facts import facts, percentile
from pty_child import PtyChild

COLUMNS, ROWS = 160, 45
START_SECONDS = 60.0


def measure(pairs: int, seconds: float) -> dict[str, Any]:
    """Run the monitored training and compare neighbouring segments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "segments.json"
        program = str(Path(__file__).with_name("monitored.py"))
        child = PtyChild([sys.executable, program, "torch", str(out), str(2 * pairs), str(seconds)], COLUMNS, ROWS)
        written = 0
        deadline = time.perf_counter() + START_SECONDS + 2 * pairs * seconds
        while child.process.poll() is None and time.perf_counter() < deadline:
            written += len(child.read(0.5))
        child.close()
        if not out.exists():
            raise SystemExit(f"the monitored training gave no result; {out.with_suffix('.log').read_text()[-2000:]}")
        segments = json.loads(out.read_text())
    return compare(segments) | {"kib_per_second_to_terminal": round(written / 1024 / (2 * pairs * seconds), 1)}


def compare(segments: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the overhead of the segments with the monitor over the mean of their neighbours without."""
    ratios = []
    for before, here, after in zip(segments, segments[1:], segments[2:], strict=False):
        if here["on"]:
            ratios.append(here["step_ms"] / fmean((before["step_ms"], after["step_ms"])) - 1)
    on, off = ([part for part in segments if part["on"] is which] for which in (True, False))
    half = 1.253 * (percentile(ratios, 75) - percentile(ratios, 25)) / 1.349 / len(ratios) ** 0.5
    return {
        "overhead_percent": round(100 * median(ratios), 2),
        "standard_error_percent": round(100 * half, 2),
        "goal_percent": 1.0,
        "pairs": len(ratios),
        "step_ms_on": round(fmean(part["step_ms"] for part in on), 2),
        "step_ms_off": round(fmean(part["step_ms"] for part in off), 2),
        "screen_cpu_percent_on": round(100 * fmean(part["screen_cpu"] for part in on), 2),
        "screen_cpu_percent_off": round(100 * fmean(part["screen_cpu"] for part in off), 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a segment")
    options = parser.parse_args()
    result = measure(options.pairs, options.seconds)
    print(json.dumps({"benchmark": "monitor_overhead", **result, **facts("textual", "torch", "numpy")}, indent=2))


if __name__ == "__main__":
    main()
