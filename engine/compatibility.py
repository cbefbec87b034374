"""Which program loads which adapter of which base model in which layout, known before the training. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorasmith.engine.config import ExportSettings
    from lorasmith.engine.families import FamilySpec


def chosen_layouts(settings: ExportSettings, spec: FamilySpec) -> list[str]:
    """Return the key layouts to write, each once; `auto` is the one that most programs load for the family."""
    return list(dict.fromkeys(spec.layouts[0] if name == "auto" else name for name in settings.layouts))
