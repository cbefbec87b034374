"""Frozen linear layers in 8 or 4 bits, so that a base model takes a half or little over a quarter of its memory.

Only what is never trained is packed: a layer's result and the gradient of its input are computed with the weight
widened for that moment, in the forward pass and once more in the backward pass, and adapters train beside it.
Which layers are packed is a rule, not a list by family (`is_packed`). This module imports no torch before it is needed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lorasmith.engine.families import Quantization

BLOCK = 64
"""Neighbouring weights that share a scale in nf4 (Dettmers et al., arXiv:2305.14314)."""
SCALE_BLOCK = 256
"""Neighbouring scales of nf4 that share a scale of their own: double quantization, the same paper."""
_BYTES = {"none": 2.0, "fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 1 / BLOCK + 4 / (BLOCK * SCALE_BLOCK)}
_EMBEDDING = re.compile(r"time|guidance|(^|[._])t_emb")
"""In the path of layers that embed the noise level or the guidance."""


def is_packed(path: str, layer: Any) -> bool:
    """Tell whether quantization packs `layer`, a module of a denoiser or text encoder at the dotted `path`.

    Linear layers inside numbered blocks are packed: attention, feed-forward, and the modulation that belongs to a
    block, together nearly all weights. Left as they are, because an error there reaches every block and they are few:
    what lies outside the blocks (patch and text embeddings, final norm and projection) and what embeds noise level and
    guidance, wherever it is. Convolutions, norms and embedding tables are no linear layers. Works on meta modules, and
    on layers that are packed already.
    """
    from torch import nn

    if not isinstance(layer, nn.Linear):
        return False
    *parents, _ = path.split(".")
    return any(part.isdecimal() for part in parents) and not _EMBEDDING.search(path)


def bytes_per_weight(quantization: Quantization, outputs: int = 0, inputs: int = 0) -> float:
    """Return the bytes that one weight of a packed layer takes, its share of the scales included; 2 for `none`.

    The scale of fp8 and int8, 4 bytes for each output, is left out where the shape is not given.
    """
    scales = 4 / inputs if outputs and quantization in ("fp8", "int8") else 0.0
    return _BYTES[quantization] + scales


def pack_module(
    module: torch.nn.Module,
    device: torch.device,
    quantization: Quantization,
    *,
    quantized_matmul: bool = False,
    skip: Sequence[str] = (),
    waits_on: torch.device | None = None,
) -> int:
    """Move `module` to `device`, its linear layers packed (`is_packed`) but for those at the paths `skip`.

    One layer after another goes to the device, is packed there and lets its weight go, so that the device never holds
    more than what is packed, the rest of the module and one layer. With `waits_on` the results are laid there instead.
    Returns how many layers were packed. Raises HardwareError where this machine cannot do it.
    """
    from lorasmith.engine.quantization.packing import pack

    return pack(module, device, quantization, quantized_matmul, skip, waits_on or device)


def full_weight(layer: Any) -> torch.Tensor:
    """Return the frozen weight (out, in, …) of a layer, as its forward pass computes with it; widened where packed.

    A new tensor for packed layers: keep it no longer than it is needed.
    """
    weight: torch.Tensor = layer.weight.detach()
    return weight


def is_frozen_linear(layer: Any) -> bool:
    """Tell whether `layer` is one whose weight is packed."""
    from lorasmith.engine.quantization.frozen_linear import FrozenLinear

    return isinstance(layer, FrozenLinear)


def num_weights(module: torch.nn.Module) -> int:
    """Return how many numbers the parameters of `module` are, those of packed layers counted unpacked."""
    from lorasmith.engine.quantization.frozen_linear import FrozenLinear

    packed = (layer for layer in module.modules() if isinstance(layer, FrozenLinear))
    plain = sum(parameter.numel() for parameter in module.parameters())
    return plain + sum(layer.in_features * layer.out_features for layer in packed)
