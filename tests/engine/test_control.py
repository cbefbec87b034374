"""The control socket of a run: private, quick, and indifferent to whatever its clients do."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import control, control_socket
from lorasmith.engine.commands import Command
from lorasmith.engine.control import ask, running_runs
from lorasmith.engine.control_socket import MAX_PATH_BYTES, socket_name
from lorasmith.engine.errors import ConfigError, StorageError
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import RunLock
from lorasmith.engine.runtime_folder import require_private, runtime_folder, runtime_folders
from tests.engine.answering import Running, connect
from tests.tui.terminal_program import ROOT


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for sockets with a short path, this test's own."""
    with tempfile.TemporaryDirectory(prefix="ls-") as made:
        monkeypatch.setenv("LORASMITH_RUNTIME", made)
        yield Path(made)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    run = Running(tmp_path / "runs" / "cat-1")
    yield run
    run.end()


def say(run: RunFolder, data: bytes) -> Any:
    with connect(run) as link:
        link.sendall(data)
        return json.loads(link.makefile("rb").readline())


def test_a_run_tells_who_works_on_it_and_what_its_host_says(running: Running) -> None:
    answer = ask(running.run, {"request": "status"})
    assert answer["step"] == 7
    assert (answer["pid"], answer["host"]) == (os.getpid(), socket.gethostname())
    assert answer["run"] == str(running.run.path)
    assert abs(answer["started"] - time.time()) < 60
    assert ask(running.run, {"request": "ping"})["pid"] == os.getpid()


def test_every_command_reaches_the_run(running: Running) -> None:
    for command in Command:
        assert ask(running.run, {"request": command.value}) == {"ok": True}
    assert running.sent == list(Command)


@pytest.mark.parametrize(
    "line",
    [
        b"\n", b"{}\n", b"[]\n", b"null\n", b'{"request": 5}\n', b'{"request": ["stop"]}\n', b'{"request": "dance"}\n',
        b"\xff\xfe\x00\n", b"[" * 4000 + b"\n", b'{"request": "stop"' + b"\n", b"x" * 5000 + b"\n", b"x" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_in_words(running: Running, line: bytes) -> None:
    answer = say(running.run, line)
    assert answer["ok"] is False
    assert answer["error"]
    assert running.sent == []


def test_a_refused_request_is_an_error_in_words(running: Running) -> None:
    with pytest.raises(ConfigError, match="refused: Requests are: ping, status, pause"):
        ask(running.run, {"request": "dance"})


def test_a_status_that_fails_neither_ends_the_server_nor_the_run(tmp_path: Path) -> None:
    run = Running(tmp_path / "run")
    run.server._status = lambda: {}["missing"]
    with pytest.raises(ConfigError, match="failed here"):
        ask(run.run, {"request": "status"})
    assert ask(run.run, {"request": "ping"})["ok"]
    run.end()


def test_idle_connections_never_lock_others_out(running: Running) -> None:
    idle = [connect(running.run) for _ in range(control.MAX_CLIENTS + 10)]
    assert ask(running.run, {"request": "ping"}, timeout=20)["ok"]
    for link in idle:
        link.close()


def test_a_silent_client_is_let_go_in_time(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CLIENT_SECONDS", 0.2)
    with connect(running.run) as link:
        link.sendall(b'{"request"')
        assert link.recv(10) == b""


def test_nobody_asking_costs_no_processor_time(running: Running) -> None:
    ask(running.run, {"request": "ping"})
    threads = {thread.name: thread for thread in threading.enumerate()}
    path = Path(f"/proc/self/task/{threads['control'].native_id}/stat")

    def ticks() -> int:
        return sum(int(value) for value in path.read_text().rpartition(")")[2].split()[11:13])

    time.sleep(0.1)
    before = ticks()
    time.sleep(1.0)
    assert ticks() - before <= 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_are_sent_away_even_where_the_folder_is_open(running: Running, folder: Path) -> None:
    path = folder / f"{socket_name(running.run)}.sock"
    folder.chmod(0o755)
    path.chmod(0o666)
    child = os.fork()
    if child == 0:
        received = b"?"
        try:
            os.setgid(65534)
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
                link.connect(str(path))
                received = b""
                link.settimeout(20)
                link.sendall(b'{"request": "stop"}\n')
                received = link.recv(100)
        except (BrokenPipeError, ConnectionError):
            pass
        finally:
            os._exit(1 if received else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert running.sent == []
    assert ask(running.run, {"request": "ping"})["ok"]


def test_the_socket_and_its_folder_are_private(running: Running, folder: Path) -> None:
    path = folder / f"{socket_name(running.run)}.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_closing_takes_the_socket_away_and_is_said_in_words(tmp_path: Path, folder: Path) -> None:
    run = Running(tmp_path / "run")
    assert sorted(path.suffix for path in folder.iterdir()) == [".run", ".sock"]
    run.end()
    run.server.close()
    assert list(folder.iterdir()) == []
    with pytest.raises(ConfigError, match=r"Nobody works on the run run\..*train --resume"):
        ask(run.run, {"request": "ping"})


def test_a_run_without_a_socket_names_who_works_on_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = RunFolder(tmp_path / "run")
    lock = RunLock(run)
    with pytest.raises(StorageError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        ask(run, {"request": "ping"})
    lock.release()


def test_a_process_that_does_not_answer_is_said(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = RunFolder(tmp_path / "run")
    lock, silent = RunLock(run), control_socket.ListeningSocket(run)
    with pytest.raises(StorageError, match=r"did not answer within 0\.2 s"):
        ask(run, {"request": "ping"}, timeout=0.2)
    silent.remove()
    lock.release()


@pytest.mark.parametrize("answer", [b"", b"half", b"nonsense\n", b"[]\n", b"x" * (2 << 16)])
def test_an_answer_that_is_none_is_said(tmp_path: Path, answer: bytes) -> None:
    (tmp_path / "run").mkdir()
    run = RunFolder(tmp_path / "run")
    lock, odd = RunLock(run), control_socket.ListeningSocket(run)
    odd.link.setblocking(True)

    def serve() -> None:
        link, _ = odd.link.accept()
        with link:
            link.recv(100)
            link.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(StorageError, match="did not answer"):
        ask(run, {"request": "ping"})
    thread.join()
    odd.remove()
    lock.release()


def test_a_request_waits_its_turn_where_the_line_is_full(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = RunFolder(tmp_path / "run")
    lock, busy = RunLock(run), control_socket.ListeningSocket(run)
    busy.link.listen(0)
    busy.link.setblocking(True)
    waiting = connect(run)
    good: list[Any] = []
    asking = threading.Thread(target=lambda: good.append(ask(run, {"request": "ping"}, timeout=20)))
    asking.start()
    asking.join(0.2)
    assert (asking.is_alive(), good) == (True, [])
    waiting.close()
    busy.link.accept()[0].close()
    link, _ = busy.link.accept()
    with link:
        link.recv(100)
        link.sendall(b'{"ok": true}\n')
    asking.join()
    assert good == [{"ok": True}]
    busy.remove()
    lock.release()


KILLED = """
import sys, time
from pathlib import Path
from tests.engine.answering import Running
running = Running(Path(sys.argv[1]))
print("up", flush=True)
time.sleep(600)
"""


def start_and_kill(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert [run.path for run in running_runs()] == [path]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_what_a_killed_process_left_is_replaced_by_the_next_start(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "run"
    start_and_kill(path)
    assert len(list(folder.iterdir())) == 2
    with pytest.raises(ConfigError, match="Nobody works"):
        ask(RunFolder(path), {"request": "ping"})
    again = Running(path)
    assert ask(again.run, {"request": "ping"})["pid"] == os.getpid()
    assert len(list(folder.iterdir())) == 2
    again.end()


def test_living_runs_are_found_wherever_they_are_and_stale_ones_removed(tmp_path: Path, folder: Path) -> None:
    start_and_kill(tmp_path / "dead")
    (folder / "no-link.run").write_text("a file")
    one, two = Running(tmp_path / "here" / "b"), Running(tmp_path / "far away" / "a")
    assert [run.path for run in running_runs()] == [two.run.path, one.run.path]
    assert len(list(folder.iterdir())) == 5
    one.end()
    assert [run.name for run in running_runs()] == ["a"]
    two.end()
    assert running_runs() == []


def test_a_run_is_the_same_by_any_path(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(running.run.path)
    monkeypatch.chdir(tmp_path)
    for path in ("link", "runs/cat-1", "runs/../runs/cat-1"):
        assert ask(RunFolder(Path(path)), {"request": "ping"})["ok"]


def test_a_socket_that_was_deleted_comes_back(running: Running, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CHECK_SECONDS", 0.05)
    ask(running.run, {"request": "ping"})  # wakes the thread, which then looks
    for path in folder.iterdir():
        path.unlink()
    end = time.monotonic() + 30
    while not running_runs() and time.monotonic() < end:
        time.sleep(0.02)
    assert ask(running.run, {"request": "ping"})["ok"]


def test_a_run_moves_its_socket_when_the_session_folder_vanishes(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, shared = folder / "session", folder / "shared"
    session.mkdir()
    shared.mkdir()
    monkeypatch.delenv("LORASMITH_RUNTIME")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(session))
    monkeypatch.setattr("lorasmith.engine.runtime_folder.SHARED_TEMPORARY", shared)
    monkeypatch.setattr(control, "CHECK_SECONDS", 0.05)
    run = Running(tmp_path / "run")
    assert ask(run.run, {"request": "ping"})["ok"]
    (session / "lorasmith").rename(session.with_name("gone"))
    session.rmdir()
    end = time.monotonic() + 30
    while not list(shared.glob("*/*.sock")) and time.monotonic() < end:
        time.sleep(0.02)
    assert ask(run.run, {"request": "ping"})["ok"]
    assert shared in running_runs_folder(run.run).parents
    run.end()
    assert list(shared.glob("*/*")) == []


def running_runs_folder(run: RunFolder) -> Path:
    return next(path for path in control_socket.socket_paths(run) if path.exists())


@pytest.mark.parametrize("kind", ["link", "file", "open to others", "open to the group", "of another user"])
def test_a_folder_that_is_not_private_is_refused_with_its_reason(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "sockets"
    words = {"link": "it is a link", "file": "File exists", "of another user": "belongs to user 12345"}
    if kind == "link":
        (tmp_path / "real").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "real")
    elif kind == "file":
        path.touch()
    elif kind == "of another user":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        path.mkdir(mode=0o700)
        os.chown(path, 12345, -1)
    else:
        path.mkdir()
        path.chmod(0o770 if "group" in kind else 0o707)
    with pytest.raises(StorageError, match=words.get(kind, "others have rights")):
        require_private(path)


def test_the_folder_is_the_sessions_or_one_in_tmp(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORASMITH_RUNTIME")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    assert runtime_folder() == folder / "lorasmith"
    assert stat.S_IMODE(runtime_folder().stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / "missing"))
    assert folder not in runtime_folders()[0].parents
    assert runtime_folders()[-1] == Path(f"/tmp/lorasmith-{os.geteuid()}")


def test_a_path_too_long_for_a_socket_is_passed_over(tmp_path: Path, folder: Path) -> None:
    long = folder / ("x" * MAX_PATH_BYTES)
    long.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control_socket, "runtime_folders", lambda user=None: [long, folder])
        run = Running(tmp_path / "run")
        assert ask(run.run, {"request": "ping"})["ok"]
        run.end()
        patch.setattr(control_socket, "runtime_folders", lambda user=None: [long])
        with pytest.raises(StorageError, match="too long for a socket"):
            control_socket.ListeningSocket(run.run)
