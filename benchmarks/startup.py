"""From the command `lorasmith` to its first painted page, in a real pty.

    python benchmarks/startup.py [--runs 9]

Painted means: at least six rows of the screen have text. Goal: at most 0.7 s. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import pyte
from facts import facts
from pty_child import PtyChild

COLUMNS, ROWS = 100, 30
ROWS_OF_A_PAGE = 6
TIMEOUT_SECONDS = 30.0
COMMAND = Path(sys.executable).with_name("lorasmith")


def time_to_first_page(state_folder: str) -> float:
    """Start the wizard and return the seconds until its first page is painted."""
    child = PtyChild([str(COMMAND)], COLUMNS, ROWS, {"LORASMITH_STATE": state_folder})
    chunks: list[tuple[float, bytes]] = []
    try:
        screen = pyte.Screen(COLUMNS, ROWS)
        stream = pyte.ByteStream(screen)
        while time.perf_counter() - child.started < TIMEOUT_SECONDS:
            data = child.read(0.2)
            if not data:
                continue
            chunks.append((time.perf_counter() - child.started, data))
            stream.feed(data.replace(b"\x1b[>25u", b""))
            if sum(bool(line.strip()) for line in screen.display) >= ROWS_OF_A_PAGE:
                return chunks[-1][0]
    finally:
        child.close()
    raise SystemExit(f"no page within {TIMEOUT_SECONDS} s; last output: {chunks[-1:]!r}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        time_to_first_page(folder)  # warms the disk cache
        times = [time_to_first_page(folder) for _ in range(options.runs)]
    result = {
        "goal_seconds": 0.7,
        "median_seconds": round(median(times), 3),
        "min_seconds": round(min(times), 3),
        "max_seconds": round(max(times), 3),
        "runs": options.runs,
    }
    print(json.dumps({"benchmark": "startup", **result, **facts("textual", "rich")}, indent=2))


if __name__ == "__main__":
    main()
