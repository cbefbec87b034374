"""Checking a scanned dataset: process CPU time for 10,000 pictures, and how it grows from 1,000.

    python benchmarks/checking.py [--pictures 10000] [--rounds 3]

The pictures are values: sizes, hashes and captions of 18 tags each as a tagger writes them, one in twenty a near-copy
of another. `tokens` is with the demo's tokenizer, cold, and `again` the check after it, as when a setting is changed.
`growth` is the time a picture of 10,000 takes over that of one of 1,000: near-duplicates compare each with each.
Goals: at most 5 s without tokens, growth at most 3. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from facts import facts

from lorasmith.engine.dataset.buckets import plan_buckets
from lorasmith.engine.dataset.check import build_context, check_dataset
from lorasmith.engine.dataset.items import Dataset, ImageItem, Measures
from lorasmith.engine.run_file import Layer, resolve_config
from lorasmith.presets import demo

GOAL_SECONDS, GOAL_GROWTH = 5.0, 3.0
TAGS, VOCABULARY = 18, 3000


def make_dataset(count: int) -> Dataset:
    """Return different pictures of usual sizes, and near-copies among them."""
    draw = random.Random(0)
    tags = [f"{draw.choice(('red', 'long', 'old', 'big'))} thing{number}" for number in range(VOCABULARY)]
    items = []
    perceptual_hash = 0
    for number in range(count):
        perceptual_hash = perceptual_hash ^ 1 if number % 20 == 1 else draw.getrandbits(64)
        items.append(
            ImageItem(
                Path(f"{number:05}.jpg"),
                f"{number:05}.jpg",
                f"{number:064x}",
                draw.randint(500, 3000),
                draw.randint(500, 3000),
                captions=(", ".join(draw.choices(tags, k=TAGS)),),
                measures=Measures(perceptual_hash, 0.9, 0.5, 0.2, 0.0, 92),
            )
        )
    return Dataset(Path("pictures"), tuple(items), (), count)


def seconds(dataset: Dataset, tokenizers: list[Any]) -> float:
    """Return the process CPU seconds of one check, its plan not counted."""
    config = resolve_config([Layer("benchmark", {"captions": {"trigger": "zqx"}})]).config
    plan = plan_buckets(dataset.items, config.dataset)
    context = build_context(config, tokenizers=tokenizers, other_triggers={})
    started = time.process_time()
    found = check_dataset(dataset, plan, context)
    taken = time.process_time() - started
    if "near-duplicates" not in {finding.code for finding in found}:
        raise SystemExit("the near-copies were not found: this measures nothing")
    return taken


def main() -> int:
    """Measure in turns and print one JSON object; exit 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    large, small = make_dataset(options.pictures), make_dataset(options.pictures // 10)
    times: dict[str, list[float]] = {"large": [], "small": []}
    for _ in range(options.rounds):
        times["large"].append(seconds(large, []))
        times["small"].append(seconds(small, []))
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(demo.BASE / "tokenizer")
    plain, growth = median(times["large"]), median(times["large"]) / median(times["small"]) / 10
    result = facts() | {
        "pictures": options.pictures,
        "cpu_seconds": round(plain, 2),
        "growth": round(growth, 2),
        "cpu_seconds_tokens": round(seconds(large, [tokenizer]), 2),
        "cpu_seconds_again": round(seconds(large, [tokenizer]), 2),
        "passed": plain <= GOAL_SECONDS and growth <= GOAL_GROWTH,
    }
    print(json.dumps(result, indent=2))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
