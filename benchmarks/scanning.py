"""Pictures a second that a first scan decodes and measures, and how many times faster a second scan is.

    python benchmarks/scanning.py [--pictures 300] [--rounds 3]

The pictures are JPEGs of one megapixel and quality 90 with detail at all scales, as photographs have. Each round scans
them with an empty cache, again with a full one, and decodes them in one thread with Pillow alone, which tells how fast
the machine is. Goals: 200 pictures a second on two cores, a second scan 20 times faster. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from facts import facts

GOAL_PER_SECOND, GOAL_RATIO = 200, 20
SIDE, QUALITY = 1024, 90
SETTLE_SECONDS = 4


def make_pictures(folder: Path, number: int) -> int:
    """Write photo-like JPEGs, detail at all scales with less of the fine; return their mean size in bytes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(number):
        total = np.zeros((SIDE, SIDE, 3), np.float32)
        for cells in (4, 8, 16, 32, 64, 128, 256, 512):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            total += np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / cells**0.5
        total = (total - total.min()) / (total.max() - total.min()) * 255
        Image.fromarray(total.astype(np.uint8)).save(folder / f"{index:04d}.jpg", quality=QUALITY)
    return sum(path.stat().st_size for path in folder.iterdir()) // number


def scan(paths: list[Path]) -> float:
    """Examine all pictures and return the seconds it took."""
    from lorasmith.engine.dataset.workers import examine_pictures

    started = time.perf_counter()
    results = examine_pictures(paths)
    seconds = time.perf_counter() - started
    assert not [result for result in results if isinstance(result, str)]
    return seconds


def bare_decoding(paths: list[Path]) -> float:
    """Decode all pictures in this thread and return the seconds of processor time that it took."""
    from PIL import Image

    started = time.process_time()
    for path in paths:
        with Image.open(path) as picture:
            picture.load()
    return time.process_time() - started


def children_seconds() -> float:
    """Return the processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(number: int, rounds: int) -> dict[str, Any]:
    """Scan cold and warm in turns."""
    from lorasmith.engine.dataset.workers import num_children

    cold, warm, bare, used = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        size = make_pictures(pictures, number)
        paths = sorted(pictures.iterdir())
        time.sleep(SETTLE_SECONDS)  # a file that was just written is not trusted to stay as it is
        for index in range(rounds):
            os.environ["LORASMITH_CACHE"] = f"{folder}/cache-{index}"
            before = children_seconds()
            cold.append(scan(paths))
            used.append(children_seconds() - before)
            warm.append(scan(paths))
            bare.append(bare_decoding(paths))
    return {
        "pictures_per_second": round(number / median(cold), 1),
        "goal": GOAL_PER_SECOND,
        "second_scan_ratio": round(median(a / b for a, b in zip(cold, warm, strict=True)), 1),
        "second_scan_goal": GOAL_RATIO,
        "processor_ms_per_picture": round(1000 * median(used) / number, 2),
        "bare_decoding_ms_per_picture": round(1000 * median(bare) / number, 2),
        "children": num_children(),
        "pictures": number,
        "rounds": rounds,
        "mean_kib": size >> 10,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    result = measure(options.pictures, options.rounds)
    print(json.dumps({"benchmark": "scanning"} | result | facts("pillow", "numpy"), indent=2))


if __name__ == "__main__":
    sys.exit(main())
