"""Run folders: where everything of one run lies, who works on it now, and what became of it.

"Running" is never stored: it means that a living process holds the lock, which the system lets go of when the process
dies, however it dies. All other states are read from the journal.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorasmith.engine.dataset.overlay import append_edits, read_overlay
from lorasmith.engine.errors import ConfigError, RunLockedError, StorageError
from lorasmith.engine.events import CheckpointSaved, Event, RunEnded, RunStarted, StepsDone
from lorasmith.engine.journal import replay
from lorasmith.engine.run_file import ResolvedConfig, load_run_file, resolve_config, to_toml
from lorasmith.engine.storage import atomic_write

State = Literal["running", "finished", "stopped", "failed", "interrupted", "not started"]
MAX_NAME_BYTES = 150
LOCK_TRIES = 10
_SUMMARY_EVENTS = frozenset({"RunStarted", "StepsDone", "CheckpointSaved", "RunEnded"})


@dataclass(frozen=True)
class RunFolder:
    """One run on the disk; a value, made by `create_run` and `open_run`."""

    path: Path

    @property
    def name(self) -> str:
        """The folder's own name, e.g. `my-lora-20261122-113000`."""
        return self.path.name

    @property
    def run_file(self) -> Path:
        """The settings of the run."""
        return self.path / "run.toml"

    @property
    def journal(self) -> Path:
        """The run's events, one JSON line each."""
        return self.path / "journal.jsonl"

    @property
    def lock(self) -> Path:
        """The file that the training process holds locked."""
        return self.path / "lock"

    @property
    def log(self) -> Path:
        """What libraries said, and tracebacks."""
        return self.path / "run.log"

    @property
    def checkpoints(self) -> Path:
        """Folder of resumable checkpoints."""
        return self.path / "checkpoints"

    @property
    def previews(self) -> Path:
        """Folder of preview pictures."""
        return self.path / "previews"

    @property
    def overlay(self) -> Path:
        """The edited captions as they were when the run was made; only there where the settings name some."""
        return self.path / "overlay.jsonl"

    @property
    def export(self) -> Path:
        """Folder of shareable LoRA files."""
        return self.path / "export"

    def load_config(self) -> ResolvedConfig:
        """Read the run's settings; raises ConfigError naming the setting."""
        return resolve_config([load_run_file(self.run_file)])


def create_run(resolved: ResolvedConfig) -> RunFolder:
    """Make `output_folder/NAME-YYYYmmdd-HHMMSS` (mode 0700) with its sub-folders and `run.toml` (mode 0600).

    Edited captions are copied into it, so that later edits change nothing for a run that is resumed. Raises
    StorageError where the output folder cannot be written to, DatasetError where the edits cannot be read.
    """
    settings = resolved.config.run
    output = Path(settings.output_folder).expanduser().absolute()
    stem = f"{file_name(settings.name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        run = RunFolder(_make_unique(output, stem))
        for folder in (run.checkpoints, run.previews, run.export):
            folder.mkdir(mode=0o700)
    except OSError as error:
        raise StorageError(
            f"Cannot make a run folder in {output}.",
            why=error.strerror or str(error),
            fix="Choose another run.output_folder, or correct its permissions.",
        ) from error
    stored = _with_absolute_paths(resolved)
    if stored.config.dataset.overlay:
        stored = _with_own_overlay(run, stored)
    atomic_write(run.run_file, to_toml(stored).encode())
    run.run_file.chmod(0o600)
    return run


def _with_absolute_paths(resolved: ResolvedConfig) -> ResolvedConfig:
    """Return the settings with absolute paths, so that the run can be resumed from anywhere."""
    config = resolved.config
    dataset: dict[str, Any] = {
        name: _absolute(value)
        for name in ("folder", "regularization_folder", "overlay")
        if (value := getattr(config.dataset, name))
    }
    dataset["more_folders"] = [_absolute(value) for value in config.dataset.more_folders]
    model = Path(config.base.model).expanduser()
    base = {"model": str(model.absolute())} if config.base.model and model.exists() else {}
    changed = {"dataset": config.dataset.model_copy(update=dataset), "base": config.base.model_copy(update=base)}
    return ResolvedConfig(config.model_copy(update=changed), resolved.origins)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _with_own_overlay(run: RunFolder, resolved: ResolvedConfig) -> ResolvedConfig:
    """Copy the edited captions into the run folder, and return the settings with that copy in their place."""
    config = resolved.config
    append_edits(run.overlay, read_overlay(Path(config.dataset.overlay)))
    dataset = config.dataset.model_copy(update={"overlay": str(run.overlay)})
    return ResolvedConfig(config.model_copy(update={"dataset": dataset}), resolved.origins)


def open_run(path: Path) -> RunFolder:
    """Return the run at `path`; raises ConfigError where there is none."""
    folder = path.expanduser().absolute()
    if not (folder / "run.toml").is_file():
        why = "It has no run.toml." if folder.is_dir() else "There is no such folder."
        raise ConfigError(f"{folder} is not a run folder.", why=why, fix="`lorasmith runs` lists the runs.")
    run = RunFolder(folder)
    try:
        for part in (run.checkpoints, run.previews, run.export):
            part.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        # A run on a read-only disk can still be looked at; whoever writes there is told by the write itself.
        pass
    return run


def file_name(name: str) -> str:
    """Return `name` as a folder or file name that every file system takes: letters of all scripts stay."""
    text = re.sub(r'[\x00-\x1f\x7f-\x9f\ud800-\udfff/\\:*?"<>|\s]+', "-", name).strip("-. ")
    cut = text.encode()[:MAX_NAME_BYTES].decode(errors="ignore").rstrip("-. ")
    return cut or "run"


def _make_unique(output: Path, stem: str) -> Path:
    number = 1
    while True:
        path = output / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            number += 1
        else:
            return path


class RunLock:
    """The exclusive right to work on a run, held until `release` or the end of the process.

    Raises RunLockedError naming the holder, or StorageError where the file system cannot lock.
    """

    def __init__(self, run: RunFolder) -> None:
        try:
            self._fd = os.open(run.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            why = error.strerror or str(error)
            raise StorageError(f"Cannot write {run.lock}.", why=why, fix="Check the folder's permissions.") from error
        try:
            self._take(run)
        except BaseException:
            os.close(self._fd)
            raise
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        """Let another process work on the run."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _take(self, run: RunFolder) -> None:
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # `lock_holder` of another process may hold it for a moment, only to look.
                time.sleep(0.02)
            except OSError as error:
                raise _cannot_lock(run, error) from error
            else:
                return
        raise _locked_error(run)


def lock_holder(run: RunFolder) -> dict[str, Any] | None:
    """Return who works on the run now ({} where unknown; keys pid, host, started), or None where nobody does."""
    try:
        fd = os.open(run.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(fd)
    except OSError:
        return None
    else:
        return None
    finally:
        os.close(fd)


def _read_holder(fd: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _locked_error(run: RunFolder) -> RunLockedError:
    holder = lock_holder(run) or {}
    why = "Which process it is cannot be read from the lock."
    if holder:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(holder.get("started", 0))))
        why = f"Process {holder.get('pid')} on {holder.get('host')} has worked on it since {started}."
    return RunLockedError(
        f"Another process trains in {run.path}.", why=why, fix="Wait for it, stop it, or start a new run."
    )


def _cannot_lock(run: RunFolder, error: OSError) -> StorageError:
    unsupported = error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
    return StorageError(
        f"Cannot lock {run.lock}.",
        why="This file system does not support locks." if unsupported else error.strerror or str(error),
        fix="Choose a run.output_folder on a local disk.",
    )


@dataclass(frozen=True)
class RunSummary:
    """What became of a run, as far as its lock and its journal tell.

    `step` is the last journaled step, `checkpoint_step` the newest checkpoint's (None: none), `changed` the time of the
    last change of the folder or of these events; `process` is the pid of a running one.
    """

    run: RunFolder
    state: State
    step: int = 0
    total_steps: int = 0
    checkpoint_step: int | None = None
    changed: float = 0.0
    message: str = ""
    process: int | None = None

    def describe(self) -> str:
        """Return the state in words, e.g. "interrupted at step 120 of 300"."""
        if self.state in ("finished", "not started"):
            return self.state
        of_total = f" of {self.total_steps}" if self.total_steps else ""
        return f"{self.state} at step {self.step}{of_total}"


def summarize_run(run: RunFolder) -> RunSummary:
    """Derive the state of `run`; an unreadable journal is said in `message`, never raised."""
    try:
        # Asked before and after: a run that ends or starts while its journal is read must not look interrupted.
        holder = lock_holder(run)
        summary = RunSummary(run, "not started", changed=run.path.stat().st_mtime)
        steps = None
        for event in replay(run.journal, only=_SUMMARY_EVENTS):
            if isinstance(event, StepsDone):
                # Most lines are these, and only the last before another event counts.
                steps = event
                continue
            summary, steps = _fold(_fold(summary, steps), event), None
        summary = _fold(summary, steps)
        if holder is None and summary.state == "interrupted":
            holder = lock_holder(run)
    except (StorageError, OSError) as error:
        return RunSummary(run, "interrupted", message=str(error))
    if holder is None:
        return summary
    pid = holder.get("pid")
    return replace(summary, state="running", process=pid if isinstance(pid, int) else None)


def _fold(summary: RunSummary, event: Event | None) -> RunSummary:
    if event is None:
        return summary
    summary = replace(summary, changed=max(summary.changed, event.time))
    if isinstance(event, RunStarted):
        return replace(summary, state="interrupted", step=event.resumed_from, total_steps=event.total_steps, message="")
    if isinstance(event, StepsDone):
        return replace(summary, step=event.step)
    if isinstance(event, CheckpointSaved):
        return replace(summary, checkpoint_step=event.step)
    if isinstance(event, RunEnded):
        return replace(summary, state=event.outcome, step=event.step, message=event.message)
    return summary


def list_runs(output_folder: Path) -> list[RunSummary]:
    """Return the runs in `output_folder`, the last changed first; an absent or unreadable folder has none."""
    try:
        folders = [path for path in output_folder.expanduser().absolute().iterdir() if (path / "run.toml").is_file()]
    except OSError:
        return []
    return sorted((summarize_run(RunFolder(path)) for path in folders), key=lambda run: run.changed, reverse=True)
