"""The triggers of LoRAs that were trained before, from run folders and from the headers of LoRA files. Torch-free."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import LorasmithError
from lorasmith.engine.safetensors_header import read_header

MAX_DEPTH = 4
"""Folders deeper than this below a given one are not looked into; collections of LoRAs are sorted into fewer."""
MAX_FILES = 20_000
"""After so many files the search ends, so that a run folder inside a home folder costs seconds at most."""
_KEYS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words")
"""Where programs look for a LoRA's trigger words, the standard's own key first."""


def find_other_triggers(*folders: Path, own: RunConfig | None = None) -> dict[str, str]:
    """Return the trigger words of finished runs and LoRA files below `folders`, each with where it was found.

    Runs and files of the same name or the same dataset as `own` are tries at the same LoRA, and left out. What cannot
    be read has no trigger, and is no problem here.
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    for folder in folders:
        for path in _candidates(folder.expanduser()):
            place = path.parent if path.name == "run.toml" else path
            where = os.path.relpath(place, folder.expanduser()) if place != folder else place.name
            for trigger in _triggers(path, own):
                if trigger.casefold() not in seen:
                    seen.add(trigger.casefold())
                    found[trigger] = where
    return found


def _candidates(folder: Path) -> Iterator[Path]:
    """Yield the run files of finished runs, and the LoRA files that belong to no run."""
    count = 0
    depth = len(folder.parts)
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        count += len(files)
        if "run.toml" in files:
            folders.clear()
            if any((here / "export").glob("*.safetensors")):
                yield here / "run.toml"
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if len(here.parts) - depth >= MAX_DEPTH:
            folders.clear()
        yield from (here / name for name in sorted(files) if name.lower().endswith(".safetensors"))
        if count > MAX_FILES:
            return


def _triggers(path: Path, own: RunConfig | None) -> list[str]:
    try:
        status = path.stat()
        read = _read_run if path.name == "run.toml" else _read_file
        name, folder, triggers = read(path, status.st_mtime_ns, status.st_size)
    except (LorasmithError, OSError, ValueError, RecursionError):
        return []
    if own is not None and (name == own.run.name or (folder and folder == _absolute(own.dataset.folder))):
        return []
    return list(triggers)


@lru_cache(maxsize=4096)
def _read_run(path: Path, changed: int, size: int) -> tuple[str, str, tuple[str, ...]]:
    """Return name, dataset folder and triggers of a run; kept until the file's time (ns) or size changes."""
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    trigger = _text(values, "captions", "trigger").strip()
    return (_text(values, "run", "name"), _absolute(_text(values, "dataset", "folder")), (trigger,) if trigger else ())


@lru_cache(maxsize=4096)
def _read_file(path: Path, changed: int, size: int) -> tuple[str, str, tuple[str, ...]]:
    """Return name, no dataset folder and the triggers of a LoRA file; kept until its time (ns) or size changes."""
    _, metadata = read_header(path)
    words = next((metadata[key] for key in _KEYS if metadata.get(key, "").strip() not in ("", "None")), "")
    return metadata.get("ss_output_name", path.stem), "", _split(words)


def _split(words: str) -> tuple[str, ...]:
    """Return the words of a list in JSON or with commas."""
    try:
        values = json.loads(words)
    except ValueError:
        values = words
    parts = values if isinstance(values, list) else words.split(",")
    return tuple(part.strip() for part in parts if isinstance(part, str) and part.strip())


def _text(values: dict[str, Any], section: str, key: str) -> str:
    table = values.get(section)
    value = table.get(key, "") if isinstance(table, dict) else ""
    return value if isinstance(value, str) else ""


def _absolute(folder: str) -> str:
    return str(Path(folder).expanduser().absolute()) if folder.strip() else ""
