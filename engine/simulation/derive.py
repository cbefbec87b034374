"""Derives the memory tables of the presets: `python -m lorasmith.engine.simulation.derive [FAMILY …]`.

Each full-size model whose configurations stand in `presets/FAMILY.toml` is built on the meta device and simulated; what
comes out is written to the `[memory.*]` tables at the end of that file. What stands above them stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import InlineTable, Item, Table

from lorasmith.engine.advisor import read_preset
from lorasmith.engine.errors import LorasmithError
from lorasmith.engine.families import Family, families
from lorasmith.engine.memory.constants import BlockGroup, Law, PartMemory, StepLaws, StepMemory
from lorasmith.engine.simulation.measured_parts import (
    autoencoder_part,
    blocks_of,
    draw_law,
    inputs_law,
    sizes_of,
    text_parts,
    tflop_of,
)
from lorasmith.engine.simulation.measured_steps import StepCounter, run_config
from lorasmith.engine.simulation.references import from_table, load_reference
from lorasmith.engine.simulation.step import PROMPT_TOKENS
from lorasmith.engine.storage import atomic_write

COMMAND = "make derive-memory"
HEADER = "# What full-size models take in memory"
LIBRARIES = ("torch", "diffusers", "transformers", "peft")
"""What the numbers depend on beside this code."""


def derive_model(family: str, name: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `[memory.NAME]` table with everything derived anew of the configurations in it; takes minutes."""
    loaded = load_reference(family, from_table(name, table))
    named = {"label": table["label"], "hub": table["hub"]}
    return {**named, **derive_loaded(loaded, tuple(loaded.spec.targets)), "configs": table["configs"]}


def derive_loaded(loaded: Family, presets: tuple[str, ...]) -> dict[str, Any]:
    """Return what a `[memory.NAME]` table says of a model on the meta device, with the steps of these targets."""
    tokens = min(PROMPT_TOKENS, loaded.spec.token_limit)
    counter = StepCounter(loaded, tokens)
    return {
        "tflop": [round(number, 4) for number in tflop_of(loaded, run_config(presets[0]), tokens)],
        "kernels": list(counter.kernels(presets[0])),
        "draw": _law(draw_law(loaded, tokens)),
        "inputs": _law(inputs_law(loaded, tokens)),
        "blocks": [_block(group) for group in blocks_of(loaded)],
        "denoiser": _part(sizes_of(loaded.denoiser)),
        "text": {part: _part(memory) for part, memory in text_parts(loaded).items()},
        "autoencoder": _part(autoencoder_part(loaded)),
        "step": derive_steps(counter, presets),
    }


def derive_steps(counter: StepCounter, presets: tuple[str, ...]) -> dict[str, Any]:
    """Return the `step` tables by target preset; presets of the same layers are simulated once."""
    found: dict[frozenset[str], dict[str, Any]] = {}
    tables = {}
    for targets in presets:
        layers = frozenset(counter.layers(targets))
        if layers not in found:
            found[layers] = _step(counter.step_memory(targets))
        tables[targets] = found[layers]
    return tables


def write_preset(path: Path, models: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the `[memory.*]` tables at the end of a preset file; what stands above them is kept to the byte."""
    above = _above(path.read_text(encoding="utf-8"))
    document = tomlkit.document()
    memory = tomlkit.table(is_super_table=True)
    for name, model in models.items():
        memory.add(name, _as_table(model))
    document.add("memory", memory)
    text = f"{above.rstrip()}\n\n{_comment()}\n{tomlkit.dumps(document).strip()}\n"
    atomic_write(path, text.encode())


def main(wanted: list[str]) -> int:
    """Derive the tables of the families named, or of all; returns the exit code."""
    for family in wanted or sorted(families()):
        try:
            tables = read_preset(family).get("memory", {})
        except LorasmithError as error:
            print(error, file=sys.stderr)
            return 1
        models = {name: derive_model(family, name, table) for name, table in tables.items()}
        if models:
            write_preset(preset_path(family), models)
            print(f"presets/{family}.toml: {', '.join(models)}", flush=True)
    return 0


def preset_path(family: str) -> Path:
    """Return the preset file of a family."""
    import lorasmith.presets

    return next(path for folder in lorasmith.presets.__path__ if (path := Path(folder) / f"{family}.toml").is_file())


def _above(text: str) -> str:
    """Return what stands above the memory tables and their comment."""
    lines = text.splitlines(keepends=True)
    for index, line in enumerate(lines):
        if line.startswith((HEADER, "[memory.")):
            return "".join(lines[:index])
    return text


def _comment() -> str:
    from importlib.metadata import version

    versions = ", ".join(f"{library} {version(library).partition('+')[0]}" for library in LIBRARIES)
    return (
        f"{HEADER}: computed by `{COMMAND}`, never by hand, from the\n"
        "# configurations of the Hub repository `hub`, on the meta device without weights; format in\n"
        f"# engine/memory/constants.py. With {versions}."
    )


def _as_table(values: Mapping[str, Any]) -> Table:
    """Return a table whose inner dictionaries are tables too, but for those of laws, which take one line."""
    table = tomlkit.table(is_super_table=not any(not isinstance(value, dict) for value in values.values()))
    for key, value in values.items():
        table.add(key, _as_item(value))
    return table


def _as_item(value: Any) -> Item:
    if isinstance(value, dict) and all(isinstance(inner, list) for inner in value.values()) and "none" in value:
        return _inline(value)
    if isinstance(value, dict):
        return _as_table(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        array = tomlkit.array()
        for entry in value:
            array.append(_inline(entry))
        array.multiline(True)
        return array
    item: Item = tomlkit.item(value)
    return item


def _inline(values: Mapping[str, Any]) -> InlineTable:
    inline = tomlkit.inline_table()
    for key, value in values.items():
        inline.append(key, value)
    return inline


def _part(part: PartMemory) -> dict[str, Any]:
    laws = {name: _law(law) for name, law in (("work", part.work), ("decode", part.decode)) if law != Law()}
    return {"packed": part.packed, "plain": part.plain, "layer": part.layer, **laws}


def _block(group: BlockGroup) -> dict[str, Any]:
    return {"name": group.name, "count": group.count, "packed": group.packed, "plain": group.plain}


def _step(step: StepMemory) -> dict[str, Any]:
    return {"per_rank": step.per_rank, "fp32": _laws(step.fp32), "base": _laws(step.base)}


def _laws(laws: StepLaws) -> dict[str, list[float]]:
    names = ("none", "half", "all", "rank_none", "rank_all")
    return {name: _law(getattr(laws, name), 4 if name.startswith("rank") else 2) for name in names}


def _law(law: Law, digits: int = 2) -> list[float]:
    return [round(number, digits) + 0.0 for number in (law.fixed, law.picture, law.megapixel)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
