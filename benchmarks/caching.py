"""Throughput of dataset caching over a bare loop that decodes, resizes and encodes the same pictures.

    python benchmarks/caching.py [--pictures 24] [--rounds 3]

The engine also checks that no picture changed, applies EXIF and color profiles, and writes every result to disk with a
checksum; it decodes in threads. The image encoder is a small random AutoencoderKL, so that it does not hide the rest.
Wall time, in turns of A B B A. Goal: at least 0.95. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from facts import facts

GOAL = 0.95
SIDE, BATCH = 512, 4


class Cost(NamedTuple):
    """Seconds of wall time and of process CPU time."""

    wall: float
    cpu: float

    def plus(self, other: Cost) -> Cost:
        """Return the sum."""
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


def make_pictures(folder: Path, number: int) -> None:
    """Write JPEGs of 1280 x 960 with detail, as a camera would."""
    import numpy as np
    from PIL import Image

    rng = random.Random(0)
    for index in range(number):
        small = np.frombuffer(rng.randbytes(48 * 64 * 3), dtype=np.uint8).reshape(48, 64, 3)
        picture = Image.fromarray(small).resize((1280, 960), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:03d}.jpg", quality=92)
        (folder / f"{index:03d}.txt").write_text("a picture")


def bare_loop(paths: list[Path], vae: Any) -> Cost:
    """Decode, resize, crop and encode one batch after the other."""
    import numpy as np
    import torch
    from PIL import Image

    started = time.perf_counter(), time.process_time()
    kept = []
    for start in range(0, len(paths), BATCH):
        arrays = []
        for path in paths[start : start + BATCH]:
            with Image.open(path) as file:
                picture = file.convert("RGB")
            scale = SIDE / min(picture.size)
            size = (max(SIDE, round(picture.width * scale)), max(SIDE, round(picture.height * scale)))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
            left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
            arrays.append(np.array(picture.crop((left, top, left + SIDE, top + SIDE))))
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with torch.no_grad():
            kept.append(vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor)
    return Cost(time.perf_counter() - started[0], time.process_time() - started[1])


def engine_loop(samples: Any, family: Any, settings: Any, fingerprint: str) -> Cost:
    """Cache all samples into a new folder."""
    from lorasmith.engine.dataset.cache import LatentCache, cache_latents

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter(), time.process_time()
        latents = cache_latents(samples, family, fingerprint, settings, cache=LatentCache(Path(folder)))
        cost = Cost(time.perf_counter() - started[0], time.process_time() - started[1])
    assert len(latents) == len(samples)
    return cost


def compare(number: int, rounds: int) -> dict[str, Any]:
    """Measure blocks of A B B A."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import torch
    from training_parts import load_family

    from lorasmith.engine.config import DatasetSettings
    from lorasmith.engine.dataset.buckets import plan_buckets
    from lorasmith.engine.dataset.scan import scan_dataset
    from lorasmith.engine.run_log import quiet_libraries
    from tests.tiny import build_tiny_sd15

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        make_pictures(pictures, number)
        settings = DatasetSettings(folder=str(pictures), resolution=SIDE, buckets=False)
        samples = plan_buckets(scan_dataset(settings).items, settings).samples
        family: Any = load_family(str(build_tiny_sd15(Path(folder) / "base")), torch.device("cpu"), torch.float32)
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(Path(folder) / "base" / "vae", local_files_only=True)
        paths = [sample.item.path for sample in samples]
        engine_loop(samples, family, settings, "warm-up")
        bare_loop(paths, vae)
        blocks = []
        for _ in range(rounds):
            a1, b1 = engine_loop(samples, family, settings, "a"), bare_loop(paths, vae)
            b2, a2 = bare_loop(paths, vae), engine_loop(samples, family, settings, "a")
            blocks.append((a1.plus(a2), b1.plus(b2)))
    return {
        "throughput_ratio": round(median(b.wall / a.wall for a, b in blocks), 3),
        "cpu_time_ratio": round(median(a.cpu / b.cpu for a, b in blocks), 3),
        "goal": GOAL,
        "engine_pictures_per_second": round(2 * number * rounds / sum(a.wall for a, _ in blocks), 2),
        "bare_pictures_per_second": round(2 * number * rounds / sum(b.wall for _, b in blocks), 2),
        "pictures": number,
        "blocks": rounds,
        "torch_threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    result = compare(options.pictures, options.rounds)
    print(json.dumps({"benchmark": "caching"} | result | facts("torch", "diffusers", "pillow"), indent=2))


if __name__ == "__main__":
    sys.exit(main())
