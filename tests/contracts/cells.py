"""The pairs of base model family and adapter that the matrix proves: all of them, or a part that covers both sides."""

from __future__ import annotations

from typing import Any

from tests.tiny import TINY_BUILDERS

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "locon": {"kind": "locon", "conv_rank": 2, "conv_alpha": 2.0},
    "rslora": {"rslora": True, "targets": "attention-mlp"},
    "dora": {"kind": "dora"},
    "loha": {"kind": "loha"},
    "lokr": {"kind": "lokr", "lokr_factor": 4},
    "oft": {"kind": "oft", "block_size": 8},
    "boft": {"kind": "boft", "block_size": 8},
    "pissa": {"init": "pissa"},
}
"""Adapter settings by the name of their column; over rank 2 and alpha 2."""


def all_cells() -> list[tuple[str, str]]:
    """Return every (family, adapter)."""
    return [(family, adapter) for family in sorted(TINY_BUILDERS) for adapter in ADAPTERS]


def covering_cells() -> list[tuple[str, str]]:
    """Return pairs in which every family comes once and every adapter at least once."""
    return [(family, list(ADAPTERS)[i % len(ADAPTERS)]) for i, family in enumerate(sorted(TINY_BUILDERS))]
