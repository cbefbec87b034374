"""Adapters that compute in the base model's 16 bits, while their weights stay in fp32.

The weights are rounded anew in each forward pass, inside the graph, so that gradients reach the fp32 ones. No fp32 copy
of a layer's input or result is made or kept, which is what an fp32 LoRA costs most (a quarter of all activations).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorasmith.engine.adapters.change import row_norms
from lorasmith.engine.adapters.module import MAGNITUDE, PEFT_NAME, AdapterModule


def compute_as_base(module: AdapterModule) -> None:
    """Let a LoRA, DoRA, LoHa or LoKr compute in the format of its layer's inputs; other kinds stay as they are.

    A change of a weight smaller than 1/256 of it (bf16) is seen only once it has grown, as in a file of 16 bits. What
    DoRA divides by is still computed in fp32: its effect is the small difference of two numbers near 1.
    """
    layer = module.layer
    if module.kind in ("lora", "dora"):
        layer.cast_input_dtype_enabled = False
        for matrix in (layer.lora_A[PEFT_NAME], layer.lora_B[PEFT_NAME]):
            # In place of the method alone, so that what is hooked to the module stays.
            matrix.forward = partial(_apply_matrix, matrix)
    if module.kind == "dora":
        layer.lora_magnitude_vector[PEFT_NAME].forward = partial(_apply_dora, module)
    if module.kind in ("loha", "lokr"):
        layer._get_delta_activations = partial(_apply_change, layer)


def _apply_matrix(matrix: Any, x: Tensor) -> Tensor:
    """Apply the down or up matrix of a LoRA as its layer would, in the format of `x`."""
    weight = matrix.weight.to(x.dtype)
    if isinstance(matrix, nn.Conv2d):
        convolved: Tensor = matrix._conv_forward(x, weight, None)
        return convolved
    return functional.linear(x, weight)


def _apply_change(layer: Any, name: str, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Apply the whole change of a LoHa or LoKr."""
    dropped = layer.training and bool(layer.rank_dropout[name])
    change = layer.get_delta_weight(name, apply_rank_dropout=dropped).to(x.dtype)
    return _frozen_product(layer.get_base_layer())(x, change)


def _apply_dora(
    module: AdapterModule,
    x: Tensor,
    *,
    scaling: float,
    base_layer: Any,
    base_result: Tensor | None = None,
    **matrices: Any,
) -> Tensor:
    """Return what DoRA adds to the layer's result: (m / n - 1) · base + m / n · product, m learned and n the norms.

    n is a constant for the gradient (arXiv:2402.09353, section 4.3). Called by peft with its arguments.
    """
    bias = base_layer.bias
    if base_result is None:
        # With dropout the base's part has the thinned-out input as well, as in peft.
        plain = _frozen_product(base_layer)(x, base_layer.weight)
    else:
        plain = base_result if bias is None else base_result - _by_channel(bias, x)
    with torch.no_grad():
        norms = row_norms(module)
    ratio = module.tensors[MAGNITUDE].flatten() / norms
    product = matrices["lora_B"](matrices["lora_A"](x))
    learned: Tensor = _by_channel(ratio * scaling, x).to(x.dtype) * product
    return _by_channel(ratio - 1.0, x).to(x.dtype) * plain + learned


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape values (out,) so that they multiply results of the same number of axes as `x`."""
    return values.view(-1, 1, 1) if x.dim() == 4 else values


def _frozen_product(layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the product of the layer's kind, without its bias, of an input and a weight."""
    if isinstance(layer, nn.Conv2d):
        shape = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return partial(functional.conv2d, bias=None, **shape)
    return functional.linear
