"""What a module changes in its layer's weight, for every kind, and how large that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorasmith.engine.adapters.module import DOWN, MAGNITUDE, PEFT_NAME, UP, AdapterModule
from lorasmith.engine.quantization import full_weight

_SLACK = 1e-5
"""How far above its limit a norm may be: scaling rounds, and must not go on for ever."""


@torch.no_grad()
def change_of(module: AdapterModule) -> Tensor:
    """Return what `module` adds to its layer's weight at strength 1, in the shape of that weight, fp32."""
    kinds: dict[str, Callable[[AdapterModule], Tensor]] = {
        "lora": _product,
        "dora": _dora,
        "loha": _of_peft,
        "lokr": _of_peft,
        "oft": _rotation,
        "boft": _rotation,
    }
    return kinds[module.kind](module)


def base_weight(layer: Any) -> Tensor:
    """Return the frozen weight inside an adapted layer as fp32, also where it is quantized, beside what is trained.

    The weights of a swapped block lie in main memory while it does not compute.
    """
    weight = full_weight(layer.get_base_layer())
    trained = next((tensor for tensor in layer.parameters() if tensor.requires_grad), weight)
    return weight.to(trained.device).float()


def row_norms(module: AdapterModule) -> Tensor:
    """Return the norm of each output's weights (out,) in a DoRA's layer, its product added, as peft computes it."""
    layer, product = module.layer, _product(module)
    weight = base_weight(layer)
    norms: Tensor = layer.lora_magnitude_vector[PEFT_NAME].get_weight_norm(weight, product, 1.0)
    return norms.flatten()


def limit_norm(module: AdapterModule, limit: float) -> None:
    """Shrink the tensors of a LoRA, LoHa or LoKr whose change has a Frobenius norm above `limit`.

    As `scale_weight_norms` of sd-scripts: the change is scaled by limit / norm, each tensor by an equal share of that.
    Never waits for the device.
    """
    norm = _norm(module)
    factor = torch.where(norm > limit * (1.0 + _SLACK), limit / norm, 1.0)
    torch._foreach_mul_([tensor.detach() for tensor in module.tensors.values()], factor ** (1.0 / len(module.tensors)))


def _norm(module: AdapterModule) -> Tensor:
    """Return the Frobenius norm () of a change, written out only where it must be."""
    norm: Tensor
    tensors = {name: tensor.detach() for name, tensor in module.tensors.items()}
    if module.kind == "lora":
        # ‖U D‖² = tr(UᵀU · DDᵀ)
        up, down = tensors[UP].flatten(1), tensors[DOWN].flatten(1)
        norm = torch.sum((up.T @ up) * (down @ down.T)).clamp(min=0).sqrt()
    elif module.kind == "lokr":
        # The norm of a Kronecker product is the product of the norms.
        second = tensors["lokr_w2"] if "lokr_w2" in tensors else tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
        norm = tensors["lokr_w1"].norm() * second.norm()
    else:
        norm = change_of(module).norm()
        return norm
    return norm * abs(module.scale)


def _product(module: AdapterModule) -> Tensor:
    change = _written_out(module.down, module.up) * module.scale
    if module.start is not None:
        change -= _written_out(module.start[DOWN], module.start[UP]) * module.scale
    return change


def _written_out(down: Tensor, up: Tensor) -> Tensor:
    down, up = down.float(), up.float()
    if down.dim() == 2:
        return up @ down
    return torch.einsum("or,rikl->oikl", up.flatten(1), down)


def _dora(module: AdapterModule) -> Tensor:
    weight = base_weight(module.layer)
    turned = weight + _product(module)
    ratio = module.tensors[MAGNITUDE].flatten() / row_norms(module)
    change: Tensor = ratio.view(-1, *(1 for _ in weight.shape[1:])) * turned - weight
    return change


def _of_peft(module: AdapterModule) -> Tensor:
    change: Tensor = module.layer.get_delta_weight(PEFT_NAME)
    return change.float()


def _rotation(module: AdapterModule) -> Tensor:
    weight = base_weight(module.layer)
    change: Tensor = module.layer.change(weight.flatten(1).T)
    return change.T.reshape(weight.shape)
