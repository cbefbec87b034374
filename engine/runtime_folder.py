"""The folder of this user's control sockets: private, and checked as tmux checks its own.

It is $LORASMITH_RUNTIME, else `lorasmith` in $XDG_RUNTIME_DIR, else /tmp/lorasmith-UID. A run and whoever asks for it
may have been started with different environments (SSH, cron, su), so a run is looked for in each of these places.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lorasmith.engine.errors import StorageError

# Not tempfile's folder: it follows $TMPDIR, and two sessions of one user must find each other.
SHARED_TEMPORARY = Path("/tmp")  # noqa: S108


def runtime_folder() -> Path:
    """Return the folder in which a run of this user puts its socket; it is made with mode 0700.

    Raises StorageError where it is a link, belongs to somebody else or lets others in.
    """
    folder = runtime_folders()[0]
    require_private(folder)
    return folder


def runtime_folders(user: int | None = None) -> list[Path]:
    """Return where runs of `user` (an id, this process's own by default) may have their sockets, the best first.

    They need not exist. A $XDG_RUNTIME_DIR of another user, as `su` leaves it behind, is passed over.
    """
    me = os.geteuid()
    user = me if user is None else user
    if chosen := os.environ.get("LORASMITH_RUNTIME"):
        return [Path(chosen).absolute()]
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    parents = [Path(session)] if session.startswith("/") and user == me else []
    parents += [Path(f"/run/user/{user}")]
    folders = [parent / "lorasmith" for parent in parents if _is_folder_of(parent, user)]
    return [*dict.fromkeys(folders), SHARED_TEMPORARY / f"lorasmith-{user}"]


def require_private(folder: Path) -> None:
    """Make `folder` (mode 0700) where it is missing, and prove that only this user can put anything in it.

    Raises StorageError in words: it cannot be made, is no folder, is a link, belongs to somebody else, or others have
    rights in it.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise StorageError(
            f"Cannot make the folder {folder} for control sockets.",
            why=error.strerror or str(error),
            fix="Set LORASMITH_RUNTIME to a folder of your own.",
        ) from error
    problem = privacy_problem(found, os.geteuid())
    if problem:
        raise StorageError(
            f"The folder {folder} for control sockets is not safe: {problem}.",
            why="Whoever can write there could command this user's runs.",
            fix=f"Correct it (chmod 700 {folder}), or set LORASMITH_RUNTIME to a folder of your own.",
        )


def privacy_problem(found: os.stat_result, user: int) -> str:
    """Return why a path with this `lstat` result is no private folder of `user`, or an empty string."""
    if stat.S_ISLNK(found.st_mode):
        return "it is a link"
    if not stat.S_ISDIR(found.st_mode):
        return "it is no folder"
    if found.st_uid != user:
        return f"it belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return f"others have rights in it (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def _is_folder_of(path: Path, user: int) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == user
