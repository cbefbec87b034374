"""Where the control socket of a run lies: its name, how it gets there, and which runs have one.

Beside `HASH.sock` lies the link `HASH.run` to the run folder, so that a living run is found from anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
from pathlib import Path

from lorasmith.engine.errors import StorageError
from lorasmith.engine.run_folder import RunFolder
from lorasmith.engine.run_lock import lock_holder
from lorasmith.engine.runtime_folder import privacy_problem, require_private, runtime_folders

MAX_PATH_BYTES = 107
"""Room for a socket's path in `sockaddr_un` (unix(7)), its final zero byte left out."""
BACKLOG = 64


class ListeningSocket:
    """The socket of `run`, with its names in the first private folder that can be had.

    Raises StorageError where there is none.
    """

    def __init__(self, run: RunFolder) -> None:
        refusal: StorageError | None = None
        for folder in runtime_folders():
            path = folder / f"{socket_name(run)}.sock"
            try:
                self.link = _bind(path)
                _put_link(path.with_suffix(".run"), os.path.realpath(run.path))
            except OSError as error:
                refusal = StorageError(f"Cannot make the socket {path}.", why=error.strerror or str(error))
            except StorageError as error:
                refusal = error
            else:
                self.path = path
                self._identity = _identity(path)
                return
        assert refusal is not None
        raise refusal

    def is_reachable(self) -> bool:
        """Tell whether the name still leads to this socket."""
        return self._identity is not None and _identity(self.path) == self._identity

    def remove(self) -> None:
        """Close it and take its names away, unless another process has taken them over."""
        self.link.close()
        if self.is_reachable():
            _unlink(self.path, self.path.with_suffix(".run"))


def socket_name(run: RunFolder) -> str:
    """Return the name of a run's socket without its ending: 16 digits that follow from the folder's real path."""
    return hashlib.sha256(os.fsencode(os.path.realpath(run.path))).hexdigest()[:16]


def socket_paths(run: RunFolder) -> list[Path]:
    """Return where the socket of `run` may be, whoever of this machine's users trains it."""
    return [folder / f"{socket_name(run)}.sock" for folder in runtime_folders(run_owner(run))]


def run_owner(run: RunFolder) -> int:
    """Return the id of the user who last worked on `run`, this process's own where nobody did."""
    try:
        return run.lock.stat().st_uid
    except OSError:
        return os.geteuid()


def running_runs() -> list[RunFolder]:
    """Return the runs of this user that are alive, wherever their folders are, by name.

    Alive means that the run's lock is held. What killed processes left behind is removed.
    """
    found: dict[str, RunFolder] = {}
    for folder in runtime_folders():
        for link in _links(folder):
            try:
                run = RunFolder(Path(os.readlink(link)))
            except OSError:
                continue
            if lock_holder(run) is not None:
                found[str(run.path)] = run
            else:
                # A server that starts at this very moment makes its names anew at its next check.
                _unlink(link, link.with_suffix(".sock"))
    return sorted(found.values(), key=lambda run: (run.name, str(run.path)))


def peer_user(link: socket.socket) -> int:
    """Return the user id of the process at the other end (SO_PEERCRED, unix(7): pid, uid, gid), -1 where unknown."""
    try:
        credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return -1
    return int(struct.unpack("3i", credentials)[1])


def _bind(path: Path) -> socket.socket:
    """Return a listening socket at `path` with mode 0600; what a killed process left there is replaced at once."""
    temporary = path.with_suffix(f".{os.getpid() % 100_000}")
    if max(len(os.fsencode(path)), len(os.fsencode(temporary))) > MAX_PATH_BYTES:
        raise StorageError(
            f"The path {path} is too long for a socket.", fix="Set LORASMITH_RUNTIME to a folder with a short path."
        )
    require_private(path.parent)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        temporary.unlink(missing_ok=True)
        listener.bind(os.fspath(temporary))
        temporary.chmod(0o600)
        listener.listen(BACKLOG)
        temporary.replace(path)
    except BaseException:
        listener.close()
        _unlink(temporary)
        raise
    return listener


def _put_link(link: Path, target: str) -> None:
    """Make `link` lead to `target`, whatever was there before."""
    temporary = link.with_suffix(f".{os.getpid() % 100_000}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _links(folder: Path) -> list[Path]:
    try:
        if privacy_problem(folder.lstat(), os.geteuid()):
            return []
        return sorted(folder.glob("*.run"))
    except OSError:
        return []


def _unlink(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
