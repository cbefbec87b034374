"""Packing a whole module, one layer after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lorasmith.engine.families import Quantization
from lorasmith.engine.quantization import is_packed
from lorasmith.engine.quantization.frozen_linear import FrozenLinear
from lorasmith.engine.quantization.products import require_products


def pack(
    module: nn.Module,
    device: torch.device,
    quantization: Quantization,
    quantized_matmul: bool,
    skip: Sequence[str],
    rests_on: torch.device,
) -> int:
    """Do what `quantization.pack_module` says."""
    if quantization == "none":
        module.to(rests_on)
        return 0
    multiplied = quantized_matmul and quantization != "nf4"
    if multiplied:
        require_products(quantization, device)
    paths = [path for path, layer in module.named_modules() if is_packed(path, layer) and path not in skip]
    for path in paths:
        parent, _, name = path.rpartition(".")
        holder = module.get_submodule(parent)
        layer = getattr(holder, name)
        if isinstance(layer, FrozenLinear):
            continue
        setattr(holder, name, FrozenLinear(layer, quantization, device, quantized_matmul=multiplied).to(rests_on))
        # Or the last layer's weight would be held while the next one is packed.
        del layer
    module.to(rests_on)
    return len(paths)
