"""What can be refused before a run folder is made: settings that no run can start with. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasmith.engine import doctor
from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.captions import require_trigger
from lorasmith.engine.dataset.scan import require_folders
from lorasmith.engine.errors import HardwareError, StorageError
from lorasmith.engine.inspect_file import inspect_lora
from lorasmith.engine.run_file import flatten
from lorasmith.engine.sources import locate_configured, on_hub
from lorasmith.engine.storage import nearest_existing


def require_ready(config: RunConfig) -> None:
    """Refuse settings that no run can start with; writes nothing and asks no network.

    Raises ConfigError without a trigger, DatasetError where a folder is missing, BaseModelError where no base model is
    given or it does not exist, and StorageError where the output folder cannot be made or written to, or lies inside a
    dataset.
    """
    require_trigger(config.captions)
    folders = require_folders(config.dataset)
    # What the Hub has is only known by asking it, which the run itself does.
    if not any(on_hub(name) for name in (config.base.model, config.base.vae, *config.base.text_encoders)):
        locate_configured(config.base)
    if config.adapter.start_from:
        # It tells at once what is no file, or no LoRA.
        inspect_lora(Path(config.adapter.start_from).expanduser())
    _require_output(Path(config.run.output_folder).expanduser(), folders)


def require_usable(config: RunConfig) -> None:
    """Refuse choices that do not work on this machine, such as an optimizer whose package is broken.

    What the doctor knows to work is not tried again. What failed the last time, or was never tried, is tried now in a
    child process: some seconds, once for each installation. Raises HardwareError naming the setting, with the doctor's
    fix.
    """
    values = flatten(config.model_dump())
    device = config.train.device
    known = {check.name: check for check in doctor.remembered_checks()}
    doubtful = [name for name in doctor.checks_behind(values) if name not in known or known[name].status != "pass"]
    if device != "cpu":
        doubtful += [name for name, check in known.items() if check.blocking]
    for check in doctor.retry(doubtful, device) if doubtful else []:
        if lost := [choice for choice in doctor.unusable_choices([check], values) if _is_chosen(choice, values)]:
            raise HardwareError(
                f"{' and '.join(f'{key} = {_as_set(value)}' for key, value in lost)} cannot be used on this machine.",
                why=f"{check.name}: {check.detail}",
                fix=f"Choose another value, or: {check.fix}" if check.fix else "Choose another value.",
            )
        if check.blocking:
            raise HardwareError(f"{check.name}: {check.detail}", why=check.meaning, fix=check.fix)


def _is_chosen(choice: doctor.Choice, values: Mapping[str, Any]) -> bool:
    key, value = choice
    return bool(values.get(key) == value)


def _as_set(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _require_output(folder: Path, datasets: Sequence[Path]) -> None:
    for dataset in datasets:
        if folder.resolve().is_relative_to(dataset.resolve()):
            raise StorageError(
                f"The output folder {folder} lies inside the dataset {dataset}.",
                why="The dataset is only read, and the previews of a run would be taken for pictures of the next.",
                fix="Choose another run.output_folder, or put the pictures into a folder of their own.",
            )
    existing = nearest_existing(folder)
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return
    raise StorageError(
        f"Cannot write to the output folder {folder}.",
        why=f"{existing} may not be written to." if existing.is_dir() else f"{existing} is not a folder.",
        fix="Choose another run.output_folder, or correct its permissions.",
    )
