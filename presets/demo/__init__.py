"""The rehearsal: an embedded base model, bundled pictures of one new concept, and settings for both."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
PICTURES = FOLDER / "pictures"
REGULAR = FOLDER / "regular"


def settings() -> dict[str, Any]:
    """Return the demo's settings as nested values, with the bundled pictures as its dataset."""
    values = tomllib.loads((FOLDER / "demo.toml").read_text(encoding="utf-8"))
    values["dataset"] |= {"folder": str(PICTURES), "regularization_folder": str(REGULAR)}
    return values
