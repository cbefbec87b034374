"""Which checkpoint a run goes on from, and whether it still fits the run's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorasmith.engine.checkpoints import Checkpoint, has_checkpoints, newest_checkpoint
from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import CheckpointError

MAY_CHANGE = ("run.name", "run.output_folder", "dataset.folder", "dataset.more_folders",
              "dataset.regularization_folder", "dataset.overlay", "train.device", "train.log_every",
              "train.loader_workers", "run.on_finish", "previews.",
              "checkpoints.", "export.")  # fmt: skip
"""Settings, or beginnings of settings, that a resumed run may have different: they do not alter what is learnt."""


def find_checkpoint(folder: Path, config: RunConfig, on_warning: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest verified checkpoint to resume from, or None for a new run.

    Raises CheckpointError where there are only damaged ones, or where settings changed that alter what is learnt.
    """

    def on_damaged(path: Path, reason: str) -> None:
        on_warning(f"The checkpoint {path} is damaged and is not used: {reason}.")

    checkpoint = newest_checkpoint(folder, on_damaged)
    if checkpoint is None:
        if has_checkpoints(folder):
            raise CheckpointError(
                f"Every checkpoint in {folder} is damaged.", fix="Move them away to begin anew, or start a new run."
            )
        return None
    changed = changed_settings(checkpoint.state["config"], config.model_dump(mode="json"))
    if changed:
        raise CheckpointError(
            f"The run cannot be resumed at step {checkpoint.step} with other settings.",
            why="These differ from those of the checkpoint: " + ", ".join(changed) + ".",
            fix="Put them back, or start a new run.",
        )
    return checkpoint


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return `key (old → new)` for each setting that differs and alters what is learnt."""
    changed: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after, name = old.get(key), new.get(key), prefix + key
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += changed_settings(before, after, f"{name}.")
        elif before != after and not name.startswith(MAY_CHANGE):
            changed.append(f"{name} ({before} → {after})")
    return changed
