"""A run as a program that really gets short of memory: BASE FOLDER HOW [BYTES].

HOW is `limit` (the address space is limited to what is used plus BYTES when training begins), `grow` (it eats memory
after its first checkpoint, until the system ends it).
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from lorasmith.engine.cli.train import host_run
from lorasmith.engine.events import CheckpointSaved, Event, StageChanged
from lorasmith.engine.session import Session
from tests.engine.running import new_run, tiny_config


def main(base: str, folder: str, how: str, num_bytes: str = "0") -> int:
    emit = Session.emit

    def disturbed(session: Session, event: Event) -> None:
        emit(session, event)
        if how == "limit" and isinstance(event, StageChanged) and event.stage == "train":
            limit_address_space(int(num_bytes))
        if how == "grow" and isinstance(event, CheckpointSaved):
            grow()

    Session.emit = disturbed  # type: ignore[method-assign]
    dataset = {"buckets": False, "resolution": 256} if how == "limit" else {"buckets": False}
    train = {"steps": 4, "batch_size": 8, "log_every": 1}
    config = tiny_config(Path(base), Path(folder), train=train, dataset=dataset, checkpoints={"every": 2})
    return host_run(new_run(config), config)


def limit_address_space(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def grow() -> None:
    hoard = []
    while True:
        hoard.append(b"x" * (16 << 20))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
