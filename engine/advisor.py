"""Recommended settings from `presets/FAMILY.toml`, each with its reason and its source. Torch-free.

A preset has `[defaults]`, `[tier.*]` by graphics memory and `[goal.*]` by what is learnt; later ones win. An entry is
`{ value, why, source }`, where sources disagree also `disagreement`. Instead of a value it may have `passes` over the
pictures (with `at_least` and `at_most`), which make steps, a `share` of the steps, or `native`, the base model's own
resolution. `[advice]` holds what is no setting: bounds that `engine.foot_guns` reads, and how captions are written.
What merely makes a run fit a card is no advice: `engine.fit` decides it.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lorasmith.engine.dataset.check_goals import aim_of
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.run_file import Layer, flatten, setting_fields
from lorasmith.presets import demo

SMALL_BASE_SIDE = 256
"""Below this native resolution in pixels the usual bucket step of 64 would leave squares only."""


@dataclass(frozen=True)
class Advice:
    """One recommended setting: why, where that comes from, and which part of the preset says it, e.g. "goal style".

    `disagreement` tells where the sources contradict each other and why this value was taken; "" where they do not.
    """

    key: str
    value: Any
    why: str
    source: str
    origin: str = "preset"
    disagreement: str = ""


@dataclass(frozen=True)
class Explained:
    """A setting as a form shows it: its value and origin, what is recommended and why, and whether it was changed.

    Without advice the setting's own description is the reason and its default the recommendation.
    """

    key: str
    value: Any
    origin: str
    recommended: Any
    why: str
    source: str
    disagreement: str
    changed: bool


def goals(family: str) -> tuple[str, ...]:
    """Return the goals that a family's preset knows, the first one being the usual one."""
    return tuple(read_preset(family).get("goal", {}))


def goal_words(goal: str) -> str:
    """Return what a goal means, in a few words for a choice: "a character: one person, …"."""
    return aim_of(goal).words


def caption_advice(family: str, goal: str) -> Advice:
    """Return how captions are to be written for this base model and goal; `value` is `tags` or `prose`.

    Raises ConfigError for a family without a preset.
    """
    entry = read_preset(family)["advice"]["caption_style"]
    why = f"{entry['why']} {aim_of(goal).captions}"
    return Advice("captions", entry["value"], why, entry["source"], f"preset {family}", entry.get("disagreement", ""))


def recommend(family: str, goal: str, num_images: int, native_resolution: int, vram_gib: float | None) -> list[Advice]:
    """Return the recommended settings, one per key; `vram_gib` is None without a GPU.

    Raises ConfigError for a family without a preset and for an unknown goal.
    """
    preset = read_preset(family)
    entries = _entries(family, goal, _tier(preset.get("tier", {}), vram_gib))
    batch = int(entries["train.batch_size"][1]["value"]) if "train.batch_size" in entries else 1
    steps = _steps(entries, num_images, batch)
    of_base = {item.key: item for item in _fit_base(native_resolution)}
    advice = [_advice(key, origin, entry, steps, of_base.get(key)) for key, (origin, entry) in entries.items()]
    return [*(item for item in of_base.values() if item.key not in entries), *advice]


def recommended_steps(family: str, goal: str, num_images: int, pictures_per_step: int) -> int:
    """Return the steps that the preset recommends for a goal; raises ConfigError for an unknown one."""
    return _steps(_entries(family, goal), num_images, pictures_per_step)


def explain(values: Mapping[str, tuple[Any, str]], advice: Sequence[Advice]) -> dict[str, Explained]:
    """Return each setting of `values`, which maps dotted keys to (value, origin), with its reason.

    A value counts as changed by the user where neither the advice nor a default is its origin.
    """
    advised = {item.key: item for item in advice}
    unchanged = {"default"} | {item.origin for item in advice}
    return {
        key: _explained(key, value, origin, advised.get(key), origin not in unchanged)
        for key, (value, origin) in values.items()
    }


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


def _explained(key: str, value: Any, origin: str, advice: Advice | None, changed: bool) -> Explained:
    if advice is not None:
        told = (advice.value, advice.why, advice.source, advice.disagreement)
    else:
        default, description = _declared().get(key, (None, ""))
        told = (default, description, "lorasmith's default", "")
    return Explained(key, value, origin, *told, changed)


@cache
def _declared() -> dict[str, tuple[Any, str]]:
    """Return each setting's default and description."""
    fields = setting_fields()
    return {
        key: (info.get_default(call_default_factory=True), " ".join((info.description or "").split()))
        for key, info in fields
    }


def _entries(family: str, goal: str, tier: str = "") -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Return the preset's entries by setting, each with its origin; those of the goal win over those of the tier."""
    preset = read_preset(family)
    known_goals = preset.get("goal", {})
    if goal not in known_goals:
        raise ConfigError(f"Unknown goal {goal} for {family}.", fix=f"Known goals: {', '.join(known_goals)}.")
    tables = [(f"preset {family}", preset.get("defaults", {}))]
    if tier:
        tables.append((f"tier {tier}", preset["tier"][tier]))
    tables.append((f"goal {goal}", known_goals[goal]))
    entries: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for origin, table in tables:
        entries |= {key: (origin, entry) for key, entry in table.items() if isinstance(entry, dict)}
    return entries


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


def _advice(key: str, origin: str, entry: Mapping[str, Any], steps: int, of_base: Advice | None) -> Advice:
    value = entry.get("value")
    if key == "train.steps":
        value = steps
    elif "share" in entry:
        value = max(1, round(steps * entry["share"]))
    elif "native" in entry and of_base is not None:
        value = of_base.value
    return Advice(key, value, entry["why"], entry["source"], origin, entry.get("disagreement", ""))


def read_preset(family: str) -> dict[str, Any]:
    """Return a family's preset file as it is, not to be changed; raises ConfigError where there is none."""
    import lorasmith.presets

    paths = [Path(folder) / f"{family}.toml" for folder in lorasmith.presets.__path__]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ConfigError(
            f"There is no preset for {family}.", why=f"{paths[0]} is missing.", fix="Choose the settings yourself."
        )
    return _parsed(path, path.stat().st_mtime_ns)


@cache
def _parsed(path: Path, changed_ns: int) -> dict[str, Any]:
    """Parse a preset once for each state of its file: the wizard asks for it at every change of a setting."""
    return tomllib.loads(path.read_text(encoding="utf-8"))
