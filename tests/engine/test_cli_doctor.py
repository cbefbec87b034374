"""What `lorasmith doctor` prints: readable in 80 columns, fixes that can be copied whole, and everything as JSON."""

from __future__ import annotations

import json
import os
import pty
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lorasmith.engine import doctor
from lorasmith.engine.cli import main
from lorasmith.engine.cli.doctor import check_lines, summary
from lorasmith.engine.doctor import Check, trials
from lorasmith.engine.errors import HardwareError

GOOD = Check("python", "pass", "Python 3.11.7")
DRIVER = Check(
    "driver",
    "fail",
    "driver 550 is too old",
    "pip install torch==2+cu126 --index-url https://x/" + "y" * 90,
    "It ends.",
)
BROKEN = trials.explained(Check("bitsandbytes", "fail", "ImportError: a library " + "is missing " * 9))
TMUX = Check("tmux", "warn", "escape-time 500", "tmux set -s escape-time 10", "Escape is felt after 500 ms.")
SKIPPED = Check("hub", "skip", "not asked")
ALL = (GOOD, DRIVER, BROKEN, TMUX, SKIPPED)


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Check]], None]:
    def make(checks: Sequence[Check]) -> None:
        def run_checks(*_: Any, on_check: Any, on_start: Any, **__: Any) -> list[Check]:
            for check in checks:
                on_start(check.name)
                on_check(check)
            return list(checks)

        monkeypatch.setattr(doctor, "run_checks", run_checks)

    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: os.terminal_size((80, 24)))
    return make


def test_checks_are_printed_under_their_subject_with_what_they_mean_and_what_mends_them(
    finds: Callable[[Sequence[Check]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    finds(ALL)
    assert main(["doctor"]) == HardwareError.exit_code
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in doctor.GROUPS] == [
        "Installation",
        "Graphics card",
        "Savings",
        "Screen",
        "Hub",
    ]
    assert "ok     python        Python 3.11.7" in lines
    assert "FAILED driver        driver 550 is too old" in lines
    assert "off    bitsandbytes  ImportError: a library is missing is missing is missing is" in lines
    assert f"  fix: {DRIVER.fix}" in lines, "whole, to be copied"
    assert all(len(line) < 80 for line in lines if "fix: " not in line)
    said = " ".join(lines)
    assert "Cannot be chosen here: optimizer.name adamw8bit, paged_adamw, paged_adamw8bit," in said
    assert "Mend this before training: driver. 1 of 5 checks passed in 0.0 s. To look at: bitsandbytes, tmux." in said
    assert "Its optimizers cannot be chosen; adamw and the others work." in said.replace(" " * 21, "")


def test_a_failed_optional_part_is_no_error(finds: Callable[[Sequence[Check]], None]) -> None:
    finds((GOOD, BROKEN, TMUX))
    assert main(["doctor"]) == 0
    assert summary((GOOD, TMUX), 3.21) == [
        "",
        "This machine can train. 1 of 2 checks passed in 3.2 s. To look at: tmux.",
    ]


def test_the_document_has_everything(
    finds: Callable[[Sequence[Check]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    finds(ALL)
    assert main(["doctor", "--json"]) == HardwareError.exit_code
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert found["driver"] == {
        "group": "Graphics card",
        "name": "driver",
        "status": "fail",
        "detail": DRIVER.detail,
        "fix": DRIVER.fix,
        "meaning": "It ends.",
        "disables": [],
        "disables_together": [],
        "optional": False,
        "crashed": False,
        "speedup": 0.0,
        "seconds": 0.0,
        "blocking": True,
    }
    assert ["optimizer.name", "adamw8bit"] in found["bitsandbytes"]["disables"]
    assert (found["bitsandbytes"]["blocking"], found["hub"]["status"]) == (False, "skip")


def test_passed_and_skipped_checks_take_one_line() -> None:
    assert check_lines(Check("swap", "pass", "none", meaning="x"), 80) == ["ok     swap          none"]
    assert check_lines(Check("swap", "skip", "none", fix="y"), 80) == ["-      swap          none"]


TWO_CHECKS = """
import sys, time
from lorasmith.engine import doctor
from lorasmith.engine.cli import main
def run_checks(output, *, ask_hub, on_check, on_start):
    for name in ("python", "terminal", "tmux"):
        on_start(name)
        time.sleep(0.25)
        on_check(doctor.Check(name, "pass", "Fine \\x1b[31m"))
    return []
doctor.run_checks = run_checks
sys.exit(main(["doctor"]))
"""


def test_on_a_terminal_the_check_that_runs_is_shown_with_its_time_and_leaves_no_trace() -> None:
    import pyte

    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", TWO_CHECKS], {**os.environ, "TERM": "xterm-256color"})
    said = b""
    while True:
        try:
            got = os.read(terminal, 4096)
        except OSError:
            break
        if not got:
            break
        said += got
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, said.decode()
    text = said.decode()
    assert "trying python" in text
    assert "0:00:00" in text
    assert "trying tmux" in text, "it goes on after the terminal's own check"
    screen = pyte.Screen(80, 24)
    pyte.ByteStream(screen).feed(said)
    lines = [line.rstrip() for line in screen.display if line.strip()]
    assert lines[:5] == [
        "Installation",
        "ok     python        Fine \\x1b[31m",
        "Screen",
        "ok     terminal      Fine \\x1b[31m",
        "ok     tmux          Fine \\x1b[31m",
    ]
    assert "trying" not in " ".join(lines)
