"""One run, started again and again in forked children that get SIGTERM twice at random instants: RUN.toml TRIALS SEED.

The parent imports torch once. Prints one JSON line a trial: exit code, seconds between the signals, newest checkpoint,
where the child resumed. The last trial gets SIGTERM once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from lorasmith.engine.checkpoints import newest_checkpoint
from lorasmith.engine.events import RunStarted, StepsDone
from lorasmith.engine.journal import replay

BETWEEN_SECONDS = 0.4


def only_run(run_file: Path) -> Path | None:
    runs = run_file.parent / "runs"
    return next(runs.iterdir(), None) if runs.exists() else None


def steps_done(run_file: Path) -> int:
    run = only_run(run_file)
    if run is None or not (run / "journal.jsonl").exists():
        return 0
    return sum(isinstance(event, StepsDone) for event in replay(run / "journal.jsonl", only={"StepsDone"}))


def child(run_file: Path, seed: int, twice: bool) -> None:
    dice = random.Random(seed)
    before = steps_done(run_file)

    def interrupt() -> None:
        while steps_done(run_file) <= before:
            time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 0.3))
        os.kill(os.getpid(), signal.SIGTERM)
        if twice:
            time.sleep(dice.uniform(0.0, BETWEEN_SECONDS) ** 2)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    from lorasmith.engine.cli import main

    resume = [] if only_run(run_file) is None else ["--resume"]
    os._exit(main(["train", str(run_file), *resume]))


def trial(run_file: Path, seed: int, twice: bool) -> dict[str, object]:
    pid = os.fork()
    if pid == 0:
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        child(run_file, seed, twice)
    begun = time.monotonic()
    _, status = os.waitpid(pid, 0)
    run = only_run(run_file)
    assert run is not None
    damaged: list[str] = []
    newest = newest_checkpoint(run / "checkpoints", lambda path, reason: damaged.append(f"{path.name}: {reason}"))
    starts = [event for event in replay(run / "journal.jsonl", only={"RunStarted"}) if isinstance(event, RunStarted)]
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - begun,
        "newest": newest.step if newest else 0,
        "damaged": damaged,
        "resumed_from": starts[-1].resumed_from,
    }


def warm(run_file: Path) -> None:
    """Import what a training imports, by loading its base once: every child then has it."""
    import torch

    import lorasmith.engine.export
    import lorasmith.engine.session
    import lorasmith.engine.trainer  # noqa: F401
    from lorasmith.engine.adapters import attach_adapter
    from lorasmith.engine.run_file import load_run_file, resolve_config
    from tests.engine.running import load_tiny

    torch.set_num_threads(1)
    config = resolve_config([load_run_file(run_file)]).config
    attach_adapter(load_tiny(Path(config.base.model)), config.adapter, config.run.seed)


def main() -> None:
    run_file, trials, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    warm(run_file)
    for number in range(trials):
        print(json.dumps(trial(run_file, seed + number, twice=number < trials - 1)), flush=True)


if __name__ == "__main__":
    main()
