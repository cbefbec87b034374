"""What the children of the checkpoint faults do (fault_server.py), and what a checkpoint must be afterwards."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorasmith.engine.checkpoints import Checkpoint, newest_checkpoint, prune_checkpoints, save_checkpoint
from lorasmith.engine.errors import StorageError
from tests.faults.fault_server import Fault, Spoil


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a step: no two steps share a number, so that a mix of checkpoints shows."""
    return {
        "adapter": {"a.lora_A.weight": torch.full((3, 40), float(step)), "b": torch.arange(9.0) + step},
        "optimizer": {"0.exp_avg": torch.full((7,), step / 7), "0.step": torch.tensor([step])},
    }


def state_of(step: int) -> dict[str, Any]:
    return {"learner": {"rate": step / 3}, "config": {"train": {"steps": step}}}


def save_step(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, step, tensors_of(step), state_of(step))


def nothing_yet(folder: Path) -> None:
    pass


def two_older_ones(folder: Path) -> None:
    for step in (1, 2):
        save_step(folder, step)


def a_damaged_one_of_that_step(folder: Path) -> None:
    two_older_ones(folder)
    path = save_checkpoint(folder, 3, tensors_of(99), state_of(99))
    os.truncate(path / "optimizer.safetensors", 40)


def that_step_already(folder: Path) -> None:
    two_older_ones(folder)
    save_step(folder, 3)


SITUATIONS: dict[str, tuple[Callable[[Path], None], int | None]] = {
    "a first save": (nothing_yet, None),
    "a save with pruning": (two_older_ones, 2),
    "a save where a damaged one is": (a_damaged_one_of_that_step, 2),
    "a save of what is saved": (that_step_already, 3),
}
"""What is there before the save of step 3, and the newest checkpoint that can be used."""


class Ground:
    """A folder of checkpoints that is put back to the situation before each fault."""

    def __init__(self, parent: Path, situation: str) -> None:
        self.folder = parent / "checkpoints"
        self._template = parent / "template"
        prepare, self.old = SITUATIONS[situation]
        prepare(self._template)

    def fresh(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._template.exists():
            shutil.copytree(self._template, self.folder)
        return self.folder


def require_whole(checkpoint: Checkpoint) -> None:
    """Compare every byte with what was saved for that step: no mix of two checkpoints passes."""
    assert checkpoint.state == state_of(checkpoint.step)
    for name, group in tensors_of(checkpoint.step).items():
        found = checkpoint.tensors(name)
        assert found.keys() == group.keys()
        assert all(torch.equal(found[key], value) for key, value in group.items())


def newest(folder: Path) -> int | None:
    checkpoint = newest_checkpoint(folder, lambda path, reason: None)
    if checkpoint is None:
        return None
    require_whole(checkpoint)
    return checkpoint.step


def hidden(folder: Path) -> list[str]:
    """Return what is half-written or half-removed."""
    return [path.name for path in folder.rglob(".*")] if folder.exists() else []


def require_next_save_is_clean(folder: Path) -> None:
    save_step(folder, 4)
    prune_checkpoints(folder, 2)
    assert newest(folder) == 4
    assert hidden(folder) == []


def everything_in(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return mode and content of each file."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def save(fault: Fault, folder: str, step: int, keep: int) -> str:
    """Save a step and prune, as the trainer does."""
    path = Path(folder)
    with fault.armed(path):
        saved = save_step(path, step)
        prune_checkpoints(path, keep)
    return saved.name


def save_with_each_error(
    fault: Fault, parent: str, situation: str, number: int, forever: bool, plausible: bool, stride: int
) -> dict[str, Any]:
    """Save step 3 once for every `stride`-th call, which fails with errno `number`; return figures and complaints."""
    ground = Ground(Path(parent), situation)
    complaints: list[str] = []
    injected = refused = 0
    at = 1
    while True:
        spoil = Spoil.error(at, number, forever=forever, plausible=plausible)
        folder = ground.fresh()
        error = _refusal(fault, folder, spoil)
        if fault.count < at:
            break
        injected += 1
        refused += error is not None
        # Nothing but a disk that refuses even the removal may leave something for the next save to remove.
        tidy = not forever or (plausible and number == errno.ENOSPC)
        for complaint in _complaints(folder, ground.old, error, tidy):
            complaints.append(f"{errno.errorcode[number]} at call {at}: {complaint}")
        at += stride
    return {"injected": injected, "refused": refused, "complaints": complaints}


def _refusal(fault: Fault, folder: Path, spoil: Spoil) -> BaseException | None:
    try:
        with fault.armed(folder, spoil):
            save_step(folder, 3)
            prune_checkpoints(folder, 2)
    except Exception as error:
        return error
    return None


def _complaints(folder: Path, old: int | None, error: BaseException | None, tidy: bool) -> list[str]:
    found = []
    if error is not None and not isinstance(error, StorageError):
        found.append(f"{type(error).__name__} left the save: {error}")
    text = str(error) if error is not None else ""
    told = f"{folder}/step-00000003 (" in text and "bytes needed" in text and "bytes free" in text
    if error is not None and not told and "Old checkpoints in" not in text:
        found.append(f"it says neither where nor how much: {text}")
    step = newest(folder)
    if step not in ({3} if error is None or "Old checkpoints in" in text else {old, 3}):
        found.append(f"the newest checkpoint is {step} after {text!r}")
    if tidy and hidden(folder):
        found.append(f"left behind: {hidden(folder)}")
    require_next_save_is_clean(folder)
    return found


def short_writes(fault: Fault, parent: str, situation: str, stride: int) -> dict[str, Any]:
    """Save step 3 once for every call; where it is a write, only half of its bytes are written at first."""
    ground = Ground(Path(parent), situation)
    complaints: list[str] = []
    at = 1
    while True:
        folder = ground.fresh()
        error = _refusal(fault, folder, Spoil.short(at))
        if fault.count < at:
            return {"injected": (at - 1) // stride, "complaints": complaints}
        complaints += [f"short at call {at}: {text}" for text in _complaints(folder, ground.old, error, True)]
        at += stride


def read_with_each_error(fault: Fault, parent: str, number: int, forever: bool, stride: int) -> dict[str, Any]:
    """Load the newest of three checkpoints once for every `stride`-th call, which fails with errno `number`."""
    ground = Ground(Path(parent), "a save of what is saved")
    folder = ground.fresh()
    before = everything_in(folder)
    complaints: list[str] = []
    injected = fallen_back = refused = 0
    at = 1
    while True:
        unfit: list[str] = []
        spoil = Spoil.error(at, number, forever=forever, reads=True)
        step, error = _load(fault, folder, spoil, unfit)
        if fault.count < at:
            break
        injected += 1
        refused += error is not None
        fallen_back += error is None and step != 3
        place = f"{errno.errorcode[number]} at call {at}"
        if error is not None and not isinstance(error, StorageError):
            complaints.append(f"{place}: {type(error).__name__} left the reading: {error}")
        if error is None and step != 3 and (number == errno.EMFILE or os.strerror(number) not in "".join(unfit)):
            complaints.append(f"{place}: the checkpoint of step {step} was used: {unfit}")
        if everything_in(folder) != before or newest(folder) != 3:
            complaints.append(f"{place}: something has changed")
        at += stride
    return {"injected": injected, "refused": refused, "fallen_back": fallen_back, "complaints": complaints}


def _load(fault: Fault, folder: Path, spoil: Spoil, unfit: list[str]) -> tuple[int | None, BaseException | None]:
    try:
        with fault.armed(folder, spoil):
            checkpoint = newest_checkpoint(folder, lambda path, reason: unfit.append(reason))
            assert checkpoint is not None or len(unfit) == 3
            if checkpoint is not None:
                require_whole(checkpoint)
    except Exception as error:
        return None, error
    return checkpoint.step if checkpoint else None, None
