"""Which checkpoint a run goes on from, and whether it still fits the run's settings. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorasmith.engine.checkpoints import Checkpoint, newest_checkpoint
from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import CheckpointError

MAY_CHANGE = ("run.name", "run.output_folder", "dataset.folder", "dataset.more_folders",
              "dataset.regularization_folder", "dataset.overlay", "train.device", "train.log_every",
              "train.loader_workers", "run.on_finish", "previews.",
              "checkpoints.", "export.")  # fmt: skip
"""Settings, or beginnings of settings, that a resumed run may have different: they do not alter what is learnt."""

MAY_EXTEND = ("train.steps", "train.precision", "schedule.", "optimizer.learning_rate", "optimizer.weight_decay",
              "optimizer.max_grad_norm", "adapter.text_encoder_learning_rate")  # fmt: skip
"""What may differ as well where the schedule is planned anew at the checkpoint; see `engine.extension`."""


def find_checkpoint(folder: Path, config: RunConfig, on_warning: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest verified checkpoint to resume from, or None for a new run.

    Raises CheckpointError where there are only damaged ones, or where settings changed that alter what is learnt.
    """
    unfit: list[str] = []

    def on_unfit(path: Path, reason: str) -> None:
        unfit.append(f"{path.name} ({reason})")
        on_warning(f"The checkpoint {path} is not used: {reason}.")

    checkpoint = newest_checkpoint(folder, on_unfit)
    if checkpoint is None:
        _refuse_fresh_start(folder, config, unfit)
        return None
    old, new = with_defaults(checkpoint.state["config"]), config.model_dump(mode="json")
    allowed = MAY_CHANGE + (MAY_EXTEND if is_extended(checkpoint, config) else ())
    changed = changed_settings(old, new, allowed)
    if not changed:
        return checkpoint
    start = config.schedule.start_step
    if start > checkpoint.step and start != old["schedule"]["start_step"]:
        raise _lost_start(folder, checkpoint.step, start)
    raise CheckpointError(
        f"The run cannot be resumed at step {checkpoint.step} with other settings.",
        why="These differ from those of the checkpoint: " + ", ".join(changed) + ".",
        fix="Put them back, or start a new run. `lorasmith runs extend` changes steps, schedule and learning rate.",
    )


def is_extended(checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Tell whether `config` plans the schedule anew at the checkpoint; at step 0 nothing was learnt by the old one."""
    start, own = config.schedule.start_step, with_defaults(checkpoint.state["config"])["schedule"]["start_step"]
    return start == checkpoint.step and (start != own or start == 0)


def with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint; those that its older version did not know yet have their defaults."""
    return _merge(RunConfig().model_dump(mode="json"), saved)


def changed_settings(
    old: Mapping[str, Any], new: Mapping[str, Any], allowed: tuple[str, ...] = MAY_CHANGE, prefix: str = ""
) -> list[str]:
    """Return `key (old → new)` for each setting that differs and does not begin with one of `allowed`."""
    changed: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after, name = old.get(key), new.get(key), prefix + key
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += changed_settings(before, after, allowed, f"{name}.")
        elif before != after and not name.startswith(allowed):
            changed.append(f"{name} ({before} → {after})")
    return changed


def settings_before(run_folder: Path, step: int) -> Path:
    """Return where an extension at `step` keeps the run file from before."""
    return run_folder / f"run.toml.before-{step}"


def _merge(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(defaults)
    for key, value in values.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def _refuse_fresh_start(folder: Path, config: RunConfig, unfit: list[str]) -> None:
    """Raise CheckpointError where beginning at step 0 is surely not what was meant."""
    start = config.schedule.start_step
    if unfit:
        raise CheckpointError(
            f"Every checkpoint in {folder} is damaged or cannot be read.",
            why=", ".join(unfit) + ".",
            fix="Move them away to begin anew, or start a new run.",
        )
    if start and settings_before(folder.parent, start).exists():
        raise CheckpointError(
            f"The run was extended at step {start}, but {folder} holds no checkpoint any more.",
            why="Beginning at step 0 with the schedule of the extension would train something else.",
            fix="Put the checkpoints back, or start a new run.",
        )


def _lost_start(folder: Path, found: int, start: int) -> CheckpointError:
    run = folder.parent
    return CheckpointError(
        f"The run was extended at step {start}, but its checkpoint of that step is damaged or gone.",
        why=f"The newest intact one, of step {found}, is from before: with the extension's schedule from there on, "
        "something else would be trained.",
        fix=f"Extend the run again, then from step {found}: lorasmith runs extend {run}. Or put back the settings from "
        f"before, {settings_before(run, start).name}, as run.toml.",
    )
