"""Decoding in child processes with limits on memory and time.

A decoder is a large program in C that reads foreign bytes: it may crash, hang, take all memory or print on the screen.
Here that ends one file with a reason, and costs one child. Children take files from one queue; each is told how much
memory it may use. A file that may need more waits for a round with fewer children and more memory for each; the last
has one child, so that all of them together never take more than MEMORY_BYTES.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lorasmith.engine.dataset.examine import facts_from_json
from lorasmith.engine.dataset.items import PictureFacts, Progress
from lorasmith.engine.dataset.scan_cache import ScanCache
from lorasmith.engine.errors import DatasetError

MEMORY_BYTES = 880 << 20
"""What all children together may take; with the parent that stays below one GiB."""
CHILD_BYTES = 64 << 20
"""What a child takes before its first picture: Python, numpy, Pillow."""
MAX_CHILDREN = 8
FILE_SECONDS = 4.5
"""Processor time for one file, and wall time for a child that does not even run."""
BUSY_SECONDS = 30.0
"""Wall time for one file where the machine is too busy, or the disk too slow, to give the child its processor time."""
START_SECONDS = 60.0
_FILES_AHEAD = 2
_FILES_PER_CHILD = 8
_POLL_SECONDS = 0.25
_KILL_SECONDS = 5.0
_TOO_SLOW = "decoding took too long"
_RESULT_LIMIT = 1 << 20

Result = PictureFacts | str


def examine_pictures(paths: Sequence[Path], on_progress: Progress | None = None) -> list[Result]:
    """Return for each path what the picture tells, or why it cannot be used, in the same order.

    Files that earlier scans know are not decoded again. `on_progress(done, total)` is called in this thread; what it
    raises ends all children and comes out of here.
    """
    results: dict[int, Result] = {}

    def finished(index: int, result: Result) -> None:
        results[index] = result
        if on_progress is not None:
            on_progress(len(results), len(paths))

    with ScanCache() as known:
        unknown = []
        for index, result in enumerate(known.look_up(paths)):
            if result is None:
                unknown.append(index)
            else:
                finished(index, result)
        with contextlib.closing(_examine_unknown(paths, unknown)) as examined:
            for index, result, lasting in examined:
                if lasting:
                    known.remember(index, result)
                finished(index, result)
    return [results[index] for index in range(len(paths))]


def _examine_unknown(paths: Sequence[Path], indices: Sequence[int]) -> Generator[tuple[int, Result, bool]]:
    """Yield index, result, and whether the file alone decided it, in rounds of ever fewer children."""
    waiting = list(indices)
    children = min(num_children(), -(-len(waiting) // _FILES_PER_CHILD))
    while waiting:
        memory = MEMORY_BYTES // children - CHILD_BYTES
        crew = _Crew([(index, paths[index]) for index in waiting], children, memory)
        with contextlib.closing(crew.results()) as results:
            yield from results
        waiting = sorted(crew.too_large)
        children = max(1, min(children // 2, len(waiting)))


def num_children() -> int:
    """Return how many children may work at once: one for each processor that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_CHILDREN, cores))


@dataclass
class _Crew:
    """One round: `num` children with `memory` bytes each work off the files; what needs more is in `too_large`."""

    files: Sequence[tuple[int, Path]]
    num: int
    memory: int
    too_large: list[int] = field(default_factory=list)

    def results(self) -> Generator[tuple[int, Result, bool]]:
        """Yield index, result, and whether it is worth remembering; ends all children, however it is left."""
        queue = deque(self.files)
        children: list[_Child] = []
        try:
            with selectors.DefaultSelector() as selector:
                while queue or any(child.jobs for child in children):
                    while queue and len(children) < self.num:
                        children.append(_Child(selector, self.memory, last=self.num == 1))
                    for child in children:
                        child.fill(queue)
                    ready = {key.data for key, _ in selector.select(_POLL_SECONDS)}
                    for child in list(children):
                        yield from self._results_of(child, child in ready)
                        if child.over:
                            queue.extendleft(reversed(child.jobs))
                            children.remove(child)
        finally:
            for child in children:
                child.end()

    def _results_of(self, child: _Child, ready: bool) -> Iterator[tuple[int, Result, bool]]:
        for index, reply in child.read() if ready else child.check():
            if "memory" in reply:
                self.too_large.append(index)
            elif "facts" in reply:
                yield index, facts_from_json(reply["facts"]), True
            else:
                yield index, str(reply["refused"]), "lost" not in reply


class _Child:
    """A child process, the files it has been given and not answered yet, and how long it has been at the first."""

    def __init__(self, selector: selectors.BaseSelector, memory: int, *, last: bool) -> None:
        self._selector, self._memory, self._last = selector, memory, last
        self.jobs: deque[tuple[int, Path]] = deque()
        self.over = False
        self._buffer = b""
        self._started = False
        # A session of its own: Ctrl-C in the terminal is for the parent alone to answer.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lorasmith.engine.dataset.examine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        os.set_blocking(self._answers.fileno(), False)
        selector.register(self._answers, selectors.EVENT_READ, self)
        self._watched = psutil.Process(self._process.pid)
        self._since, self._cpu_before = time.monotonic(), 0.0

    def fill(self, queue: deque[tuple[int, Path]]) -> None:
        """Give the child files, one more than it works at, so that it never waits for the next."""
        while queue and len(self.jobs) < _FILES_AHEAD:
            index, path = queue.popleft()
            if not self.jobs and self._started:
                self._restart_clock()
            self.jobs.append((index, path))
            request = {"path": os.fspath(path), "memory": self._memory, "last": self._last}
            with contextlib.suppress(OSError):  # a child that is gone shows as the end of its answers
                self._requests.write(json.dumps(request).encode("ascii") + b"\n")
                self._requests.flush()

    def read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the answers that have come; the end of them blames the file that the child worked at."""
        try:
            data = os.read(self._answers.fileno(), 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            if not self._started:
                self._started = True
            elif self.jobs:
                yield self.jobs.popleft()[0], _parse(line)
            self._restart_clock()
        if not data or len(self._buffer) > _RESULT_LIMIT:
            yield from self._lose(self._how_it_died())

    def check(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """End the child where it has been at its file for too long."""
        if self.jobs and self._is_stuck():
            yield from self._lose({"refused": _TOO_SLOW, "lost": True})

    def end(self) -> None:
        """Kill the child and wait for it, so that nothing of it stays."""
        self.over = True
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(self._answers)
        self._kill()
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                pipe.close()

    def _kill(self) -> int | None:
        """End the process and return its exit code; None for one that not even the kernel can stop, on a dead disk."""
        with contextlib.suppress(OSError):
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=_KILL_SECONDS)
        return None

    def _restart_clock(self) -> None:
        self._since, self._cpu_before = time.monotonic(), self._usage()[0]

    def _is_stuck(self) -> bool:
        waited = time.monotonic() - self._since
        if not self._started:
            return waited > START_SECONDS
        if waited <= FILE_SECONDS:
            return False
        cpu, runs = self._usage()
        return waited > BUSY_SECONDS or cpu - self._cpu_before >= FILE_SECONDS or not runs

    def _usage(self) -> tuple[float, bool]:
        """Return the processor seconds of the child, and whether it wants the processor or the disk right now."""
        try:
            times = self._watched.cpu_times()
            waits = self._watched.status() not in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
            return times.user + times.system, not waits
        except psutil.Error:
            return 0.0, False

    def _lose(self, reply: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        self.end()
        if not self._started:
            raise DatasetError(
                "The pictures cannot be decoded.",
                why=f"The process that decodes them ended at its start (exit code {self._process.returncode}).",
                fix="Free some memory, or install lorasmith anew.",
            )
        if self.jobs:
            yield self.jobs.popleft()[0], reply

    def _how_it_died(self) -> dict[str, Any]:
        code = self._kill()
        if not self._last and code != -signal.SIGSEGV:  # libraries in C++ and Rust abort when memory is refused
            return {"memory": True}
        return {"refused": "damaged: it crashes the decoder", "lost": True}


def _parse(line: bytes) -> dict[str, Any]:
    """Return an answer that is sure to be one of the three kinds."""
    try:
        reply = json.loads(line)
        if "facts" in reply:
            facts_from_json(reply["facts"])
        elif "memory" not in reply:
            reply["refused"] = str(reply["refused"])
    except (ValueError, KeyError, TypeError):
        return {"refused": "damaged: the decoder's answer makes no sense", "lost": True}
    return dict(reply)
