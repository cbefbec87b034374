"""Checkpoints: written whole or not at all, proved before they count, and found again by proof and not by date.

    checkpoints/step-00000100/   adapter.safetensors · optimizer.safetensors · state.json · manifest.json

The order that survives kill -9, a full disk and a power cut: temporary folder beside the target → sync every file →
manifest of SHA-256 sums → read back and compare → rename → sync the parent. "Newest" means newest *verified*; a
damaged checkpoint is named and skipped, never deleted. safetensors and JSON only: nothing in it can run code.
torch is imported late: what is looked up in checkpoints without their tensors needs none.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lorasmith.engine.errors import CheckpointError
from lorasmith.engine.storage import atomic_write, fsync_file, fsync_folder, sha256_file, storage_error

if TYPE_CHECKING:
    import torch

    TensorGroups = Mapping[str, Mapping[str, torch.Tensor]]

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT_VERSION = 1
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_TEMPORARY = (".saving-", ".removing-")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; `state` is what `save_checkpoint` was given."""

    step: int
    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors saved under `name` on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")


def save_checkpoint(folder: Path, step: int, tensors: TensorGroups, state: Mapping[str, Any]) -> Path:
    """Write and prove the checkpoint of `step`, and return its folder.

    A verified checkpoint of that step stays as it is; a damaged one is moved aside. Raises StorageError with the path
    and the needed and free bytes; nothing half-written stays behind.
    """
    target = folder / f"step-{step:08d}"
    if target.exists():
        if damage(target) is None:
            return target
        target.rename(folder / f"{target.name}.damaged-{secrets.token_hex(3)}")
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()) + 4096
    temporary = folder / f".saving-{target.name}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        _write_files(temporary, step, tensors, state)
        _compare_with_memory(temporary, tensors)
        temporary.rename(target)
        fsync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise storage_error(target, needed, error if isinstance(error, OSError) else str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def newest_checkpoint(folder: Path, on_damaged: Callable[[Path, str], None]) -> Checkpoint | None:
    """Return the checkpoint with the highest step that verifies, or None.

    Each damaged newer one is passed to `on_damaged` with the reason.
    """
    for path in reversed(_step_folders(folder)):
        reason = damage(path)
        if reason is None:
            return _open(path)
        on_damaged(path, reason)
    return None


def prune_checkpoints(folder: Path, keep: int) -> list[Path]:
    """Remove all but the `keep` newest verified checkpoints and return what was removed; damaged ones stay."""
    intact = [path for path in _step_folders(folder) if damage(path) is None]
    removed = intact[: max(0, len(intact) - keep)]
    for path in removed:
        # Renamed first, so that a crash in the middle leaves no half checkpoint under a real name.
        doomed = folder / f".removing-{path.name}"
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    if removed:
        fsync_folder(folder)
    return removed


def damage(path: Path) -> str | None:
    """Return in words why the checkpoint folder `path` cannot be trusted, or None if every byte is as written."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = manifest["files"]
        if manifest["version"] > FORMAT_VERSION:
            return f"it was written by a newer version (format {manifest['version']})"
        for name, facts in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            size = file.stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size} of {facts['bytes']} bytes"
            if sha256_file(file) != facts["sha256"]:
                return f"{name} is not what was written (SHA-256 differs)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is unreadable: {error}"
    return None if STATE in files else f"{STATE} is missing"


def folder_bytes(path: Path) -> int:
    """Return the summed size of the files in a checkpoint folder."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def _step_folders(folder: Path) -> list[Path]:
    """Return the checkpoint folders, lowest step first; by number, never by date."""
    if not folder.is_dir():
        return []
    matches = [(match, path) for path in folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for match, path in sorted(matches, key=lambda pair: int(pair[0].group(1))) if path.is_dir()]


def _open(path: Path) -> Checkpoint:
    record = json.loads((path / STATE).read_bytes())
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise CheckpointError(f"{path / STATE} holds no step.", fix="Remove that checkpoint folder and resume again.")
    return Checkpoint(record["step"], path, record["state"])


def _write_files(folder: Path, step: int, tensors: TensorGroups, state: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    for name, group in tensors.items():
        path = folder / f"{name}.safetensors"
        # save_file copies nothing through Python and does not hold the interpreter lock for long, save() does.
        save_file({key: tensor.contiguous() for key, tensor in group.items()}, path)
        path.chmod(0o600)
        fsync_file(path)
    atomic_write(folder / STATE, json.dumps({"step": step, "state": dict(state)}, indent=1).encode())
    facts = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(folder.iterdir())
        if file.is_file()
    }
    atomic_write(folder / MANIFEST, json.dumps({"version": FORMAT_VERSION, "files": facts}, indent=1).encode())
    fsync_folder(folder)


def _compare_with_memory(folder: Path, tensors: TensorGroups) -> None:
    for name, group in tensors.items():
        with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
            same = set(file.keys()) == set(group) and all(
                _same_bytes(file.get_tensor(key), tensor) for key, tensor in group.items()
            )
        if not same:
            raise OSError(f"{name}.safetensors reads back differently from what was written")


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    # Bytes and not numbers: NaN differs from itself, and 0.0 equals -0.0.
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other.cpu()))
    return torch.equal(first, second)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left behind; the run's lock says that nobody else is writing."""
    for path in folder.iterdir():
        if path.name.startswith(_TEMPORARY):
            with contextlib.suppress(OSError):
                shutil.rmtree(path)


def has_checkpoints(folder: Path) -> bool:
    """Tell whether `folder` holds any checkpoint, whole or damaged."""
    return bool(_step_folders(folder))


def load_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Return the verified checkpoint of `step`; raises CheckpointError where it is missing or damaged."""
    path = folder / f"step-{step:08d}"
    if not path.is_dir():
        steps = ", ".join(str(int(other.name.rpartition("-")[2])) for other in _step_folders(folder))
        raise CheckpointError(
            f"There is no checkpoint of step {step} in {folder}.", fix=f"There are: {steps or 'none'}."
        )
    reason = damage(path)
    if reason is not None:
        raise CheckpointError(f"The checkpoint {path} is damaged.", why=reason + ".", fix="Use an older one.")
    return _open(path)
