"""The README's table of what fits on which card, as `lorasmith plan --all` tells it.

`python -m tests.contracts.fit_table` writes it into README.md; a test holds the page to it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lorasmith.engine.fit.tiers import TIERS, TierPlan, tier_plans

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- table: what fits -->", "<!-- end of what fits -->"
_BITS = {"int8": "8 bit", "fp8": "8 bit", "nf4": "4 bit"}


@cache
def plans() -> tuple[TierPlan, ...]:
    """Return the plans of every derived size on every tier, computed once."""
    return tuple(tier_plans())


def readme_table() -> str:
    """Return the table in Markdown: one row a base model's size, one column a tier, and the machines it is for."""
    lines = [f"| base model | {' | '.join(f'{tier.vram_gb} GB' for tier in TIERS)} |", "|---" * (len(TIERS) + 1) + "|"]
    rows: dict[str, list[str]] = {}
    for plan in plans():
        rows.setdefault(plan.label, []).append(cell(plan))
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in rows.items()]
    machines = [f"{tier.card.removeprefix('GeForce ')} with {tier.ram_gb} GB of main memory" for tier in TIERS]
    return "\n".join([*lines, "", f"The machines: {', '.join(machines)}."])


def cell(plan: TierPlan) -> str:
    """Return a plan as `1024, 8 bit, swap 41 · 3.1 s`: pixels, what the base gives up, time of a step; – for none."""
    if plan.fit is None or plan.fit.verdict == "no":
        return "–" if plan.fit is not None else "?"
    switched = {switch.key: switch.value for switch in plan.fit.switches}
    parts = [str(plan.resolution)]
    if "memory.quantize" in switched:
        parts.append(_BITS[switched["memory.quantize"]])
    if "memory.swapped_blocks" in switched:
        parts.append(f"swap {switched['memory.swapped_blocks']}")
    if plan.fit.verdict == "tight":
        parts.append("tight")
    return f"{', '.join(parts)} · {plan.fit.time.seconds:.2g} s"


def with_table(page: str) -> str:
    """Return the page with the present table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{readme_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
