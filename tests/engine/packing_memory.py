"""A process of its own that packs layers mapped from a file and prints how much anonymous memory that took at most."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorasmith.engine.quantization import bytes_per_weight, pack_module

CPU, LAYERS, WIDTH = torch.device("cpu"), 8, 1024


class Growth:
    """How many bytes more of anonymous memory the process had at most inside."""

    def __enter__(self) -> Growth:
        self._before, self.bytes, self._ended = anonymous_bytes(), 0, False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended:
            self._look()
            time.sleep(0.002)

    def _look(self) -> None:
        self.bytes = max(self.bytes, anonymous_bytes() - self._before)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def build(layers: int = LAYERS) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)) for _ in range(layers))


def main(folder: Path, kind: str) -> None:
    weights = {f"{layer}.0.weight": torch.full((WIDTH, WIDTH), 0.5, dtype=torch.bfloat16) for layer in range(LAYERS)}
    save_file(weights, folder / "wide.safetensors")
    pack_module(build(1), CPU, kind)  # what is loaded once
    with torch.device("meta"):
        wide = build()
    # Mapped from the file, as every part of a base model whose files have the format that is computed in.
    wide.load_state_dict(load_file(folder / "wide.safetensors"), assign=True)
    with Growth() as growth:
        pack_module(wide, CPU, kind)
    packed = LAYERS * WIDTH**2 * bytes_per_weight(kind)
    print(json.dumps({"growth": growth.bytes, "packed": packed, "layer": 2 * WIDTH**2}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
