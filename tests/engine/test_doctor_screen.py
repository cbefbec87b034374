"""What the doctor says about text, terminal, tmux and the Hub, each failure faked."""

from __future__ import annotations

import email.utils
import locale
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.doctor import hub_access, terminals, tmux
from lorasmith.engine.doctor.check import Check
from tests.engine.fake_hub import FakeHub

DEFAULTS = {
    "escape-time": "500",
    "default-terminal": "screen",
    "set-clipboard": "external",
    "extended-keys": "off",
    "allow-passthrough": "off",
    "mouse": "off",
}
GOOD = DEFAULTS | {"escape-time": "10", "default-terminal": "tmux-256color"}
SETTINGS = ("TMUX", "STY", "COLORTERM", "NO_COLOR", "SSH_CONNECTION", "KITTY_WINDOW_ID", "TERM_PROGRAM")


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((120, 40)))
    monkeypatch.setattr(terminals, "drawn_widths", lambda texts: dict(terminals.SAMPLES))


# Text and terminal


def test_a_locale_without_utf_8_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locale, "getpreferredencoding", lambda do: "ANSI_X3.4-1968")
    check = terminals.check_locale()
    assert (check.status, check.fix) == ("warn", "export LANG=C.UTF-8")
    assert "ANSI_X3.4-1968" in check.detail


def test_a_process_without_utf_8_says_so() -> None:
    code = "from lorasmith.engine.doctor.terminals import check_locale; print(check_locale().status)"
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}
    said = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code],
        env={**os.environ, **plain},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "warn\n"


@pytest.mark.parametrize(
    ("term", "size", "status"),
    [
        ("xterm-256color", (120, 40), "pass"),
        ("dumb", (120, 40), "warn"),
        ("", (120, 40), "warn"),
        ("x", (79, 24), "warn"),
        ("x", (80, 23), "warn"),
    ],
)
def test_the_terminal_must_be_known_and_large_enough(
    monkeypatch: pytest.MonkeyPatch, term: str, size: tuple[int, int], status: str
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("TMUX", "/tmp/tmux-0/default,1,0")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size(size))
    check = terminals.check_terminal()
    assert check.status == status
    assert f"inside tmux, {size[0]} x {size[1]}, true color" in check.detail
    assert bool(check.fix) == bool(check.meaning) == (status == "warn")


def test_few_colors_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "vt100")
    check = terminals.check_terminal()
    assert (check.status, check.fix) == ("warn", "export TERM=xterm-256color")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "NO_COLOR" in terminals.check_terminal().detail


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "pictures as half blocks"),
        ({"TERM": "xterm-kitty", "COLORTERM": "truecolor"}, "pictures by the kitty protocol"),
        ({"TERM_PROGRAM": "WezTerm"}, "pictures by the kitty protocol"),
        ({"TERM": "foot", "COLORTERM": "truecolor"}, "pictures by sixel"),
        ({"TERM_PROGRAM": "WezTerm", "TMUX": "x"}, "inside tmux"),
        ({"KITTY_WINDOW_ID": "1", "STY": "x"}, "inside GNU screen"),
        ({"SSH_CONNECTION": "10.0.0.1 1 10.0.0.2 22"}, "inside SSH"),
    ],
)
def test_how_pictures_are_drawn_and_what_is_around_is_told(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check = terminals.check_terminal()
    assert (check.status, words in check.detail) == ("pass", True), check
    assert "half blocks" in check.detail or not ({"TMUX", "STY"} & set(environment))


def test_mosh_is_recognized_by_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        def parents(self) -> list[Any]:
            return [self]

        def name(self) -> str:
            return "mosh-server"

    monkeypatch.setattr(terminals.psutil, "Process", Process)
    monkeypatch.setenv("SSH_CONNECTION", "x")
    assert "inside mosh," in terminals.check_terminal().detail


def test_characters_of_another_width_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminals, "drawn_widths", lambda texts: {"⣿": 1, "漢": 1})
    check = terminals.check_terminal()
    assert (check.status, "draws 漢 with another width" in check.detail) == ("warn", True)
    monkeypatch.setattr(terminals, "drawn_widths", lambda texts: {})
    assert terminals.check_terminal().status == "pass", "a terminal that does not answer is not blamed"


PROBE = """
import sys
from lorasmith.engine.doctor.cursor_probe import drawn_widths
import termios
before = termios.tcgetattr(0)
found = drawn_widths(["⣿", "漢"], float(sys.argv[1]))
assert termios.tcgetattr(0) == before
sys.stderr.write(repr(found))
"""


@pytest.mark.parametrize(("answers", "found"), [(True, {"⣿": 1, "漢": 2}), (False, {})])
def test_a_terminal_is_asked_how_wide_it_draws(answers: bool, found: dict[str, int], tmp_path: Path) -> None:
    said = tmp_path / "said"
    pid, terminal = pty.fork()
    if pid == 0:
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
        seconds = "10" if answers else "0.1"
        os.execve(sys.executable, [sys.executable, "-c", PROBE, seconds], {**os.environ, "PYTHONUTF8": "1"})
    watcher = threading.Thread(target=_play_terminal, args=(terminal, answers), daemon=True)
    watcher.start()
    assert os.waitpid(pid, 0)[1] == 0, said.read_text()
    watcher.join(5)
    os.close(terminal)
    assert said.read_text() == repr(found)


def _play_terminal(terminal: int, answers: bool) -> None:
    seen = b""
    while True:
        try:
            seen += os.read(terminal, 1024)
        except OSError:
            return
        while b"\x1b[6n" in seen:
            drawn, _, seen = seen.partition(b"\x1b[6n")
            if answers:
                os.write(terminal, b"\x1b[7;%dR" % (3 if "漢".encode() in drawn else 2))


# tmux


@pytest.fixture
def in_tmux(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Check]:
    def look(settings: dict[str, str], version: str = "tmux 3.3a", features: str = "256,RGB,title") -> Check:
        def ask(command: str, *arguments: str) -> str:
            if arguments == ("-V",):
                return version
            return settings.get(arguments[-1], "") if arguments[0] == "show" else features

        monkeypatch.setenv("TMUX", "/tmp/tmux-0/default,1,0")
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(tmux, "_ask", ask)
        return tmux.check_tmux()

    return look


def test_good_settings_of_tmux_pass_and_are_told(in_tmux: Callable[..., Check]) -> None:
    check = in_tmux(GOOD)
    assert (check.status, check.fix) == ("pass", "")
    assert check.detail == (
        "3.3a: escape-time 10, default-terminal tmux-256color, set-clipboard external, extended-keys off, "
        "allow-passthrough off, mouse off"
    )


def test_what_hurts_in_tmux_is_mended_by_one_line(in_tmux: Callable[..., Check]) -> None:
    check = in_tmux(DEFAULTS | {"set-clipboard": "off"}, features="256,title")
    assert (check.status, check.blocking) == ("warn", False)
    assert check.fix == (
        "tmux set -s escape-time 10 \\; set -g default-terminal tmux-256color \\; set -as terminal-features ',*:RGB' "
        "\\; set -s set-clipboard external   # lasts as a line of ~/.tmux.conf"
    )
    assert "Escape is felt after 500 ms." in check.meaning
    assert "approximated" in check.meaning
    assert "stays in tmux" in check.meaning


def test_an_old_tmux_is_told_and_one_that_does_not_answer_is_not_blamed(in_tmux: Callable[..., Check]) -> None:
    old = in_tmux(GOOD | {"extended-keys": ""}, version="tmux 2.9")
    assert (old.status, old.fix, "is old" in old.meaning) == ("warn", "Update tmux.", True)
    assert in_tmux({}, version="", features="").status == "pass"


def test_outside_tmux_nothing_is_asked_and_screen_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tmux, "_ask", lambda *_: 1 / 0)
    assert tmux.check_tmux().status == "skip"
    monkeypatch.setenv("STY", "1.pts")
    assert (tmux.check_tmux().status, tmux.check_tmux().detail) == ("warn", "inside GNU screen")


def test_a_tmux_that_hangs_or_is_gone_answers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "tmux"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setattr(tmux, "ANSWER_SECONDS", 0.1)
    assert tmux._ask(str(slow), "show") == ""
    assert tmux._ask(str(tmp_path / "none"), "show") == ""


@pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux")
def test_the_line_that_mends_tmux_is_taken_by_a_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which("tmux")
    assert real is not None
    socket = str(tmp_path / "socket")

    def run(*arguments: str) -> None:
        subprocess.run([real, "-S", socket, "-f", "/dev/null", *arguments], check=True, timeout=20)

    def look() -> Check:
        monkeypatch.setattr(shutil, "which", lambda name: real)
        return tmux.check_tmux()

    run("new-session", "-d", "-x", "80", "-y", "24", "sleep 100")
    try:
        # What a shell inside tmux has: its commands then go to that server.
        monkeypatch.setenv("TMUX", f"{socket},1,0")
        run("set", "-s", "escape-time", "500")
        check = look()
        assert (check.status, "escape-time 500" in check.detail) == ("warn", True), check
        subprocess.run(check.fix, shell=True, check=True, timeout=20)
        assert (look().status, "escape-time 10," in look().detail) == ("pass", True), look()
        every = tmux._wishes("3.3a", DEFAULTS | {"set-clipboard": "off"}, "256")
        for command, _ in every:
            subprocess.run(f"tmux {command}", shell=True, check=True, timeout=20)
    finally:
        run("kill-server")


# The Hub


@pytest.fixture
def token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")


def answers(hub: FakeHub, status: int = 200, *, date: float | None = None, gated: str = "") -> None:
    """Let the Hub answer with `status`, and ask for consent to the repository `gated`."""
    import httpx2

    def answer(request: Any) -> Any:
        headers = {} if date is None else {"Date": email.utils.formatdate(date, usegmt=True)}
        if gated and gated in request.url.path:
            return httpx2.Response(403, headers={"X-Error-Code": "GatedRepo"}, request=request)
        return httpx2.Response(status, headers=headers, json={"name": "somebody"}, request=request)

    hub.override = answer


def test_a_hub_that_answers_passes(hub: FakeHub) -> None:
    answers(hub, date=time.time())
    assert hub_access.check_hub().status == "pass"


def test_a_hub_that_is_not_reached_is_a_warning_without_the_token_in_it(hub: FakeHub) -> None:
    import httpx2

    def refuse(request: Any) -> Any:
        raise httpx2.ConnectError("no route to host with hf_0123456789abcdef\nmore")

    hub.override = refuse
    check = hub_access.check_hub()
    assert (check.status, check.blocking) == ("warn", False)
    assert check.detail.endswith("cannot be reached: no route to host with [token]")
    assert "HTTPS_PROXY" in check.fix
    assert "already on this machine" in check.meaning


def test_an_offline_setting_is_told_and_nothing_is_asked(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.override = lambda request: 1 / 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check = hub_access.check_hub()
    assert (check.status, check.fix) == ("warn", "unset HF_HUB_OFFLINE")


@pytest.mark.parametrize(("ahead", "words"), [(3600, "60 min ahead"), (-1800, "30 min behind")])
def test_a_clock_that_is_not_the_hubs_is_told(hub: FakeHub, ahead: int, words: str) -> None:
    answers(hub, date=time.time() - ahead)
    check = hub_access.check_hub()
    assert (check.status, words in check.detail, check.fix) == ("warn", True, "sudo timedatectl set-ntp true")


def test_a_missing_token_is_told(hub: FakeHub) -> None:
    check = hub_access.check_hub_token()
    assert (check.status, check.detail, check.fix) == ("warn", "no token", "hf auth login")


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(
    ("status", "words"), [(200, "valid, of somebody"), (401, "invalid or expired"), (500, "error 500")]
)
def test_a_token_is_tried(hub: FakeHub, status: int, words: str) -> None:
    answers(hub, status)
    check = hub_access.check_hub_token()
    assert (check.status, words in check.detail) == ("pass" if status == 200 else "warn", True), check


@pytest.mark.usefixtures("token")
def test_models_that_ask_for_consent_are_named(hub: FakeHub) -> None:
    from lorasmith.engine.families import families

    suggested = [repo for module in families().values() for repo in module.SPEC.hub_ids]
    answers(hub)
    check = hub_access.check_gated_models()
    assert (check.status, check.detail.split(" ")[:3]) == ("pass", [str(len(suggested)), "of", str(len(suggested))])
    answers(hub, gated=suggested[3])
    check = hub_access.check_gated_models()
    assert check.detail.endswith(f"consent is missing for {suggested[3]}")
    assert check.detail.startswith(f"{len(suggested) - 1} of ")
    assert check.fix == f"Accept the license at https://huggingface.co/{suggested[3]}, then: hf auth login"


@pytest.mark.usefixtures("token")
def test_without_a_hub_token_and_models_are_not_blamed(hub: FakeHub) -> None:
    import httpx2

    def refuse(request: Any) -> Any:
        raise httpx2.ConnectError("no route to host")

    hub.override = refuse
    for check in (hub_access.check_hub_token(), hub_access.check_gated_models()):
        assert (check.status, "the Hub cannot be asked (" in check.detail) == ("skip", True), check


@pytest.mark.usefixtures("token")
def test_models_that_are_not_told_about_in_time_are_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasmith.engine.families import families

    first = next(iter(families().values())).SPEC.hub_ids
    released = threading.Event()
    monkeypatch.setattr(hub_access, "_refusal", lambda repo: "" if repo in first else str(released.wait(10)))
    monkeypatch.setattr(hub_access, "GATED_SECONDS", 0.1)
    check = hub_access.check_gated_models()
    released.set()
    assert (check.status, check.detail.startswith(f"{len(first)} of "), "no answer for" in check.detail) == (
        "warn",
        True,
        True,
    )


def test_where_models_are_kept_is_checked_without_asking_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    assert hub_access.models_folder() == tmp_path / "hub"
