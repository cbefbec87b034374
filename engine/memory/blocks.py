"""Whether a base model has the blocks that the settings want to swap. Torch-free."""

from __future__ import annotations

from lorasmith.engine.config import MemorySettings
from lorasmith.engine.families import BaseIdentity
from lorasmith.engine.memory.constants import find_memory


def block_problems(settings: MemorySettings, identity: BaseIdentity) -> list[str]:
    """Return a sentence with its fix where more blocks are to be swapped than the model is known to have; else []."""
    known = find_memory(identity.family, identity.parameters) if settings.swapped_blocks else None
    if known is None or settings.swapped_blocks <= known.num_blocks:
        return []
    return [
        f"memory.swapped_blocks is {settings.swapped_blocks}, and {known.label} has {known.num_blocks} blocks: "
        f"{known.num_blocks} are the most"
    ]
