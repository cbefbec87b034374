"""What can be refused before a run folder is made: settings that no run can start with. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.captions import require_trigger
from lorasmith.engine.dataset.scan import require_folders
from lorasmith.engine.errors import StorageError
from lorasmith.engine.sources import is_hub_id, locate_base
from lorasmith.engine.storage import nearest_existing


def require_ready(config: RunConfig) -> None:
    """Refuse settings that no run can start with; writes nothing and asks no network.

    Raises ConfigError without a trigger, DatasetError where a folder is missing, BaseModelError where no base model is
    given or it does not exist, and StorageError where the output folder cannot be made or written to.
    """
    require_trigger(config.captions)
    require_folders(config.dataset)
    # What the Hub has is only known by asking it, which the run itself does.
    if not is_hub_id(config.base.model):
        locate_base(config.base.model)
    _require_output(Path(config.run.output_folder).expanduser())


def _require_output(folder: Path) -> None:
    existing = nearest_existing(folder)
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return
    raise StorageError(
        f"Cannot write to the output folder {folder}.",
        why=f"{existing} may not be written to." if existing.is_dir() else f"{existing} is not a folder.",
        fix="Choose another run.output_folder, or correct its permissions.",
    )
