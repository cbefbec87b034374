"""The trained tensors of one layer, whatever the adapter's kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from lorasmith.engine.families import Component

Kind = Literal["lora", "dora", "loha", "lokr", "oft", "boft"]
"""What a module is; LoCon is `lora` on a convolution."""
DOWN, UP, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"
PEFT_NAME = "default"
"""What peft calls the adapter."""


@dataclass
class AdapterModule:
    """The trained tensors of one layer, under the names that peft gives them, or LyCORIS."""

    component: Component
    path: str
    """Dotted path of the layer inside the component."""
    kind: Kind
    tensors: dict[str, nn.Parameter]
    """`lora_A.weight` (rank, in[, k, k]) and `lora_B.weight` (out, rank[, 1, 1]) for LoRA, with
    `lora_magnitude_vector.weight` for DoRA; `hada_…` for LoHa, `lokr_…` for LoKr, `oft_blocks` for OFT and BOFT.
    `adapter_layers.tensor_shapes` has their shapes."""
    rank: int
    alpha: float
    scale: float
    """What the product of the tensors is multiplied by; 1 where the kind has none."""
    rate: float = 1.0
    """Factor on the learning rate."""
    start: dict[str, Tensor] | None = None
    """The first values, where the product of these is taken off that of the tensors (PiSSA, OLoRA)."""
    layer: Any = field(default=None, repr=False)
    """The layer around the base model's own; None where there is no model."""

    @property
    def down(self) -> nn.Parameter:
        """The down matrix of a LoRA or DoRA."""
        return self.tensors[DOWN]

    @property
    def up(self) -> nn.Parameter:
        """The up matrix of a LoRA or DoRA."""
        return self.tensors[UP]

    @property
    def name(self) -> str:
        """The component and path that name this module in checkpoints."""
        return f"{self.component}.{self.path}"
