"""Clients of a control socket that mean harm, or are many: the run stays reachable and is not disturbed."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorasmith.engine.control import ask
from lorasmith.engine.control_socket import socket_name
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.runtime_folder import runtime_folder
from tests.engine.answering import Running

Record = Callable[[int, str, str], None]


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    with tempfile.TemporaryDirectory(prefix="ls-") as made:
        monkeypatch.setenv("LORASMITH_RUNTIME", made)
        run = Running(tmp_path / "runs" / "cat-1")
        yield run
        run.end()


def hostile_clients(run: RunFolder, number: int) -> int:
    """Open connections of every bad kind, all at once, and return how many."""
    links = []
    for at in range(number):
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(20)
        try:
            link.connect(str(runtime_folder() / f"{socket_name(run)}.sock"))
            if at % 5 == 1:
                link.sendall(b'{"request": "st')  # half a line, and then silence
            elif at % 5 == 2:
                link.sendall(os.urandom(3000))
            elif at % 5 == 3:
                link.sendall(b'{"request": "status"}\n')  # never reads the answer
            elif at % 5 == 4:
                link.sendall(b"y" * 20_000)
                link.close()
        except OSError:
            pass  # the server took the connection back: it is free to
        links.append(link)
    for link in links:
        link.close()
    return len(links)


def test_a_thousand_hostile_clients_leave_the_run_reachable(running: Running, record: Record) -> None:
    before = len(os.listdir("/proc/self/fd"))
    sent = hostile_clients(running.run, 1000)
    answered = 0
    for _ in range(20):
        answered += ask(running.run, {"request": "ping"}, timeout=20)["ok"]
    assert answered == 20
    assert running.sent == []
    for _ in range(500):
        if len(running.server._clients) == 0:
            break
        time.sleep(0.02)
    assert len(os.listdir("/proc/self/fd")) == before
    record(6, "hostile connections to a control socket", f"{sent}, then {answered} of 20 requests answered")


def test_many_clients_are_answered_at_once(running: Running, record: Record) -> None:
    good: list[bool] = []
    threads = [
        threading.Thread(target=lambda: good.append(ask(running.run, {"request": "status"}, 30)["step"] == 7))
        for _ in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 50
    record(6, "clients of one control socket at once", f"{len(good)} of {len(threads)} answered")
