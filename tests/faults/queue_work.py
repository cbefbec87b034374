"""A queue's worker as a process of its own; what it starts is `queue_child`.

Arguments: folder of the queue, book of the children, devices. With `--kill SEED` before them, workers are started and
killed at random instants until every run is over; prints how many were killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from lorasmith.engine import queue_worker
from lorasmith.engine.cli.queue import _signals
from lorasmith.engine.errors import RunLockedError
from lorasmith.engine.queue_worker import QueueWorker
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_queue import RunQueue, entry_state

LONGEST_LIFE = 0.25


def make_worker(folder: str, book: str, slots: list[str]) -> QueueWorker:
    """Return a worker that starts `queue_child` in place of a training."""

    def command(run: RunFolder, device: str) -> list[str]:
        return [sys.executable, "-m", "tests.faults.queue_child", str(run.path), device, book]

    return QueueWorker(RunQueue(Path(folder)), slots, lambda line: print(line, flush=True), command)


def work(worker: QueueWorker) -> int:
    """Work and return the exit code of `lorasmith queue run`."""
    with _signals(worker):
        print("works", flush=True)
        try:
            return worker.run()
        except RunLockedError as error:
            print(error, flush=True)
            return error.exit_code


def kill_workers(chance: random.Random, folder: str, book: str, slots: list[str]) -> int:
    """Fork a worker, kill it after a random time, and so on until no run is left; return how many were killed."""
    kills = 0
    queue = RunQueue(Path(folder))
    while any(entry_state(entry).status in ("waiting", "running") for entry in queue.entries()):
        pid = os.fork()
        if pid == 0:
            os._exit(make_worker(folder, book, slots).run())
        time.sleep(chance.uniform(0, LONGEST_LIFE))
        os.kill(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    return kills


def main() -> int:
    """Do what the arguments say."""
    queue_worker.POLL_SECONDS = 0.03
    if sys.argv[1] == "--kill":
        seed, folder, book, *slots = sys.argv[2:]
        print("killed", kill_workers(random.Random(int(seed)), folder, book, slots))
        return 0
    folder, book, *slots = sys.argv[1:]
    return work(make_worker(folder, book, slots))


if __name__ == "__main__":
    sys.exit(main())
