"""The values that an adapter begins with; they follow from the seed and the layer's name alone.

Each has a source: PyTorch's linear layers for LoRA, LyCORIS for LoHa and LoKr (whose learning rates people know), peft
for the other starts of a LoRA.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lorasmith.engine.adapters.change import base_weight, row_norms
from lorasmith.engine.adapters.module import DOWN, MAGNITUDE, UP, AdapterModule
from lorasmith.engine.adapters.started import first_product, start_beside_weight, start_from_weight
from lorasmith.engine.draws import torch_rng

_LOHA_STD = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0}
"""lycoris/modules/loha.py; hada_w2_a is 0."""
_LOKR_UNIFORM = ("lokr_w1", "lokr_w2_a")
"""lycoris/modules/lokr.py; lokr_w2 and lokr_w2_b are 0."""


@torch.no_grad()
def draw_first_weights(module: AdapterModule, init: str, seed: int, unpacked: Tensor | None = None) -> None:
    """Fill the tensors of `module`; `init` as in `adapter.init`.

    `unpacked` is the weight (out, in) that the layer had before it was quantized, for `loftq`.
    """
    match module.kind:
        case "lora" | "dora":
            _fill_lora(module, init, torch_rng(seed, module.name))
            if init == "loftq" and unpacked is not None:
                _make_good(module, unpacked, torch_rng(seed, module.name))
        case "loha":
            generator = torch_rng(seed, module.name)
            for name, tensor in module.tensors.items():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * _LOHA_STD.get(name, 0.0))
        case "lokr":
            generator = torch_rng(seed, module.name)
            for name, tensor in module.tensors.items():
                tensor.copy_(_uniform(tensor.shape, generator) * (name in _LOKR_UNIFORM))
        case "oft" | "boft":
            module.tensors["oft_blocks"].zero_()


def _fill_lora(module: AdapterModule, init: str, generator: torch.Generator) -> None:
    shape = module.down.shape
    module.up.zero_()
    match init:
        case "gaussian":
            module.down.copy_(torch.randn(shape, generator=generator) / module.rank)
        case "orthogonal":
            _fill_orthogonal(module, generator)
        case _:
            module.down.copy_(_uniform(shape, generator))
    if init in ("pissa", "olora"):
        weight = base_weight(module.layer).flatten(1)
        _begin_with(module, first_product(weight, init, module.rank, module.scale, generator))
        start_from_weight(module)
    if MAGNITUDE in module.tensors:
        magnitude = module.tensors[MAGNITUDE]
        magnitude.copy_(row_norms(module).view(magnitude.shape))


def _begin_with(module: AdapterModule, first: dict[str, Tensor]) -> None:
    count = len(first[DOWN])  # less than the rank in small layers; the others stay as they were drawn
    module.down.view(module.rank, -1)[:count] = first[DOWN]
    module.up.view(-1, module.rank)[:, :count] = first[UP]


def _make_good(module: AdapterModule, unpacked: Tensor, generator: torch.Generator) -> None:
    """Begin with the main directions of what quantization took off the weight (LoftQ with one iteration)."""
    weight = base_weight(module.layer)
    lost = unpacked.to(weight.device, torch.float32) - weight
    _begin_with(module, first_product(lost, "loftq", module.rank, module.scale, generator))
    start_beside_weight(module)


def _fill_orthogonal(module: AdapterModule, generator: torch.Generator) -> None:
    """Give down and up separate halves of an orthogonal basis, so that their product is 0 but for rounding.

    peft's `orthogonal`, after datta0.github.io/posts/rethink-lora-init.
    """
    rank = module.rank
    basis = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    inputs = torch.randn(module.down[0].numel(), rank // 2, generator=generator) @ basis[0::2] / 10.0
    outputs = torch.randn(len(module.up), rank // 2, generator=generator) @ basis[1::2] / 10.0
    module.down.copy_(inputs.T.reshape(module.down.shape))
    module.up.copy_(outputs.reshape(module.up.shape))


def _uniform(shape: Any, generator: torch.Generator) -> Tensor:
    """Return what a linear layer starts with: Kaiming uniform with a = √5, that is ±1 / √(numbers in a row)."""
    values = torch.empty(shape)
    bound = 1.0 / math.sqrt(values[0].numel())
    return values.uniform_(-bound, bound, generator=generator)
