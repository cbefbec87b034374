"""The settings that make a run fit the card; see `engine.config`, which puts all sections together.

`lorasmith plan --fit` and the wizard choose them (`engine.fit`); each says what it costs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lorasmith.engine.config_data import Section


class MemorySettings(Section):
    """What is done to fit the card."""

    quantize: Literal["none", "fp8", "int8", "nf4"] = "none"
    """Number format that the linear layers of the frozen base's blocks are kept in; computing stays in train.precision.
    `int8` and `fp8` take half of 16 bits, `nf4` (Dettmers et al., arXiv:2305.14314) little over a quarter. They change
    weights by 1, 3 and 9 % (measured), and all are slower than 16 bits: quantize to fit."""
    quantize_text_encoders: Literal["none", "fp8", "int8", "nf4"] = "none"
    """The same for the text encoders."""
    quantized_matmul: bool = False
    """Multiply in int8 or fp8 too instead of widening the weights first: faster on newer cards, slightly less exact.
    For `int8` and `fp8` only."""
    swapped_blocks: Annotated[int, Field(ge=0, le=200)] = 0
    """Blocks of the denoiser whose frozen weights wait in main memory and come to the card while others compute. They
    are checkpointed."""
    checkpoint_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the blocks that train.gradient_checkpointing covers, those that save most first."""
    offload_activations: bool = False
    """Keep what gradient checkpointing keeps in main memory instead of on the card."""
    lora_precision: Literal["fp32", "base"] = "fp32"
    """Number format that the LoRA computes in: its own fp32, or the base's, which takes less memory and time. Its
    weights are kept in fp32 either way."""
    apart: bool = False
    """Have only the part on the card that works: encoders while they encode, the denoiser when they are done."""
    tile_pictures: bool = False
    """Encode and decode pictures in tiles, whose seams can show slightly."""
