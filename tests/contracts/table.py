"""The README's table: which program loads which adapter of which base model, from what the matrix proves.

`python -m tests.contracts.table` writes it into README.md; a test holds the page to it.
"""

from __future__ import annotations

from pathlib import Path

from lorasmith.engine.compatibility import loads_in
from lorasmith.engine.config import AdapterSettings
from lorasmith.engine.families import families
from tests.contracts.cells import ADAPTERS

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- table: base models and adapters -->", "<!-- end of table -->"
LETTERS = {"ComfyUI": "C", "A1111": "A", "Forge": "F", "diffusers": "d"}
KINDS = {
    "LoRA, rsLoRA, PiSSA": "lora",
    "LoCon": "locon",
    "DoRA": "dora",
    "LoHa": "loha",
    "LoKr": "lokr",
    "OFT": "oft",
    "BOFT": "boft",
}
"""Columns, and the adapter of the matrix that stands for each."""


def readme_table() -> str:
    """Return the table in Markdown: one row a base model and layout, in a cell the programs that load the file."""
    lines = [f"| base model | layout | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 2) + "|"]
    for module in families().values():
        spec = module.SPEC
        for number, layout in enumerate(spec.layouts):
            cells = [_programs(AdapterSettings(**ADAPTERS[name]), module.SPEC.name, layout) for name in KINDS.values()]
            label = spec.label if number == 0 else ""
            usual = " (usual)" if number == 0 else ""
            lines.append(f"| {label} | `{layout}`{usual} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _programs(adapter: AdapterSettings, family: str, layout: str) -> str:
    found = loads_in(families()[family].SPEC, adapter, layout)
    return " ".join(letter for program, letter in LETTERS.items() if program in found) or "–"


def with_table(page: str) -> str:
    """Return the page with the present table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{readme_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
