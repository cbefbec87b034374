"""Memory of steps that were simulated once on this machine: models and adapters that no preset has. Torch-free.

`engine.simulation.on_the_fly` fills it; a file of `memory/` in the cache folder is one model with one kind of adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import StorageError
from lorasmith.engine.memory.constants import Law, ModelMemory, StepLaws, StepMemory, parse_memory, parse_step
from lorasmith.engine.memory.sizes import denoiser_tensors
from lorasmith.engine.storage import atomic_write, cache_folder

if TYPE_CHECKING:
    from pathlib import Path

    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.sources import BaseFiles

_LIBRARIES = ("lorasmith", "torch", "diffusers", "transformers", "peft")
"""What decides what a step keeps, beside the model and the settings."""
_OF_ANY_RANK = ("rank", "alpha", "text_encoder_learning_rate", "block_learning_rates", "start_from")
"""Settings of the adapter that laws are by, or that change no memory."""
_PARTS = ("transformer", "unet")


def step_key(family: str, files: BaseFiles, settings: RunConfig) -> str:
    """Return the name of what is simulated: the denoiser's layers, the adapter's kind, the number format, versions."""
    tensors = {name: list(info.shape) for name, info in denoiser_tensors(files).items()}
    adapter = settings.adapter.model_dump(mode="json")
    content = {
        "family": family,
        "denoiser": tensors or [files.config(part) for part in _PARTS],
        "adapter": {name: value for name, value in adapter.items() if name not in _OF_ANY_RANK},
        "fp32": settings.train.precision == "fp32",
        "loss": settings.objective.loss,
        "versions": {name: _version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def model_key(family: str, files: BaseFiles) -> str:
    """Return the name of a model that no preset has: its denoiser's layers and what else decides its memory."""
    tensors = {name: list(info.shape) for name, info in denoiser_tensors(files).items()}
    content = {"family": family, "denoiser": tensors, "versions": {name: _version(name) for name in _LIBRARIES}}
    return "model-" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def cached_model_memory(family: str, key: str) -> ModelMemory | None:
    """Return the model that was counted under a key; None where none was, or where the file is damaged."""
    try:
        return parse_memory(family, "counted", json.loads(_path(key).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def store_model_memory(key: str, table: Mapping[str, Any]) -> None:
    """Keep a model's memory, as a `[memory.NAME]` table says it."""
    _store(key, table)


def cached_step_memory(key: str) -> StepMemory | None:
    """Return what was simulated under a key; None where nothing was, or where the file is damaged."""
    try:
        found = parse_step(json.loads(_path(key).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if all(math.isfinite(number) for number in _numbers(found)) else None


def store_step_memory(key: str, step: StepMemory) -> None:
    """Keep what was simulated; a full or read-only disk only means that it is simulated again."""
    _store(key, step_table(step))


def _store(key: str, table: Mapping[str, Any]) -> None:
    path = _path(key)
    with contextlib.suppress(OSError, StorageError):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(table).encode())


def step_table(step: StepMemory) -> dict[str, Any]:
    """Return a step's memory as `constants.parse_step` reads it."""
    laws = {kind: _laws_table(getattr(step, kind)) for kind in ("fp32", "base")}
    return {"per_rank": step.per_rank, **laws}


def _laws_table(laws: StepLaws) -> dict[str, list[float]]:
    values = {field.name: getattr(laws, field.name) for field in dataclasses.fields(laws)}
    return {name: [law.fixed, law.picture, law.megapixel] for name, law in values.items() if isinstance(law, Law)}


def _numbers(step: StepMemory) -> list[float]:
    tables = (_laws_table(step.fp32), _laws_table(step.base))
    return [step.per_rank, *(number for table in tables for law in table.values() for number in law)]


def _path(key: str) -> Path:
    return cache_folder() / "memory" / f"{key}.json"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
