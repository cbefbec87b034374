"""A queue's worker as a process of its own; what it starts is `queue_child`.

Arguments: folder of the queue, book of the children, devices.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from lorasmith.engine import queue_worker
from lorasmith.engine.cli.queue import _signals
from lorasmith.engine.errors import RunLockedError
from lorasmith.engine.queue_worker import QueueWorker
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_queue import RunQueue


def main() -> int:
    """Work and return the exit code of `lorasmith queue run`."""
    folder, book, *slots = sys.argv[1:]

    def command(run: RunFolder, device: str) -> list[str]:
        return [sys.executable, "-m", "tests.faults.queue_child", str(run.path), device, book]

    queue_worker.POLL_SECONDS = 0.03
    # Where the kill comes from: a process that is killed before it imported anything tests nothing.
    worker = QueueWorker(RunQueue(Path(folder)), slots, lambda line: print(line, flush=True), command)
    with _signals(worker):
        print("works", flush=True)
        try:
            return worker.run()
        except RunLockedError as error:
            print(error, flush=True)
            return error.exit_code


if __name__ == "__main__":
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    sys.exit(main())
