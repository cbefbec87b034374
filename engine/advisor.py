"""Recommended settings from `presets/FAMILY.toml`, each with its reason and its source. Torch-free.

A preset has `[defaults]`, `[tier.*]` by graphics memory and `[goal.*]` by what is learnt; later ones win. An entry is
`{ value, why, source }`, or instead of a value `passes` over the pictures (with `at_least` and `at_most`), which make
steps, or a `share` of the steps.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.engine.errors import ConfigError
from lorasmith.engine.run_file import Layer, flatten
from lorasmith.presets import demo

SMALL_BASE_SIDE = 256
"""Below this native resolution in pixels the usual bucket step of 64 would leave squares only."""


@dataclass(frozen=True)
class Advice:
    """One recommended setting: why, where that comes from, and which part of the preset says it, e.g. "goal style"."""

    key: str
    value: Any
    why: str
    source: str
    origin: str = "preset"


def goals(family: str) -> tuple[str, ...]:
    """Return the goals that a family's preset knows, the first one being the usual one."""
    return tuple(read_preset(family).get("goal", {}))


def recommend(family: str, goal: str, num_images: int, native_resolution: int, vram_gib: float | None) -> list[Advice]:
    """Return the recommended settings, one per key; `vram_gib` is None without a GPU.

    Raises ConfigError for a family without a preset and for an unknown goal.
    """
    preset = read_preset(family)
    known_goals = preset.get("goal", {})
    if goal not in known_goals:
        raise ConfigError(f"Unknown goal {goal} for {family}.", fix=f"Known goals: {', '.join(known_goals)}.")
    tier = _tier(preset.get("tier", {}), vram_gib)
    tables = [(f"preset {family}", preset.get("defaults", {}))]
    if tier:
        tables.append((f"tier {tier}", preset["tier"][tier]))
    tables.append((f"goal {goal}", known_goals[goal]))
    entries: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for origin, table in tables:
        entries |= {key: (origin, entry) for key, entry in table.items() if isinstance(entry, dict)}
    batch = int(entries["train.batch_size"][1]["value"]) if "train.batch_size" in entries else 1
    steps = _steps(entries, num_images, batch)
    advice = [_advice(key, origin, entry, steps) for key, (origin, entry) in entries.items()]
    # A card too small for the base's own resolution is told so by its tier.
    return [*(item for item in _fit_base(native_resolution) if item.key not in entries), *advice]


def demo_advice() -> list[Advice]:
    """Return the demo preset's values that have a reason."""
    values = flatten(demo.settings())
    source = "measured on the demo itself, see presets/demo/README.md"
    return [Advice(key, values[key], why, source, "demo preset") for key, why in demo.reasons().items()]


def as_layers(advice: Sequence[Advice]) -> list[Layer]:
    """Return the advice as layers for `run_file.resolve_config`, one for each part of the preset."""
    layers: dict[str, dict[str, Any]] = {}
    for item in advice:
        section, _, name = item.key.rpartition(".")
        layers.setdefault(item.origin, {}).setdefault(section, {})[name] = item.value
    return [Layer(origin, values) for origin, values in layers.items()]


def _fit_base(native_resolution: int) -> list[Advice]:
    side = min(2048, max(64, native_resolution // 64 * 64))
    step = 64 if side >= SMALL_BASE_SIDE else 16
    source = "The base model's own configuration"
    return [
        Advice(
            "dataset.resolution", side, f"The base was trained at {native_resolution} pixels.", source, "base model"
        ),
        Advice("dataset.bucket_step", step, "Several aspect ratios fit at this resolution.", source, "base model"),
    ]


def _tier(tiers: Mapping[str, Mapping[str, Any]], vram_gib: float | None) -> str:
    if vram_gib is None:
        return "cpu" if "cpu" in tiers else ""
    fitting = {name: table["from_gib"] for name, table in tiers.items() if table.get("from_gib", math.inf) <= vram_gib}
    return max(fitting, key=lambda name: fitting[name], default="")


def _steps(entries: Mapping[str, tuple[str, Mapping[str, Any]]], num_images: int, batch_size: int) -> int:
    _, entry = entries.get("train.steps", ("", {"value": 1000}))
    if "passes" not in entry:
        return int(entry["value"])
    steps = math.ceil(entry["passes"] * max(1, num_images) / batch_size)
    return int(min(entry["at_most"], max(entry["at_least"], steps)))


def _advice(key: str, origin: str, entry: Mapping[str, Any], steps: int) -> Advice:
    value = entry.get("value")
    if key == "train.steps":
        value = steps
    elif "share" in entry:
        value = max(1, round(steps * entry["share"]))
    return Advice(key, value, entry["why"], entry["source"], origin)


def read_preset(family: str) -> dict[str, Any]:
    """Return a family's preset file as it is; raises ConfigError where there is none."""
    import lorasmith.presets

    paths = [Path(folder) / f"{family}.toml" for folder in lorasmith.presets.__path__]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ConfigError(
            f"There is no preset for {family}.", why=f"{paths[0]} is missing.", fix="Choose the settings yourself."
        )
    return tomllib.loads(path.read_text(encoding="utf-8"))
