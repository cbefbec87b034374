"""The end of a run: the user's command, and what the terminal is told."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorasmith.engine import end_notice
from lorasmith.engine.end_notice import missing_program, run_on_finish, terminal_notice, tmux_passes_through
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.events import RunEnded
from lorasmith.engine.run_file import Layer, resolve_config

ENDED = RunEnded(outcome="finished", step=30, message="Training finished\x1b[2J after 30 steps.")


@pytest.fixture
def run(tmp_path: Path) -> Any:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "dog.safetensors").touch()
    return SimpleNamespace(path=tmp_path, export=tmp_path / "export")


def program(folder: Path, text: str) -> str:
    """Write a Python program with a blank in its path and return the command line that starts it."""
    path = folder / "my program.py"
    path.write_text(text)
    return f"{sys.executable} '{path}'"


def test_the_command_finds_the_outcome_in_its_environment_and_its_output_is_logged(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = program(tmp_path, "import os, sys\nfor n in sys.argv[1:]: print(n, os.environ['LORASMITH_' + n])")
    with caplog.at_level(logging.INFO, "lorasmith"):
        assert run_on_finish(f"{command} OUTCOME RUN STEP MESSAGE LORA", ENDED, run) == ""
    for told in (
        "OUTCOME finished",
        f"RUN {tmp_path}",
        "STEP 30",
        "MESSAGE Training finished\\x1b[2J after 30 steps.",
        f"LORA {tmp_path}/export/dog.safetensors",
    ):
        assert told in caplog.text


def test_no_shell_reads_the_command(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = program(tmp_path, "import sys\nprint(sys.argv[1:], sys.stdin.read() == '')")
    with caplog.at_level(logging.INFO, "lorasmith"):
        assert run_on_finish(f"{command} $HOME '; touch {tmp_path}/made' | cat", ENDED, run) == ""
    assert f"['$HOME', '; touch {tmp_path}/made', '|', 'cat'] True" in caplog.text
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("", ""),
        ("no-such-program-here", "could not be started: no-such-program-here: No such file or directory."),
        ("false", "ended with code 1: false."),
        ("sh -c 'kill -9 $$'", "was ended by SIGKILL: sh."),
        ("'open", "run.on_finish is no command line"),
    ],
)
def test_what_goes_wrong_is_returned_in_words(run: Any, command: str, problem: str) -> None:
    assert problem in run_on_finish(command, ENDED, run)


def test_a_command_that_does_not_end_is_ended_with_all_it_started(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_notice, "COMMAND_SECONDS", 0.5)
    command = f"sh -c 'sleep 600 & echo $! > {tmp_path}/child; sleep 600'"
    assert "did not end within" in run_on_finish(command, ENDED, run)
    child = int((tmp_path / "child").read_text())
    pause = threading.Event()
    for _ in range(500):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text():
            break
        pause.wait(0.01)
    else:
        raise AssertionError("the child still runs")


def test_a_background_program_of_the_command_is_not_waited_for(run: Any) -> None:
    assert run_on_finish("sh -c 'sleep 5 &'", ENDED, run) == ""


def test_a_flood_of_output_is_cut(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lorasmith"):
        assert run_on_finish(program(tmp_path, "print('x' * 200_000)"), ENDED, run) == ""
    assert "more bytes were left out" in caplog.text
    assert len(caplog.text) < 100_000


def test_an_open_quote_is_refused_with_the_settings_and_a_missing_program_is_named() -> None:
    with pytest.raises(ConfigError, match=r"run\.on_finish"):
        resolve_config([Layer("test", {"run": {"on_finish": 'notify-send "open'}})])
    assert missing_program("no-such-program --flag") == "no-such-program"
    assert missing_program("sh -c true") == ""
    assert missing_program("") == ""


@pytest.mark.parametrize(
    ("environ", "passthrough", "notice"),
    [
        ({"TERM": "dumb"}, False, ""),
        ({}, False, ""),
        ({"TERM": "linux"}, False, "\a"),
        ({"TERM": "screen", "STY": "1.pts"}, False, "\a"),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/x,1,0"}, False, "\a"),
    ],
)
def test_terminals_without_messages_get_the_bell_or_nothing(
    environ: dict[str, str], passthrough: bool, notice: str
) -> None:
    assert terminal_notice(ENDED, "run", environ, passthrough=passthrough) == notice


def test_a_message_cannot_be_left_by_what_it_says() -> None:
    ended = RunEnded(outcome="failed", step=1, message="a\x1b\\\x1b]0;pwned\x07\x9c b" + "c" * 900)
    notice = terminal_notice(ended, "4;1;run\x07", {"TERM": "xterm"})
    assert notice.startswith("\a\x1b]9;lorasmith: 4;1;run")
    assert notice.endswith("\x1b\\")
    inside = notice.removeprefix("\a\x1b]9;").removesuffix("\x1b\\")
    assert not {"\x1b", "\x07", "\x9c"} & set(inside)
    assert len(inside) == 200


def test_tmux_passes_a_message_on_in_its_envelope_and_only_if_it_is_asked_and_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"TERM": "tmux", "TMUX": "/tmp/x,1,0"}
    wrapped = terminal_notice(ENDED, "run", environ, passthrough=True)
    assert wrapped.startswith("\a\x1bPtmux;\x1b\x1b]9;lorasmith: run finished.")
    assert wrapped.endswith("\x1b\x1b\\\x1b\\")
    fake = tmp_path / "tmux"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for answer, passes in (("on", True), ("all", True), ("off", False), ("", False)):
        fake.write_text(f"#!/bin/sh\necho {answer}\n")
        fake.chmod(0o755)
        assert tmux_passes_through({**os.environ, **environ}) is passes
    assert not tmux_passes_through({**os.environ, "TMUX": ""})
