"""Which choices of the settings hang on which check: what a failed optional part takes away, and nothing more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from lorasmith.engine.doctor.check import Check, Choice, Combination

BITSANDBYTES_OPTIMIZERS: Final = (
    "adamw8bit",
    "paged_adamw",
    "paged_adamw8bit",
    "lion8bit",
    "paged_lion8bit",
    "ademamix",
    "ademamix8bit",
)
"""The optimizers that come from bitsandbytes, by their name in the settings."""


def _formats(name: str) -> tuple[Choice, ...]:
    return ("memory.quantize", name), ("memory.quantize_text_encoders", name)


def _product(name: str) -> tuple[Combination, ...]:
    return ((("memory.quantize", name), ("memory.quantized_matmul", True)),)


WORTHWHILE: Final = 1.1
"""How many times as fast products in 8 bits must be before a plan uses them: they are less exact."""
DISABLED_BY: Final[Mapping[str, tuple[Choice, ...]]] = {
    "bf16": (("train.precision", "bf16"),),
    "fp16": (("train.precision", "fp16"),),
    "bitsandbytes": tuple(("optimizer.name", name) for name in BITSANDBYTES_OPTIMIZERS),
    "nf4": _formats("nf4"),
    "int8": _formats("int8"),
    "fp8": _formats("fp8"),
}
"""What cannot be used where a check fails."""

DISABLED_TOGETHER_BY: Final[Mapping[str, tuple[Combination, ...]]] = {
    "int8 product": _product("int8"),
    "fp8 product": _product("fp8"),
}
"""What cannot be used together where a check fails; the last of a combination needs one of the others."""


def take_away(check: Check) -> Check:
    """Return a check that did not pass with the choices that hang on it."""
    return replace(
        check, disables=DISABLED_BY.get(check.name, ()), disables_together=DISABLED_TOGETHER_BY.get(check.name, ())
    )


def checks_behind(values: Mapping[str, Any]) -> list[str]:
    """Return the names of the checks on which settings with these values (by dotted key) hang."""
    alone = [name for name, choices in DISABLED_BY.items() if any(_holds(choice, values) for choice in choices)]
    together = [
        name
        for name, combinations in DISABLED_TOGETHER_BY.items()
        if any(all(_holds(choice, values) for choice in combination) for combination in combinations)
    ]
    return alone + together


def unusable_choices(checks: Iterable[Check], given: Mapping[str, Any] | None = None) -> dict[Choice, str]:
    """Return what cannot be used on this machine, (key, value), with the reason in words and how to mend it.

    `given` are the values that other settings have: with `{"memory.quantize": "fp8"}`, the choices that cannot be
    used together with it are in the answer as well. What is left with nothing to be used with is in it in any case.
    """
    found: dict[Choice, str] = {}
    broken: dict[Combination, str] = {}
    for check in checks:
        reason = why_unusable(check)
        broken |= dict.fromkeys(check.disables_together, reason)
        for choice in check.disables:
            found.setdefault(choice, reason)
        for combination in check.disables_together:
            for choice in combination:
                others = [other for other in combination if other != choice]
                if all(_holds(other, given or {}) for other in others):
                    found.setdefault(choice, reason)
    for combination, reason in broken.items():
        if _needing(combination[-1]) <= set(broken):
            found.setdefault(combination[-1], reason)
    return found


def _needing(choice: Choice) -> set[Combination]:
    """Return all combinations in which a choice can be used that is nothing by itself: it stands last in them."""
    every = (combination for combinations in DISABLED_TOGETHER_BY.values() for combination in combinations)
    return {combination for combination in every if combination[-1] == choice}


def fast_products(checks: Iterable[Check]) -> frozenset[str]:
    """Return the formats in which multiplying was measured to be clearly faster on this machine's card."""
    speedups = {check.name.removesuffix(" product"): check.speedup for check in checks if check.status == "pass"}
    return frozenset(name for name, speedup in speedups.items() if speedup >= WORTHWHILE)


def why_unusable(check: Check) -> str:
    """Return in one line what the check found and how to mend it."""
    found = f"{check.name}: {check.detail}".rstrip(".")
    return f"{found}. {check.fix}".strip()


def _holds(choice: Choice, values: Mapping[str, Any]) -> bool:
    key, value = choice
    # True == 1 in Python, which a setting's value is not.
    return key in values and values[key] == value and isinstance(values[key], bool) == isinstance(value, bool)
