"""Run every benchmark in turn and record the results as one file.

    python benchmarks/run_all.py [--only engine_overhead caching]

Writes benchmarks/results/DATE-KIND.json, where KIND is `gpu` or `cpu` with the number of cores. Nothing else should run
meanwhile: the load of the machine is recorded with each result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from facts import facts

HERE = Path(__file__).parent
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "engine_overhead": (),
    "caching": (),
    "checking": (),
    "scanning": (),
    "fused_backward": (),
    "gpu_sd15": (),
    "startup": (),
    "key_latency": (),
    "monitor_overhead": (),
}
TIMEOUT_SECONDS = 1800


def run(name: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Run one benchmark in a process of its own and return what it printed, or why it failed."""
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"benchmark": name, "failed": f"took more than {TIMEOUT_SECONDS} s"}
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"benchmark": name, "failed": f"exit code {done.returncode}: {last[0]}"}
    result: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return {"benchmark": name} | result


def kind_of_machine(results: list[dict[str, Any]]) -> str:
    """Return `gpu-NAME` or `cpu-N-cores`; never a host name."""
    gpu = next((str(result["gpu"]) for result in results if "gpu" in result), "")
    return f"gpu-{'-'.join(gpu.lower().split())}" if gpu else f"cpu-{facts()['cores']}-cores"


def main() -> int:
    """Run, print one line each, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()
    results = []
    for name in options.only:
        started = time.monotonic()
        results.append(run(name, BENCHMARKS[name]))
        print(f"{name}: {summary(results[-1])} ({time.monotonic() - started:.0f} s)", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{time.strftime('%Y-%m-%d', time.gmtime())}-{kind_of_machine(results)}.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"recorded in {path.name}")
    return int(any("failed" in result for result in results))


def summary(result: dict[str, Any]) -> str:
    """Return the figures of a result in one line, without the machine's description."""
    left_out = {"benchmark", "versions", "date", "processor", "cores", "system", "python", "load_1min"}
    return ", ".join(f"{key} {value}" for key, value in result.items() if key not in left_out)


if __name__ == "__main__":
    sys.exit(main())
