"""What a checkpoint is, and the proof that one is whole: a manifest of SHA-256 sums, itself under a sum.

Three answers, never mixed up: every byte is as written; it cannot be used, for a reason (damaged, or not for this user
to read); or nothing can be said now, because too many files are open or the disk is away. No torch here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lorasmith.engine.errors import CheckpointError, StorageError
from lorasmith.engine.storage import atomic_write, read_error, sha256_file

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT_VERSION = 2
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_REFUSED = (errno.EACCES, errno.EPERM)
_BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.EUCLEAN, errno.EBADMSG)
"""What a read says of a checkpoint that is no more; any other error is trouble of the moment."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; `state` is what `save_checkpoint` was given, `groups` the names of its tensor groups."""

    step: int
    path: Path
    state: dict[str, Any]
    groups: tuple[str, ...] = ()

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors saved under `name` on the CPU; raises StorageError where they cannot be read."""
        from safetensors.torch import load_file

        path = self.path / f"{name}.safetensors"
        if name not in self.groups:
            raise CheckpointError(f"The checkpoint {self.path} holds no {path.name}.", fix="Use another checkpoint.")
        try:
            # Opened first: safetensors calls every failure to open a missing file.
            path.open("rb").close()
            return load_file(path)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise read_error(path, as_os_error(error)) from error


class UnfitError(Exception):
    """A checkpoint that cannot be used; the text says why. `refused`: only because this user may not read it."""

    refused = False


def write_manifest(folder: Path, step: int) -> None:
    """Write the sums of all files in `folder`; raises OSError or StorageError."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(folder.iterdir())
        if file.is_file()
    }
    manifest = {"version": FORMAT_VERSION, "step": step, "files": files, "sha256": _manifest_sum(step, files)}
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint folder."""
    return int(path.name.rpartition("-")[2])


def step_folders(folder: Path) -> list[Path]:
    """Return what is named as a checkpoint, lowest step first; by number, never by date."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.lexists(folder):
            return []
        # Nothing may begin anew only because the disk with the checkpoints is away.
        raise read_error(folder, error) from error
    return sorted((folder / name for name in names if _STEP_FOLDER.fullmatch(name)), key=step_of)


def find_unfit(path: Path) -> UnfitError | None:
    """Return what is wrong with a checkpoint; None where it is whole, or where there is none."""
    try:
        if os.path.lexists(path):
            verify(path)
    except UnfitError as unfit:
        return unfit
    return None


def verify(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`, every byte of which is as written; raises UnfitError, or StorageError."""
    file = path / MANIFEST
    try:
        files = _read_manifest(path)
        for name, facts in files.items():
            file = path / name
            _verify_file(file, facts)
        file = path / STATE
        record = json.loads(file.read_bytes())
        groups = tuple(name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors"))
        return Checkpoint(int(record["step"]), path, dict(record["state"]), groups)
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnfitError(f"{STATE} does not hold what it should ({type(error).__name__}: {error})") from error


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return the facts of each file; the manifest proves itself by a sum of its own."""
    if not stat.S_ISDIR(path.stat().st_mode):
        raise UnfitError("it is no folder")
    _require_plain_file(path / MANIFEST)
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["version"] != FORMAT_VERSION:
            other = f"format {manifest['version']}, not {FORMAT_VERSION}"
            raise UnfitError(f"it was written by another version of lorasmith ({other})")
        step, files, found = manifest["step"], dict(manifest["files"]), manifest["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnfitError(f"{MANIFEST} is unreadable ({type(error).__name__}: {error})") from error
    if found != _manifest_sum(step, files):
        raise UnfitError(f"{MANIFEST} is not what was written (SHA-256 differs)")
    if step != step_of(path):
        raise UnfitError(f"it is the checkpoint of step {step} under another name")
    if STATE not in files:
        raise UnfitError(f"{STATE} is missing")
    return files


def _manifest_sum(step: int, files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([FORMAT_VERSION, step, files], sort_keys=True).encode()).hexdigest()


def _verify_file(file: Path, facts: Mapping[str, Any]) -> None:
    size = _require_plain_file(file)
    if size != facts["bytes"]:
        raise UnfitError(f"{file.name} has {size} of {facts['bytes']} bytes")
    if sha256_file(file) != facts["sha256"]:
        raise UnfitError(f"{file.name} is not what was written (SHA-256 differs)")


def _require_plain_file(file: Path) -> int:
    """Return the size of an ordinary file; a pipe would be waited for, and a link may lead anywhere."""
    try:
        facts = file.lstat()
    except FileNotFoundError:
        raise UnfitError(f"{file.name} is missing") from None
    if not stat.S_ISREG(facts.st_mode):
        kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "a link" if file.is_symlink() else "a device or pipe"
        raise UnfitError(f"{file.name} is {kind} instead of a file")
    return facts.st_size


def _unreadable(file: Path, error: OSError) -> UnfitError | StorageError:
    if error.errno not in (*_REFUSED, *_BROKEN):
        return read_error(file, error)
    unfit = UnfitError(f"{file.name} cannot be read ({error.strerror}{_owner(file.parent)})")
    unfit.refused = error.errno in _REFUSED
    return unfit


def _owner(path: Path) -> str:
    """Return `; it belongs to NAME` where that is not this user."""
    try:
        foreign = path.stat().st_uid != os.geteuid()
        return f"; it belongs to {path.owner()}" if foreign else ""
    except (OSError, KeyError):
        return ""


def as_os_error(error: Exception) -> OSError:
    """Return the error of the system behind what a library raised; Rust and torch tell it in their texts only."""
    if isinstance(error, OSError):
        return error
    if isinstance(error.__cause__, OSError):
        return error.__cause__
    text = str(error)
    found = re.search(r"\(os error (\d+)\)|\((\d+)\)$|errno:? (\d+)", text)
    if found is None:
        return OSError(text)
    number = int(next(filter(None, found.groups())))
    return OSError(number, os.strerror(number))
