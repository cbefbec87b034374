"""A real training in which the clocks jump at every step, as a process of its own: run by `test_clock`.

Arguments: base model, work folder, file of the clock's offsets. Prints one JSON object.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

HOUR = 3600
# (seconds added to the wall clock, seconds added to the time since boot): set forwards and back, summer time, a battery
# that was empty, and a machine that slept for a night, which moves both.
JUMPS = [(5 * HOUR, 0), (-9 * HOUR, 0), (HOUR, 0), (0, 0), (-HOUR, 0), (-20 * 365 * 24 * HOUR, 0), (400 * 24 * HOUR, 0)]
JUMPS += [(9 * HOUR, 9 * HOUR), (0, 9 * HOUR)]


class Clock:
    """The offsets that `fake_clock.c` reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[float] = []

    def set(self, wall: int, boot: int) -> None:
        with self.path.open("r+b") as file:
            file.write(struct.pack("qq", wall, boot))
        self.seen.append(time.time())


def main(base: Path, folder: Path, clock: Clock) -> dict[str, Any]:
    """Train undisturbed, then with jumps and a stop in the middle, then resume far in the past."""
    from lorasmith.engine.commands import Command
    from lorasmith.engine.events import CheckpointSaved, Event, StepsDone
    from lorasmith.engine.session import Session, summarize_run
    from tests.engine.running import new_run, run_training, tiny_config

    steps = len(JUMPS) * 2
    config = tiny_config(base, folder, train={"steps": steps, "log_every": 1}, checkpoints={"every": 1, "keep": 3})
    _, calm = run_training(config)

    class Jumping(Session):
        """Moves the clocks after every checkpoint, and stops after the last move."""

        def emit(self, event: Event) -> None:
            super().emit(event)
            if isinstance(event, CheckpointSaved) and event.step <= len(JUMPS):
                clock.set(*JUMPS[event.step - 1])
                if event.step == len(JUMPS):
                    self.send(Command.STOP)

    run = new_run(config)
    begun = time.monotonic()
    first = Jumping(run, config)
    first.start()
    first.join(300)
    took = time.monotonic() - begun
    stopped = summarize_run(run)
    clock.set(-30 * 24 * HOUR, 9 * HOUR)
    second = Session(run, config)
    second.start()
    second.join(300)
    from lorasmith.engine.journal import replay

    events = list(replay(run.journal))
    return {
        "calm": calm.losses(),
        "losses": [loss for event in events if isinstance(event, StepsDone) for loss in event.losses],
        "paces": [event.seconds_per_step for event in events if isinstance(event, StepsDone)],
        "kinds": [type(event).__name__ for event in events],
        "times": [event.time for event in first.drain()],
        "took": took,
        "stopped": stopped.describe(),
        "resumed_from": [getattr(event, "resumed_from", None) for event in events if hasattr(event, "resumed_from")],
        "checkpoints": sorted(path.name for path in run.checkpoints.iterdir()),
        "outcome": second.outcome.outcome if second.outcome else "",
        "wall": clock.seen,
        "jumps": len(JUMPS),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), Clock(Path(sys.argv[3])))))
