"""What the trials found is kept in the cache folder, so that the next start knows at once what cannot be used."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from lorasmith.engine.doctor.check import Check
from lorasmith.engine.errors import StorageError
from lorasmith.engine.hardware import HardwareSnapshot, snapshot, torch_build
from lorasmith.engine.storage import atomic_write, cache_folder, make_folder

_FORMAT: Final = 1
logger = logging.getLogger("lorasmith.doctor")


def memory_file() -> Path:
    """Return the file in which the trials' results are kept."""
    return cache_folder() / "doctor.json"


def remembered_checks(machine: HardwareSnapshot | None = None) -> list[Check]:
    """Return what the trials found on this machine with these versions, driver and cards; [] where nothing is known.

    Torch-free. `machine` saves reading it again. Never raises: a damaged file is no memory.
    """
    try:
        stored = json.loads(memory_file().read_text(encoding="utf-8"))
        if stored["format"] != _FORMAT or stored["of"] != situation(machine or snapshot()):
            return []
        return [Check.from_json(each) for each in stored["checks"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def remember(checks: Iterable[Check], machine: HardwareSnapshot | None = None) -> None:
    """Keep what these trials found, in place of what was known of each; a disk that refuses is logged only."""
    machine = machine or snapshot()
    known = {check.name: check for check in remembered_checks(machine)} | {check.name: check for check in checks}
    document = {
        "format": _FORMAT,
        "of": situation(machine),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "checks": [check.to_json() for check in known.values()],
    }
    path = memory_file()
    try:
        make_folder(path.parent)
        atomic_write(path, json.dumps(document, indent=1).encode())
    except (OSError, StorageError) as error:
        logger.info("what the doctor found is not kept: %s", error)


def situation(machine: HardwareSnapshot) -> Mapping[str, Any]:
    """Return all that the trials' results depend on: another of these, and they have to be made anew."""
    build = torch_build()
    return {
        "python": platform.python_version(),
        "torch": [build.version if build else "", _installed_at("torch")],
        "cuda": build.cuda if build else None,
        "lorasmith": _version("lorasmith"),
        "bitsandbytes": [_version("bitsandbytes"), _installed_at("bitsandbytes")],
        "driver": machine.gpus[0].driver if machine.gpus else None,
        "cards": sorted(f"{gpu.name} {gpu.uuid}" for gpu in machine.gpus),
    }


def _installed_at(name: str) -> int:
    """Return when a package was installed: one that was mended by installing it anew is another one."""
    try:
        place = importlib.metadata.distribution(name).locate_file(f"{name}/__init__.py")
        return int(Path(str(place)).stat().st_mtime)
    except (importlib.metadata.PackageNotFoundError, OSError):
        return 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
