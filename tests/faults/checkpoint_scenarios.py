"""What the children of the checkpoint faults do: see fault_server.py."""

from __future__ import annotations

from pathlib import Path

import torch

from lorasmith.engine.checkpoints import prune_checkpoints, save_checkpoint
from tests.faults.fault_server import Fault


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a step: no two steps share a number, so that a mix of checkpoints shows."""
    return {
        "adapter": {"a.lora_A.weight": torch.full((3, 40), float(step)), "b": torch.arange(9.0) + step},
        "optimizer": {"0.exp_avg": torch.full((7,), step / 7), "0.step": torch.tensor([step])},
    }


def state_of(step: int) -> dict[str, object]:
    return {"learner": {"rate": step / 3}, "config": {"train": {"steps": step}}}


def save(fault: Fault, folder: str, step: int, keep: int) -> str:
    """Save a step and prune, as the trainer does."""
    path = Path(folder)
    with fault.armed(path):
        saved = save_checkpoint(path, step, tensors_of(step), state_of(step))
        prune_checkpoints(path, keep)
    return saved.name
