"""Starts several sessions on one run folder at the same instant, in real processes; driven by `test_two_starts`.

Reads one JSON line a race from stdin, {"starts": N, "end": "kill" or "stop"}, and answers with one: what each start
said, and who ran. The engine is imported once and each start is a fork of this process, which has no threads.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

from lorasmith.engine.commands import Command
from lorasmith.engine.errors import RunLockedError
from lorasmith.engine.events import RunEnded
from lorasmith.engine.run_lock import lock_holder
from lorasmith.engine.session import RunFolder, Session, open_run


def _wait_for_stop(run: Any, config: Any, host: Any) -> None:
    while host.wait_command(60) is not Command.STOP:
        pass
    host.emit(RunEnded(outcome="stopped", step=0, message="Stopped."))


def _start(run: RunFolder, gate: int, reports: int, end: int) -> None:
    """Start a session once `gate` opens, report how that went, and run until `end` is closed."""
    session = Session(run, run.load_config().config)
    os.read(gate, 1)
    try:
        session.start()
    except RunLockedError as error:
        os.write(reports, json.dumps({"pid": os.getpid(), "refused": f"{error.what} {error.why}"}).encode() + b"\n")
        return
    os.write(reports, json.dumps({"pid": os.getpid(), "refused": ""}).encode() + b"\n")
    os.read(end, 1)
    assert session.stop_and_join(30)


def _fork(run: RunFolder, pipes: list[tuple[int, int]]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        (gate, open_gate), (_, reports), (end, open_end) = pipes
        os.close(open_gate)
        os.close(open_end)
        _start(run, gate, reports, end)
        code = 0
    finally:
        os._exit(code)


def race(run: RunFolder, starts: int, end: str) -> dict[str, Any]:
    """Let `starts` processes start at once, end the one that runs, and return what everybody said."""
    pipes = [os.pipe() for _ in range(3)]
    (gate, open_gate), (read_reports, reports), (end_pipe, open_end) = pipes
    children = [_fork(run, pipes) for _ in range(starts)]
    for fd in (gate, reports, end_pipe):
        os.close(fd)
    os.close(open_gate)
    with os.fdopen(read_reports) as lines:
        said = [json.loads(lines.readline()) for _ in children]
    holder = lock_holder(run)
    runner = next((each["pid"] for each in said if not each["refused"]), None)
    if end == "kill" and runner:
        os.kill(runner, signal.SIGKILL)
    os.close(open_end)
    codes = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    return {"said": said, "codes": codes, "holder": holder, "after": lock_holder(run)}


def main() -> None:
    """Answer races until stdin ends."""
    trainer = sys.modules["lorasmith.engine.trainer"] = types.ModuleType("lorasmith.engine.trainer")
    trainer.train = _wait_for_stop  # type: ignore[attr-defined]
    run = open_run(Path(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(race(run, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
