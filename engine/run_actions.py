"""What can be done with a run that nobody works on: find, measure, rename, delete.

Renaming and deleting hold the run's lock, so that neither happens under a training. A deletion first takes the run's
name away and then its content: killed at any moment, it leaves the whole run or none. Torch-free.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorasmith.engine.errors import ConfigError, StorageError
from lorasmith.engine.event_words import some_names
from lorasmith.engine.run_file import Layer, load_run_file, resolve_config, update_toml
from lorasmith.engine.run_folder import REMOVING, RunFolder, file_name, is_run, open_run
from lorasmith.engine.run_lock import RunLock
from lorasmith.engine.run_queue import RunQueue
from lorasmith.engine.storage import atomic_write, fsync_folder, readable_size

OUTPUT_FOLDER = Path("runs")
NAMED = 8
"""How many candidates a refusal names."""
_WHEN_MADE = re.compile(r"-\d{8}-\d{6}(-\d+)?$")
"""The end of a run folder's name, which stays when it is renamed."""


def resolve_run(text: str, output_folder: Path = OUTPUT_FOLDER) -> RunFolder:
    """Return the run that `text` means: a run folder, its name in `output_folder`, or a unique beginning of the name.

    Raises ConfigError that names the candidates where no run or more than one fits.
    """
    if (Path(text).expanduser() / "run.toml").is_file():
        return open_run(Path(text))
    if not text or "/" in text:
        return open_run(Path(text))
    names = _run_names(output_folder)
    fitting = [text] if text in names else [name for name in names if name.startswith(text)]
    if len(fitting) == 1:
        return open_run(output_folder.expanduser() / fitting[0])
    if fitting:
        raise ConfigError(
            f"{text} may mean {len(fitting)} runs in {output_folder}.",
            why=f"They are {some_names(fitting, most=NAMED)}.",
            fix="Give more of the name.",
        )
    raise ConfigError(
        f"No run in {output_folder} is named {text}, or begins so.",
        why=f"There are {some_names(names, most=NAMED)}." if names else "There is no run in that folder.",
        fix="Give the run's folder, or the name that `lorasmith runs` shows.",
    )


@dataclass(frozen=True)
class RunSizes:
    """The bytes of a run folder by what they are; links count as nothing, since they are not followed."""

    checkpoints: int = 0
    previews: int = 0
    export: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All bytes of the run."""
        return self.checkpoints + self.previews + self.export + self.other

    def describe(self) -> str:
        """Return the sizes in words, such as "checkpoints 1.2 GiB, previews 12.0 MiB, LoRA files 40.0 MiB"."""
        parts = {"checkpoints": self.checkpoints, "previews": self.previews, "LoRA files": self.export}
        parts["journal, log and settings"] = self.other
        return ", ".join(f"{name} {readable_size(size)}" for name, size in parts.items() if size)


def measure_run(run: RunFolder) -> RunSizes:
    """Return how large a run is; what cannot be read, or vanishes meanwhile, does not count."""
    parts = {name: _folder_bytes(run.path / name) for name in ("checkpoints", "previews", "export")}
    return RunSizes(**parts, other=_folder_bytes(run.path) - sum(parts.values()))


def require_idle(run: RunFolder) -> None:
    """Raise RunLockedError where somebody works on the run now."""
    with _locked(run):
        pass


def rename_run(run: RunFolder, name: str) -> RunFolder:
    """Give a run, its folder and its next LoRA file another name; the time in the folder's name stays.

    Raises ConfigError where the name is no name or taken, RunLockedError where somebody works on the run, StorageError
    where the disk refuses; then nothing has changed.
    """
    name = name.strip()
    resolve_config([load_run_file(run.run_file), Layer("rename", {"run": {"name": name}})])
    when = _WHEN_MADE.search(run.name)
    target = run.path.with_name(file_name(name) + (when.group() if when else ""))
    with _locked(run):
        if target != run.path and os.path.lexists(target):
            raise ConfigError(f"There is a {target.name} in {target.parent} already.", fix="Choose another name.")
        with _told(run.path, "rename"):
            run.path.rename(target)
        renamed = RunFolder(target)
        try:
            RunQueue().follow(run.path, target)
            changes = {"run.name": name}
            if renamed.overlay.exists():
                changes["dataset.overlay"] = str(renamed.overlay)
            atomic_write(renamed.run_file, update_toml(renamed.run_file.read_text("utf-8"), changes).encode())
            renamed.run_file.chmod(0o600)
            fsync_folder(target.parent)
        except (OSError, StorageError, ConfigError) as error:
            with contextlib.suppress(OSError, StorageError, ConfigError):
                target.rename(run.path)
                RunQueue().follow(target, run.path)
            raise _refused(run.path, "rename", error) from error
    return renamed


def delete_run(run: RunFolder) -> None:
    """Delete a run folder with everything in it; links in it are removed, and what they lead to stays.

    Raises RunLockedError where somebody works on it, ConfigError where the folder itself is a link, StorageError where
    the disk refuses. What a killed deletion left behind in the output folder is removed as well.
    """
    if run.path.is_symlink():
        target = os.path.realpath(run.path)
        raise ConfigError(f"{run.path} is a link to {target}.", fix="Delete the link, or the run at its target.")
    with _locked(run):
        doomed = run.path.with_name(f"{REMOVING}{run.name}-{secrets.token_hex(4)}")
        with _told(run.path, "delete"):
            run.path.rename(doomed)
            fsync_folder(doomed.parent)
        with _told(doomed, "delete"):
            shutil.rmtree(doomed)
    for left in doomed.parent.glob(f"{REMOVING}*"):
        shutil.rmtree(left, ignore_errors=True)


def _run_names(output_folder: Path) -> list[str]:
    """Return the names of the run folders in `output_folder`, in order; an unreadable folder has none."""
    try:
        return sorted(path.name for path in output_folder.expanduser().iterdir() if is_run(path))
    except OSError:
        return []


@contextlib.contextmanager
def _locked(run: RunFolder) -> Iterator[None]:
    lock = RunLock(run)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _refused(path, what, error) from error


def _refused(path: Path, what: str, error: OSError | StorageError | ConfigError) -> StorageError:
    why = error.strerror or str(error) if isinstance(error, OSError) else f"{error.what} {error.why}".strip()
    return StorageError(f"Cannot {what} {path}.", why=why, fix="Check the permissions and the space of that disk.")


def _folder_bytes(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                path = os.path.join(place, name)
                total += 0 if os.path.islink(path) else os.lstat(path).st_size
    return total
