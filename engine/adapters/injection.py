"""Putting adapter layers around the base model's own: peft's, or own ones for rotations.

peft gets one injection for all layers of the same settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.engine.adapter_combinations import ROTATIONS
from lorasmith.engine.adapter_layers import LayerPlan, tensor_shapes, whole_factors
from lorasmith.engine.adapters.module import PEFT_NAME, AdapterModule, Kind
from lorasmith.engine.config import AdapterSettings
from lorasmith.engine.config_adapter import scale_of
from lorasmith.engine.families import Component

Shape = tuple[int, ...]
_WHOLE = 1 << 30
"""A rank from which on peft keeps a LoKr's factor whole: half the side of any layer's."""


class RankDropout(nn.Module):
    """Drops ranks of whole pictures in training, as sd-scripts does: what a down matrix gives, (B, …, rank)."""

    def __init__(self, share: float, axis: int) -> None:
        """Drop `share` of the ranks, which lie along `axis`; the others grow so that the mean stays."""
        super().__init__()
        self.share, self.axis = share, axis

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with some ranks zero, or as it is outside training."""
        if not self.training:
            return x
        shape = [1] * x.dim()
        shape[0], shape[self.axis] = x.shape[0], x.shape[self.axis]
        kept = torch.rand(shape, device=x.device) >= self.share
        return x * kept / (1.0 - self.share)


def weight_shapes(root: nn.Module) -> dict[str, Shape]:
    """Return the weight shape of each linear and convolution layer of `root`, by dotted path."""
    layers = root.named_modules()
    return {path: _weight_shape(layer) for path, layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)}


def wrap_layers(root: nn.Module, plans: Mapping[str, LayerPlan], settings: AdapterSettings) -> None:
    """Put an adapter layer around each planned layer (by dotted path) of `root`; base weights are frozen."""
    from peft import inject_adapter_in_model

    root.requires_grad_(False)
    if settings.kind in ROTATIONS:
        _wrap_in_rotations(root, plans, settings)
        return
    groups: dict[Any, list[str]] = {}
    for path, plan in plans.items():
        groups.setdefault(_group_key(_weight_shape(root.get_submodule(path)), plan, settings), []).append(path)
    for key, paths in groups.items():
        config = _peft_config(key, settings)
        # As one pattern for whole paths: a list would also take layers whose paths only end in these.
        config.target_modules = "|".join(re.escape(path) for path in paths)
        # What the group before left behind; peft would warn of two adapters.
        vars(root).pop("peft_config", None)
        inject_adapter_in_model(config, root, PEFT_NAME)


def build_modules(
    root: nn.Module, component: Component, plans: Mapping[str, LayerPlan], settings: AdapterSettings
) -> Iterator[tuple[AdapterModule, list[nn.Module]]]:
    """Yield a module for each wrapped layer, its tensors in fp32, with what in it drops something in training."""
    kind: Kind = "lora" if settings.kind == "locon" else settings.kind
    for path in sorted(plans):
        plan, layer = plans[path], root.get_submodule(path)
        shape = _weight_shape(layer.get_base_layer())  # type: ignore[operator]
        tensors = {name: _trained_tensor(layer, name) for name in tensor_shapes(shape, plan, settings)}
        scale = _scale(shape, plan, settings)
        module = AdapterModule(component, path, kind, tensors, plan.rank, plan.alpha, scale, plan.rate, layer=layer)
        yield module, _settle(module, settings)


def _group_key(shape: Shape, plan: LayerPlan, settings: AdapterSettings) -> tuple[int, float]:
    """Return what peft has one setting of for all layers of an injection: rank and alpha."""
    if settings.kind == "lokr" and whole_factors(shape, plan.rank, settings):
        return _WHOLE, plan.alpha
    return plan.rank, plan.alpha


def _peft_config(key: tuple[int, float], settings: AdapterSettings) -> Any:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    rank, alpha = key
    match settings.kind:
        case "loha":
            return LoHaConfig(r=rank, alpha=alpha, rank_dropout=settings.rank_dropout)
        case "lokr":
            factor = settings.lokr_factor or -1
            return LoKrConfig(r=rank, alpha=alpha, rank_dropout=settings.rank_dropout, decompose_factor=factor)
    dora = settings.kind == "dora"
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=settings.dropout, init_lora_weights=False, use_dora=dora)


def _wrap_in_rotations(root: nn.Module, plans: Mapping[str, LayerPlan], settings: AdapterSettings) -> None:
    from lorasmith.engine.adapters.rotation import RotatedLayer

    for path, plan in plans.items():
        parent, _, name = path.rpartition(".")
        layer = root.get_submodule(path)
        (shape,) = tensor_shapes(_weight_shape(layer), plan, settings).values()
        setattr(root.get_submodule(parent), name, RotatedLayer(layer, shape))


def _trained_tensor(layer: Any, name: str) -> nn.Parameter:
    """Return a tensor of an adapter layer in fp32; peft makes them in the base's type, which swallows small updates."""
    holder = getattr(layer, name.removesuffix(".weight"))
    if name.endswith(".weight"):
        holder[PEFT_NAME].to(torch.float32)
        parameter: nn.Parameter = holder[PEFT_NAME].weight
    else:
        parameter = holder[PEFT_NAME]
        parameter.data = parameter.data.float()
    parameter.requires_grad_(True)
    return parameter


def _scale(shape: Shape, plan: LayerPlan, settings: AdapterSettings) -> float:
    if settings.kind in ROTATIONS or (settings.kind == "lokr" and whole_factors(shape, plan.rank, settings)):
        return 1.0
    return scale_of(plan.rank, plan.alpha, settings)


def _settle(module: AdapterModule, settings: AdapterSettings) -> list[nn.Module]:
    """Set what peft's settings do not reach; return the parts of the layer that drop something in training."""
    layer = module.layer
    if module.kind in ("lora", "dora"):
        layer.scaling[PEFT_NAME] = module.scale
        dropouts: list[nn.Module] = [part for part in layer.lora_dropout.values() if isinstance(part, nn.Dropout)]
        if settings.rank_dropout:
            dropouts.append(_drop_ranks(layer, settings.rank_dropout))
        return dropouts
    if module.kind in ("loha", "lokr"):
        layer.scaling[PEFT_NAME] = module.scale
        # It draws whether to use the layer at all in each step, even where the answer is always yes.
        layer.module_dropout[PEFT_NAME] = -1.0
        return [layer] if settings.rank_dropout else []
    return []


def _drop_ranks(layer: Any, share: float) -> RankDropout:
    down = layer.lora_A[PEFT_NAME]
    dropout = RankDropout(share, 1 if isinstance(down, nn.Conv2d) else -1)
    down.register_forward_hook(lambda _module, _inputs, result: dropout(result))
    return dropout


def _weight_shape(layer: Any) -> Shape:
    """Return the shape of a layer's weight as if it were not quantized."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.shape)
