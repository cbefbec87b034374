"""Run folders: where everything of one run lies, how a new one is made and an old one opened.

Who works on a run is told by `run_lock`, what became of it by `run_summary`.
"""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.engine.dataset.overlay import append_edits, read_overlay
from lorasmith.engine.errors import ConfigError, StorageError
from lorasmith.engine.run_file import ResolvedConfig, flatten, load_run_file, resolve_config, to_toml, update_toml
from lorasmith.engine.storage import atomic_write, is_disk_full

MAX_NAME_BYTES = 150
REMOVING = ".removing-"
"""How the name of a run begins that is being deleted: it is a run no more."""


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
    def stacks(self) -> Path:
        """Folder of what all threads did in a stall; only there where there was one."""
        return self.path / "stacks"

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
    except OSError as error:
        raise _cannot_make(output, error) from error
    try:
        _fill(run, resolved)
    except BaseException as error:
        # Nobody has seen it yet; without run.toml it is no run, but a half folder would only puzzle.
        shutil.rmtree(run.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise _cannot_make(output, error) from error
        raise
    return run


def _fill(run: RunFolder, resolved: ResolvedConfig) -> None:
    """Write what a new run folder holds; `run.toml` comes last, since it is what makes the folder a run."""
    for folder in (run.checkpoints, run.previews, run.export):
        folder.mkdir(mode=0o700)
    stored = _with_absolute_paths(resolved)
    if stored.config.dataset.overlay:
        stored = _with_own_overlay(run, stored)
    atomic_write(run.run_file, to_toml(stored).encode())
    run.run_file.chmod(0o600)


def _cannot_make(output: Path, error: OSError) -> StorageError:
    remedy = "free some space there" if is_disk_full(error) else "correct its permissions"
    return StorageError(
        f"Cannot make a run folder in {output}.",
        why=error.strerror or str(error),
        fix=f"Choose another run.output_folder, or {remedy}.",
    )


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
    _find_moved_overlay(run)
    try:
        for part in (run.checkpoints, run.previews, run.export):
            part.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        # A run on a read-only disk can still be looked at; whoever writes there is told by the write itself.
        pass
    return run


def is_run(folder: Path) -> bool:
    """Tell whether `folder` is a run: it has settings, and nobody has begun to delete it."""
    return not folder.name.startswith(REMOVING) and (folder / "run.toml").is_file()


def _find_moved_overlay(run: RunFolder) -> None:
    """Correct the path of the run's own edited captions where its folder was moved or renamed since.

    Without, a resumed run would find no edits there and train other captions.
    """
    if not run.overlay.is_file():
        return
    try:
        stored = flatten(load_run_file(run.run_file).values).get("dataset.overlay", "")
        moved = isinstance(stored, str) and Path(stored).name == run.overlay.name and not Path(stored).exists()
        if moved:
            text = update_toml(run.run_file.read_text("utf-8"), {"dataset.overlay": str(run.overlay)})
            atomic_write(run.run_file, text.encode())
            run.run_file.chmod(0o600)
    except (OSError, ConfigError, StorageError):
        # Damaged settings, or a disk that is only read: whoever starts the run is told by the settings themselves.
        pass


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
