"""What was measured on this user's cards, over what was forecast: it corrects later forecasts. Torch-free.

One small file in the cache folder holds the last few ratios by card, driver and family. The median of them counts, so
that one odd run changes little; a ratio outside of what an allocator or a wrong estimate can explain is not kept.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import StorageError
from lorasmith.engine.storage import atomic_write, cache_folder

if TYPE_CHECKING:
    from lorasmith.engine.nvml import Gpu

_KEPT = 8
"""Runs that count, the newest ones: an update of torch or of lorasmith changes what is measured."""
_VERSION = 1
_MEMORY_RANGE = (0.5, 2.0)
_SECONDS_RANGE = (0.02, 50.0)


@dataclass(frozen=True)
class CardKey:
    """What a measurement holds for."""

    card: str
    driver: str
    family: str

    def __str__(self) -> str:
        """Return the key's text in the file."""
        return " | ".join((self.card, self.driver, self.family))


def card_key(gpu: Gpu, family: str) -> CardKey:
    """Return what measurements on a card hold for."""
    return CardKey(gpu.name, gpu.driver or "", family)


@dataclass(frozen=True)
class Calibration:
    """Measured over forecast, of the memory of a step and of its seconds; 1.0: not measured. `runs` were measured."""

    memory: float = 1.0
    seconds: float = 1.0
    runs: int = 0


UNKNOWN = Calibration()


def calibration_file() -> Path:
    """Return where the measurements are kept."""
    return cache_folder() / "memory" / "calibration.json"


def read(key: CardKey) -> Calibration:
    """Return what was measured on a card with a driver and a family; where nothing was, or the file is damaged: 1."""
    entry = _entries().get(str(key), {})
    memory = _ratios(entry, "memory", _MEMORY_RANGE)
    seconds = _ratios(entry, "seconds", _SECONDS_RANGE)
    if not memory and not seconds:
        return UNKNOWN
    return Calibration(_middle(memory), _middle(seconds), max(len(memory), len(seconds)))


def record(
    key: CardKey, forecast_gib: float, measured_gib: float, forecast_seconds: float, measured_seconds: float
) -> None:
    """Keep what a run measured beside what was forecast for it, without slack or earlier corrections; 0: not known.

    Does nothing with ratios that no allocator explains, and where the file cannot be written.
    """
    found = {"memory": _ratio(measured_gib, forecast_gib), "seconds": _ratio(measured_seconds, forecast_seconds)}
    ranges = {"memory": _MEMORY_RANGE, "seconds": _SECONDS_RANGE}
    kept = {name: ratio for name, ratio in found.items() if _is_within(ratio, ranges[name])}
    if not kept:
        return
    path = calibration_file()
    with contextlib.suppress(OSError, StorageError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            entries = _entries()
            entry = entries.setdefault(str(key), {})
            for name, ratio in kept.items():
                entry[name] = [*_ratios(entry, name, ranges[name]), round(ratio, 4)][-_KEPT:]
            data = json.dumps({"version": _VERSION, "cards": entries}, indent=1, sort_keys=True)
            atomic_write(path, data.encode())


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time read and write; two runs that end together would lose one measurement."""
    import fcntl

    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _entries() -> dict[str, dict[str, Any]]:
    try:
        data = json.loads(calibration_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    cards = data.get("cards") if isinstance(data, dict) and data.get("version") == _VERSION else None
    return {key: entry for key, entry in cards.items() if isinstance(entry, dict)} if isinstance(cards, dict) else {}


def _ratios(entry: dict[str, Any], name: str, allowed: tuple[float, float]) -> list[float]:
    values = entry.get(name)
    return (
        [v for v in values if isinstance(v, int | float) and _is_within(v, allowed)] if isinstance(values, list) else []
    )


def _ratio(measured: float, told: float) -> float:
    return measured / told if told > 0 and measured > 0 else 0.0


def _is_within(ratio: float, allowed: tuple[float, float]) -> bool:
    return math.isfinite(ratio) and allowed[0] <= ratio <= allowed[1]


def _middle(ratios: list[float]) -> float:
    return statistics.median(ratios) if ratios else 1.0
