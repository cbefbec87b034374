"""A run without training that is locked and answers on its control socket."""

from __future__ import annotations

import socket
from pathlib import Path

from lorasmith.engine.commands import Command
from lorasmith.engine.control import ControlServer
from lorasmith.engine.control_socket import socket_name
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import RunLock
from lorasmith.engine.runtime_folder import runtime_folder


class Running:
    """A run that is locked and answers; its commands are kept."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / "run.toml").touch()
        self.run = RunFolder(path)
        self.lock = RunLock(self.run)
        self.sent: list[Command] = []
        self.server = ControlServer(self.run, self.sent.append, lambda: {"step": 7})
        self.server.start()

    def end(self) -> None:
        self.server.close()
        self.lock.release()


def connect(run: RunFolder) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.settimeout(20)
    link.connect(str(runtime_folder() / f"{socket_name(run)}.sock"))
    return link
