"""In a real pty: a terminal that does not read holds nothing up, and quitting asks. What signals do: tests/faults."""

from __future__ import annotations

import itertools
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorasmith.tui.driver import MAX_QUEUED_FRAMES, SafeWriter
from tests.tui.terminal_program import TerminalProgram

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pty")
Start = Callable[..., TerminalProgram]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    programs: list[TerminalProgram] = []

    def run(steps: int, *extra: str) -> TerminalProgram:
        program = TerminalProgram(["-m", "tests.tui.hosted_app", str(tmp_path), str(steps), *extra])
        programs.append(program)
        assert program.wait_for(lambda: "Step" in program.text()), program.output[-2000:]
        return program

    yield run
    for program in programs:
        program.close()


def beats(folder: Path) -> list[float]:
    """Times of the steps; their numbers are contiguous."""
    lines = [line.split() for line in (folder / "beats").read_text().splitlines() if line.count(" ") == 1]
    assert [int(step) for step, _ in lines] == list(range(1, len(lines) + 1))
    return [float(moment) for _, moment in lines]


def wait_until(done: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    return done()


def test_a_terminal_that_does_not_read_holds_up_neither_training_nor_screen(start: Start, tmp_path: Path) -> None:
    program = start(100_000)
    moment = time.monotonic()
    time.sleep(2.0)  # nothing reads the master: the pty's buffer fills
    during = [at for at in beats(tmp_path) if at > moment]
    assert len(during) > 20
    gaps = [after - at for at, after in itertools.pairwise(during)]
    assert max(gaps) < 1.0
    step = len(beats(tmp_path))
    assert program.wait_for(lambda: any(f"Step {number}/" in program.text() for number in range(step, step + 400)))
    program.type("?")
    assert program.wait_for(lambda: "judge by the previews" in program.text())


def test_quitting_while_training_asks_and_then_waits_for_the_checkpoint(start: Start, tmp_path: Path) -> None:
    program = start(100_000)
    program.type("\x11")
    assert program.wait_for(lambda: "What shall become of it?" in program.text())
    program.type("n")
    assert program.wait_for(lambda: "What shall become of it?" not in program.text())
    program.type("\x11")
    assert program.wait_for(lambda: "What shall become of it?" in program.text())
    program.type("y")
    assert program.wait() == 130
    assert (tmp_path / "checkpoint").exists()


def test_writing_to_a_full_queue_drops_frames_and_asks_for_a_repaint_when_the_terminal_reads_again() -> None:
    reader, writer = os.pipe()
    recovered: list[bool] = []
    with os.fdopen(writer, "w") as file:
        safe = SafeWriter(file, on_recovered=lambda: recovered.append(True), on_lost=lambda: None)
        safe.start()
        begun = time.monotonic()
        for _ in range(MAX_QUEUED_FRAMES * 4):
            safe.write("x" * 20_000)
        assert time.monotonic() - begun < 1.0
        taken = 0
        deadline = time.monotonic() + 10
        while not recovered and time.monotonic() < deadline:
            # The writer tells of its recovery a moment after its last byte: a plain read could wait for ever then.
            if select.select([reader], [], [], 0.05)[0]:
                taken += len(os.read(reader, 65536))
        assert recovered
        assert taken < MAX_QUEUED_FRAMES * 4 * 20_000
        safe.stop()
        assert not safe.is_alive()
    os.close(reader)


def test_a_writer_without_a_terminal_goes_quiet_and_tells_it_once() -> None:
    reader, writer = os.pipe()
    lost: list[bool] = []
    with os.fdopen(writer, "w") as file:
        safe = SafeWriter(file, on_recovered=lambda: None, on_lost=lambda: lost.append(True))
        os.close(reader)
        safe.start()
        for _ in range(3 * MAX_QUEUED_FRAMES):
            safe.write("x")
        safe.stop()
        assert lost == [True]
        assert safe.dead
