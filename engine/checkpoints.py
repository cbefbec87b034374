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
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lorasmith.engine.checkpoint_proof import (
    STATE,
    Checkpoint,
    UnfitError,
    as_os_error,
    find_unfit,
    step_folders,
    step_of,
    verify,
    write_manifest,
)
from lorasmith.engine.errors import CheckpointError, StorageError
from lorasmith.engine.out_of_memory import is_out_of_memory
from lorasmith.engine.storage import atomic_write, fsync_file, fsync_folder, make_folder, read_error, storage_error

if TYPE_CHECKING:
    import torch

    TensorGroups = Mapping[str, Mapping[str, torch.Tensor]]

__all__ = [
    "Checkpoint",
    "damage",
    "folder_bytes",
    "load_checkpoint",
    "newest_checkpoint",
    "prune_checkpoints",
    "remove_unfinished",
    "save_checkpoint",
]

REMOVE_TRIES = 2
_TEMPORARY = (".saving-", ".removing-", ".write-test-")


def save_checkpoint(folder: Path, step: int, tensors: TensorGroups, state: Mapping[str, Any]) -> Path:
    """Write and prove the checkpoint of `step`, and return its folder.

    A verified checkpoint of that step stays as it is; one that cannot be used is moved aside. Raises StorageError with
    the path and the needed and free bytes; nothing half-written stays behind.
    """
    target = folder / f"step-{step:08d}"
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()) + 4096
    temporary = folder / f".saving-{target.name}-{secrets.token_hex(4)}"
    try:
        unfit = find_unfit(target)
        if unfit is None and os.path.lexists(target):
            # The save that wrote it may have failed at its last call.
            fsync_folder(folder)
            return target
        make_folder(folder)
        remove_unfinished(folder)
        temporary.mkdir()
        _write_files(temporary, step, tensors, state)
        _compare_with_memory(temporary, tensors)
        if unfit is not None:
            aside = "unreadable" if unfit.refused else "damaged"
            target.rename(folder / f"{target.name}.{aside}-{secrets.token_hex(3)}")
        temporary.rename(target)
        fsync_folder(folder)
    except (OSError, SafetensorError, StorageError) as error:
        raise storage_error(target, needed, as_os_error(error)) from error
    finally:
        _remove(temporary)
    return target


def newest_checkpoint(folder: Path, on_unfit: Callable[[Path, str], None]) -> Checkpoint | None:
    """Return the checkpoint with the highest step that verifies, or None.

    Each newer one that is damaged or may not be read is passed to `on_unfit` with the reason. Raises StorageError
    where nothing can be said about a checkpoint now, because too many files are open or the disk is away: an older
    one in its place would only hide that.
    """
    for path in reversed(step_folders(folder)):
        try:
            return verify(path)
        except UnfitError as unfit:
            on_unfit(path, str(unfit))
    return None


def prune_checkpoints(folder: Path, keep: int) -> list[Path]:
    """Remove all but the `keep` newest verified checkpoints and return what was removed; damaged ones stay.

    Raises StorageError where the disk refuses it; every checkpoint is then there as a whole or not at all.
    """
    removed: dict[Path, Path] = {}
    try:
        intact = [path for path in step_folders(folder) if damage(path) is None]
        for path in intact[: max(0, len(intact) - keep)]:
            removed[path] = path.rename(folder / f".removing-{path.name}-{secrets.token_hex(4)}")
        if removed:
            # Renamed first and synced, so that no crash leaves a half checkpoint under a real name.
            fsync_folder(folder)
    except (OSError, StorageError) as error:
        why = as_os_error(error)
        refused = read_error(folder, why)
        raise StorageError(f"Old checkpoints in {folder} cannot be removed.", why=refused.why, fix=refused.fix) from why
    finally:
        for doomed in removed.values():
            _remove(doomed)
    return list(removed)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written or half-removed; raises OSError where `folder` cannot be listed.

    The run's lock says that nobody else is writing.
    """
    for path in list(folder.iterdir()):
        if path.name.startswith(_TEMPORARY):
            _remove(path)


def damage(path: Path) -> str | None:
    """Return in words why the checkpoint folder `path` cannot be used, or None if every byte is as written.

    Raises StorageError where that cannot be told now.
    """
    unfit = find_unfit(path)
    return None if unfit is None else str(unfit)


def folder_bytes(path: Path) -> int:
    """Return the summed size of the files in a checkpoint folder."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def load_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Return the verified checkpoint of `step`; raises CheckpointError where it is missing or damaged."""
    path = folder / f"step-{step:08d}"
    known = step_folders(folder)
    if path not in known:
        steps = ", ".join(str(step_of(other)) for other in known)
        raise CheckpointError(
            f"There is no checkpoint of step {step} in {folder}.", fix=f"There are: {steps or 'none'}."
        )
    try:
        return verify(path)
    except UnfitError as unfit:
        raise CheckpointError(
            f"The checkpoint {path} cannot be used.", why=f"{unfit}.", fix="Use an older one."
        ) from None


def _write_files(folder: Path, step: int, tensors: TensorGroups, state: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    from lorasmith.engine.tensor_file import OneByOne, write_one_by_one

    for name, group in tensors.items():
        path = folder / f"{name}.safetensors"
        if isinstance(group, OneByOne):
            write_one_by_one(path, group)
        else:
            # save_file copies nothing through Python and does not hold the interpreter lock for long, save() does.
            save_file({key: tensor.contiguous() for key, tensor in group.items()}, path)
        path.chmod(0o600)
        fsync_file(path)
    atomic_write(folder / STATE, json.dumps({"step": step, "state": dict(state)}, indent=1).encode())
    write_manifest(folder, step)
    fsync_folder(folder)


def _compare_with_memory(folder: Path, tensors: TensorGroups) -> None:
    for name, group in tensors.items():
        try:
            with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
                same = set(file.keys()) == set(group) and all(
                    _same_bytes(file.get_tensor(key), tensor) for key, tensor in group.items()
                )
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # torch's words for a file that it cannot map.
            raise as_os_error(error) from error
        if not same:
            raise OSError(f"{name}.safetensors reads back differently from what was written")


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    # Bytes and not numbers: NaN differs from itself, and 0.0 equals -0.0.
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other.cpu()))
    return torch.equal(first, second)


def _remove(path: Path) -> None:
    """Remove a folder or file as far as the disk lets it; what stays is removed by the next save."""
    for _ in range(REMOVE_TRIES):
        with contextlib.suppress(OSError):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink()
        if not os.path.lexists(path):
            return
