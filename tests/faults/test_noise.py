"""Promise 10, the noise: what libraries, C code and child processes print reaches the log, cleaned and bounded."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.engine import run_log, stray_output
from lorasmith.engine.run_log import LOG_BYTES, RunLog
from lorasmith.engine.stray_output import StrayOutput
from tests.faults.hosted import HostedRun, wait_until
from tests.tui.terminal_program import ROOT

KINDS = 9
"""Ways in which `hosted_run.make_noise` makes noise."""
HELP = "judge by the previews"
Record = Callable[[int, str, str], None]


@pytest.mark.parametrize("mode", ["headless", "screen"])
def test_ten_megabytes_of_noise_reach_the_log_cleaned_and_never_the_screen(
    tmp_path: Path, mode: str, campaign: bool, record: Record
) -> None:
    size = 10_000_000 // KINDS if campaign else 150_000
    run = HostedRun(tmp_path, mode, noise=size).wait_for_steps()
    try:
        slowest = 0.0
        while not (tmp_path / "noisy").exists() and run.process.poll() is None:
            slowest = max(slowest, press_help(run)) if mode == "screen" else slowest
            run.read(0.1)
        if HELP in run.text():
            press_help(run)
        run.wait_for_steps(20)
        assert wait_until(lambda: "NOISE" in run.log())
        run.signal(15)
        assert run.wait() == 130
        assert b"NOISE" not in run.output
        assert b"pwned" not in run.output
        logs = [path.read_bytes() for path in run.run.glob("run.log*")]
        assert b"NOISE \\x1b[2J\\x1b]0;pwned\\x07" in b"".join(logs)
        assert not any(byte < 32 and byte != 10 for log in logs for byte in set(log))
        assert all(len(log) <= LOG_BYTES for log in logs)
        assert not list(tmp_path.rglob("*.output"))
        record(10, f"bytes of noise in {KINDS} ways, on the terminal ({mode})", f"0 of {size * KINDS}")
        if slowest:
            record(10, "slowest answer to a key during the noise", f"{slowest * 1000:.0f} ms")
            assert slowest < 5.0
    finally:
        run.close()


def press_help(run: HostedRun) -> float:
    """Open the help or close it, and return how long that took in seconds."""
    opened = HELP in run.text()
    begun = time.monotonic()
    run.type("\x1b" if opened else "?")
    assert run.wait_for(lambda: (HELP in run.text()) != opened, 20), run.text()
    return time.monotonic() - begun


def test_lines_without_an_end_and_progress_bars_are_told_by_their_last_state(tmp_path: Path) -> None:
    # Opened here and not in a fixture: pytest moves the descriptors between the two.
    with contextlib.closing(StrayOutput(tmp_path / "run.log")):
        os.write(1, b"\r10 %\r50 %\r100 %\n")
        os.write(2, b"half a line")
        assert wait_until(lambda: "half a line" in (tmp_path / "run.log").read_text())
    log = (tmp_path / "run.log").read_text()
    assert "lorasmith.output: 100 %" in log
    assert "50 %" not in log


def test_a_flood_within_a_moment_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    with contextlib.closing(StrayOutput(tmp_path / "run.log")):
        os.write(1, b"first\n" + b"flood " * 100_000 + b"\n")
        os.write(2, b"last\n")
    log = (tmp_path / "run.log").read_text()
    assert "first" in log
    assert "last" in log
    assert "bytes of output were left out here: too much within a moment" in log
    assert len(log) < 2_000_000


def test_the_file_behind_the_descriptors_is_emptied_and_goes_with_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stray_output, "KEEP_BYTES", 1000)
    stray = StrayOutput(tmp_path / "run.log")
    (raw,) = tmp_path.glob("*.output")
    os.write(1, b"many words\n" * 1000)
    assert wait_until(lambda: raw.stat().st_size == 0)
    os.write(1, b"afterwards\n")
    stray.close()
    assert "afterwards" in (tmp_path / "run.log").read_text()
    assert not raw.exists()


def test_the_last_words_of_a_process_that_died_suddenly_are_in_the_log_of_the_next(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from lorasmith.engine.stray_output import StrayOutput
StrayOutput(Path({str(tmp_path / "run.log")!r}))
os.write(2, b"terminate called after throwing an instance of \\x1b[31m'c10::Error'\\n")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -9
    StrayOutput(tmp_path / "run.log").close()
    log = (tmp_path / "run.log").read_text()
    assert "ended suddenly" in log
    assert r"instance of \x1b[31m'c10::Error'" in log
    assert not list(tmp_path.glob("*.output"))


def test_a_log_never_grows_beyond_two_files_of_its_size_and_both_are_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "LOG_BYTES", 10_000)
    log, same = RunLog(tmp_path / "run.log"), RunLog(tmp_path / "run.log")
    for number in range(1000):
        logging.getLogger("a_library").error("line %04d of a library that never stops", number)
    log.close()
    logging.getLogger("a_library").error("the file is still open for the other")
    same.close()
    files = sorted(tmp_path.glob("run.log*"))
    assert [file.name for file in files] == ["run.log", "run.log.1"]
    assert all(file.stat().st_size <= 10_000 and file.stat().st_mode & 0o777 == 0o600 for file in files)
    text = files[0].read_text()
    assert text.count("line 0999") == 1
    assert "still open for the other" in text


def test_standard_output_is_given_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stray = StrayOutput(tmp_path / "run.log")
    os.write(1, b"hidden\n")
    stray.close()
    stray.close()
    os.write(1, b"shown\n")
    assert capfd.readouterr().out == "shown\n"
