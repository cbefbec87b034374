"""Over SSH, the review says what a dropped connection does to a training, and offers to go on inside tmux."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.tui import disconnect
from lorasmith.tui.app import LorasmithApp
from lorasmith.tui.disconnect import disconnect_words, ends_at_logout, is_unprotected, tmux_command
from lorasmith.tui.draft import Draft
from tests.tui.conftest import go_to, screen_text, settle
from tests.tui.terminal_program import TerminalProgram
from tests.tui.tmux import TMUX

MakeApp = Callable[..., LorasmithApp]


@pytest.fixture
def over_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.1 50000 192.0.2.2 22")
    for name in ("TMUX", "STY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environ", "unprotected"),
    [
        ({}, False),
        ({"SSH_CONNECTION": "a"}, True),
        ({"SSH_TTY": "/dev/pts/1"}, True),
        ({"SSH_TTY": "/dev/pts/1", "TMUX": "x"}, False),
        ({"SSH_CONNECTION": "a", "STY": "x"}, False),
    ],
)
def test_only_a_remote_terminal_outside_a_multiplexer_is_unprotected(
    environ: dict[str, str], unprotected: bool
) -> None:
    assert is_unprotected(environ) is unprotected


@pytest.mark.parametrize(
    ("kills", "linger", "ends"),
    [("b false", "", False), ("b true", "no", True), ("b true", "yes", False), ("", "yes", None)],
)
def test_what_systemd_does_at_the_logout_is_asked_and_not_guessed(kills: str, linger: str, ends: bool | None) -> None:
    assert ends_at_logout(lambda command: linger if command[0] == "loginctl" else kills) is ends


def test_the_words_follow_from_what_was_found_out() -> None:
    assert "training goes on without its screen" in disconnect_words(False, True)
    assert "lorasmith attach" in disconnect_words(False, True)
    assert "KillUserProcesses" not in disconnect_words(False, True)
    assert "enable-linger" in disconnect_words(True, True)
    assert "KillUserProcesses=yes it would be ended" in disconnect_words(None, True)
    assert "x starts the wizard again there" in disconnect_words(False, True)
    assert "install tmux" in disconnect_words(False, False)


def test_no_token_is_on_the_command_line_of_tmux() -> None:
    command = tmux_command({"HF_TOKEN": "hf_secret", "LORASMITH_CACHE": "/c d", "PATH": "/bin"}, "tmux")
    assert "hf_secret" not in " ".join(command)
    assert {"LORASMITH_CACHE=/c d", "PATH=/bin", "LORASMITH_CONTINUE=1"} <= set(command)


@pytest.mark.usefixtures("over_ssh")
async def test_the_review_offers_tmux_and_keeps_the_draft(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disconnect.shutil, "which", lambda name: f"/usr/bin/{name}")
    app = make_app(Draft())
    async with app.run_test(size=(120, 36)) as pilot:
        await go_to(pilot, "review")
        assert "training goes on without its screen" in " ".join(screen_text(app).split())
        await pilot.press("x")
        await pilot.pause()
    assert app.for_tmux
    assert app.file.path.exists()


@pytest.mark.usefixtures("over_ssh")
async def test_without_tmux_the_review_says_how_to_install_it(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disconnect.shutil, "which", lambda name: None)
    app = make_app(Draft())
    async with app.run_test(size=(120, 36)) as pilot:
        await go_to(pilot, "review")
        await pilot.press("x")
        await pilot.pause()
        assert "tmux is not installed here" in screen_text(app)
        assert not app.for_tmux


async def test_a_local_terminal_gets_no_such_line(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSH_CONNECTION", "SSH_TTY"):
        monkeypatch.delenv(name, raising=False)
    app = make_app(Draft())
    async with app.run_test(size=(120, 36)) as pilot:
        await go_to(pilot, "review")
        assert "connection drops" not in screen_text(app)


async def test_ctrl_z_is_told_why_it_does_nothing(make_app: MakeApp) -> None:
    app = make_app(Draft())
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot)
        await pilot.press("ctrl+z")
        await pilot.pause()
        assert any("would stop the training" in toast.message for toast in app._notifications)


@pytest.mark.skipif(TMUX is None, reason="tmux is not installed")
def test_x_on_the_review_really_goes_on_inside_tmux_with_what_was_typed(tmp_path: Path) -> None:
    environ = {
        "SSH_CONNECTION": "192.0.2.1 50000 192.0.2.2 22",
        "TMUX": "",
        "TMUX_TMPDIR": str(tmp_path),
        "HOME": str(tmp_path),
        "LORASMITH_STATE": str(tmp_path / "state"),
        "LORASMITH_CACHE": str(tmp_path / "cache"),
        "LC_ALL": "C.UTF-8",
    }
    program = TerminalProgram(["-m", "lorasmith.tui", "demo"], environ=environ)
    try:
        assert program.wait_for(lambda: "Press Enter to begin" in program.text(), 40), program.text()
        program.type("4")
        assert program.wait_for(lambda: "Step 4/6" in program.text(), 40), program.text()
        program.type("\x05\x15ohwx\x1b")
        assert program.wait_for(lambda: "Step 3/6" in program.text(), 40), program.text()
        program.type("\x1b")
        assert program.wait_for(lambda: "Step 2/6" in program.text(), 40), program.text()
        program.type("6")
        assert program.wait_for(lambda: "Step 6/6" in program.text(), 40), program.text()
        program.type("x")
        assert wait_for_pane(environ, "Step 6/6", "ohwx")
    finally:
        subprocess.run([str(TMUX), "kill-server"], env={**os.environ, **environ}, check=False)
        program.close()


def wait_for_pane(environ: dict[str, str], *words: str) -> bool:
    """Wait until the only pane of the server shows `words`."""
    shown, end = "", time.monotonic() + 40
    while not all(word in shown for word in words) and time.monotonic() < end:
        done = subprocess.run(
            [str(TMUX), "capture-pane", "-p"], env={**os.environ, **environ}, capture_output=True, check=False
        )
        shown = done.stdout.decode(errors="replace")
        time.sleep(0.1)
    assert all(word in shown for word in words), shown
    return True
