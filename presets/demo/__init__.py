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
    values = _read()
    del values["why"]
    values["dataset"] |= {"folder": str(PICTURES), "regularization_folder": str(REGULAR)}
    return values


def reasons() -> dict[str, str]:
    """Return why each value of the demo's settings is what it is, by dotted key."""
    return dict(_read()["why"])


def _read() -> dict[str, Any]:
    return tomllib.loads((FOLDER / "demo.toml").read_text(encoding="utf-8"))
