"""What can be refused before a run folder is made: settings that no run can start with. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.captions import require_trigger
from lorasmith.engine.dataset.scan import require_folders
from lorasmith.engine.errors import StorageError
from lorasmith.engine.inspect_file import inspect_lora
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
