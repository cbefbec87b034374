"""The control socket of a run: other processes of the same user ask for its state and send it commands.

One JSON line a connection, one JSON line back: {"request": "status"}, {"request": "ping"} or {"request": COMMAND} with
the name of a `Command`; the answer has "ok", and "error" in words where that is false. What a command did is told by
the journal, so that every viewer sees it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lorasmith.engine.commands import Command
from lorasmith.engine.control_socket import ListeningSocket, peer_user, run_owner, running_runs, socket_paths
from lorasmith.engine.errors import ConfigError, StorageError
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import lock_holder

MAX_REQUEST_BYTES = 4096
MAX_REPLY_BYTES = 1 << 16
MAX_CLIENTS = 64
ACCEPTS_PER_TURN = 16
CLIENT_SECONDS = 5.0
CHECK_SECONDS = 5.0
CONNECT_POLL_SECONDS = 0.02
REST_PER_WORK = 4.0
"""After each turn the thread rests this many times as long as it worked: a flood must not cost the training much."""

__all__ = ["ControlServer", "ask", "running_runs"]

logger = logging.getLogger("lorasmith.control")


@dataclass
class _Client:
    """One open connection."""

    link: socket.socket
    deadline: float
    received: bytearray = field(default_factory=bytearray)


class ControlServer:
    """Answers for `run` in a thread of its own, from `start` to `close`.

    `send` and `status` are called from that thread. Without a question the thread looks every five seconds whether its
    socket is still there (a logout empties $XDG_RUNTIME_DIR) and makes it anew where it is not.
    """

    def __init__(self, run: RunFolder, send: Callable[[Command], None], status: Callable[[], dict[str, Any]]) -> None:
        self._run = run
        self._send = send
        self._status = status
        self._started = time.time()
        self._clients: dict[int, _Client] = {}
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Make the socket and answer from now on; raises StorageError where no private folder can be had."""
        if self._thread is not None:
            raise RuntimeError("a control server starts once")
        self._listening = ListeningSocket(self._run)
        try:
            self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._selector = selectors.DefaultSelector()
        except OSError as error:
            self._listening.remove()
            raise StorageError("Commands from other terminals cannot be taken.", why=str(error.strerror)) from error
        self._selector.register(self._listening.link, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and take the socket away; harmless where it never started."""
        if self._thread is None or self._closing:
            return
        self._closing = True
        os.write(self._wake_writer, b"x")
        self._thread.join()
        for client in list(self._clients.values()):
            self._drop(client)
        self._selector.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)
        self._listening.remove()

    # The thread

    def _serve(self) -> None:
        checked = time.monotonic()
        while not self._closing:
            begun = None
            try:
                ready = self._selector.select(CLIENT_SECONDS / 5 if self._clients else CHECK_SECONDS)
                begun = time.thread_time()
                for key, _ in ready:
                    self._handle(key.fileobj)
                self._expire()
                if time.monotonic() - checked >= CHECK_SECONDS:
                    checked = time.monotonic()
                    self._keep_reachable()
            except Exception:
                logger.exception("the control socket had a problem; it goes on")
                time.sleep(1.0)
            if begun is not None and not self._closing:
                time.sleep(min(1.0, REST_PER_WORK * (time.thread_time() - begun)))

    def _handle(self, source: Any) -> None:
        if source is self._listening.link:
            self._accept()
        elif source != self._wake_reader:
            client = self._clients.get(source.fileno())
            if client is not None:
                self._receive(client)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                link, _ = self._listening.link.accept()
            except BlockingIOError:
                return
            except OSError:
                # No descriptor is left, for example. The connection stays ready, so waiting for it would not wait.
                time.sleep(0.2)
                return
            link.setblocking(False)
            if peer_user(link) not in (os.geteuid(), 0):
                link.close()
                continue
            if len(self._clients) >= MAX_CLIENTS:
                # The oldest has had the most time to ask; refusing the newest would let idle ones lock others out.
                self._drop(next(iter(self._clients.values())))
            self._clients[link.fileno()] = _Client(link, time.monotonic() + CLIENT_SECONDS)
            self._selector.register(link, selectors.EVENT_READ)

    def _receive(self, client: _Client) -> None:
        try:
            data = client.link.recv(MAX_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.received += data
        line, newline, _ = bytes(client.received).partition(b"\n")
        if len(line) > MAX_REQUEST_BYTES:
            self._reply(client, _refusal(f"A request has at most {MAX_REQUEST_BYTES} bytes."))
        elif newline:
            self._reply(client, self._answer_safely(line))
        elif not data:
            self._drop(client)

    def _answer_safely(self, line: bytes) -> dict[str, Any]:
        try:
            return self._answer(line)
        except Exception as error:
            logger.exception("a request failed")
            return _refusal(f"It failed here: {type(error).__name__}: {error}")

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(line)
        except (ValueError, RecursionError):
            return _refusal("A request is one line of JSON.")
        name = asked.get("request") if isinstance(asked, dict) else None
        who = {"pid": os.getpid(), "host": socket.gethostname(), "run": os.path.realpath(self._run.path)}
        if name == "ping":
            return {"ok": True, **who}
        if name == "status":
            return {**self._status(), "ok": True, **who, "started": self._started}
        if not isinstance(name, str) or name not in [command.value for command in Command]:
            return _refusal(f"Requests are: ping, status, {', '.join(Command)}.")
        self._send(Command(name))
        return {"ok": True}

    def _reply(self, client: _Client, answer: dict[str, Any]) -> None:
        data = json.dumps(answer, default=str).encode("ascii") + b"\n"
        # A socket's buffer holds more than an answer; who does not read it, is not waited for.
        with contextlib.suppress(OSError):
            client.link.send(data, socket.MSG_NOSIGNAL)
        self._drop(client)

    def _keep_reachable(self) -> None:
        if self._listening.is_reachable():
            return
        try:
            anew = ListeningSocket(self._run)
        except StorageError as error:
            logger.debug("the control socket cannot be made anew: %s", error)
            return
        self._selector.register(anew.link, selectors.EVENT_READ)
        self._quietly_unregister(self._listening.link)
        self._listening.link.close()
        self._listening = anew

    def _expire(self) -> None:
        now = time.monotonic()
        for client in [client for client in self._clients.values() if client.deadline <= now]:
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        self._clients.pop(client.link.fileno(), None)
        self._quietly_unregister(client.link)
        client.link.close()

    def _quietly_unregister(self, link: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(link)


def ask(run: RunFolder, request: dict[str, Any], timeout: float = 2.0) -> dict[str, Any]:
    """Send one request to the process that works on `run` and return its answer.

    Raises ConfigError where nobody works on the run or the request is refused, StorageError where the process cannot be
    reached or does not answer within `timeout` seconds.
    """
    data = json.dumps(request).encode("ascii") + b"\n"
    deadline = time.monotonic() + timeout
    with _connected(run, timeout, deadline) as link:
        try:
            link.sendall(data)
            line = _read_line(link, deadline)
            answer = json.loads(line)
        except (OSError, ValueError) as error:
            raise _no_answer(run, timeout) from error
    if not isinstance(answer, dict):
        raise _no_answer(run, timeout)
    if not answer.get("ok"):
        raise ConfigError(f"The run {run.name} refused: {answer.get('error', 'it did not say why')}")
    return answer


def _refusal(words: str) -> dict[str, Any]:
    return {"ok": False, "error": words}


@contextlib.contextmanager
def _connected(run: RunFolder, timeout: float, deadline: float) -> Iterator[socket.socket]:
    """Yield a connection to the process that works on `run`; it is of this user or of root."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(timeout)
        problem: OSError | None = None
        for path in socket_paths(run):
            try:
                _connect(link, os.fspath(path), deadline)
            except OSError as error:
                problem = error if problem is None or not isinstance(error, FileNotFoundError) else problem
                continue
            if peer_user(link) not in {os.geteuid(), 0, run_owner(run)}:
                raise StorageError(f"The socket {path} belongs to another user.", fix=f"Remove {path}.")
            yield link
            return
        raise _unreachable(run, problem)


def _connect(link: socket.socket, path: str, deadline: float) -> None:
    """Connect, and where many others wait in line, try again until the deadline: the system refuses at once then."""
    while True:
        try:
            return link.connect(path)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(CONNECT_POLL_SECONDS)


def _unreachable(run: RunFolder, problem: OSError | None) -> ConfigError | StorageError:
    holder = lock_holder(run)
    if holder is None:
        return ConfigError(
            f"Nobody works on the run {run.name}.",
            why="It has ended or was interrupted.",
            fix=f"Go on with it: lorasmith train --resume {run.path}",
        )
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
    if isinstance(problem, TimeoutError | BlockingIOError):
        return StorageError(f"The run {run.name} does not answer ({who}).", fix="Try again in a moment.")
    if isinstance(problem, PermissionError):
        return StorageError(f"The run {run.name} belongs to another user.", why=f"It is {who}.", fix="Ask that user.")
    return StorageError(
        f"The run {run.name} cannot be reached: {who} works on it.",
        why="Commands reach runs of the same user on the same machine only.",
        fix="Attach there, or watch it here: lorasmith attach --read-only",
    )


def _no_answer(run: RunFolder, timeout: float) -> ConfigError | StorageError:
    if lock_holder(run) is None:
        return _unreachable(run, None)
    return StorageError(
        f"The process of the run {run.name} did not answer within {timeout:g} s.",
        why="It is very busy, stopped or about to end.",
        fix="Try again in a moment.",
    )


def _read_line(link: socket.socket, deadline: float) -> bytes:
    """Return one line; raises OSError where it does not come in time, ValueError where it is cut or too long."""
    received = b""
    while not received.endswith(b"\n"):
        link.settimeout(max(0.01, deadline - time.monotonic()))
        data = link.recv(MAX_REPLY_BYTES)
        received += data
        if not data or len(received) > MAX_REPLY_BYTES or time.monotonic() > deadline:
            raise ValueError("no complete answer came")
    return received
