"""Optimizers and their parameter groups, and their whole state as plain tensors and JSON.

Every optimizer here was chosen so that a resumed run continues bit for bit: its state survives the way through
`optimizer_tensors` and `load_optimizer` unchanged. No pickle, so that a checkpoint can hold nothing but numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorasmith.engine.adapters import Adapter
from lorasmith.engine.config import AdapterSettings, OptimizerSettings
from lorasmith.engine.errors import CheckpointError

_TENSOR = "tensor"
_SETTINGS = ("name", "base_lr", "weight_decay")
"""What a group has from the run's settings, not from training: an extended run's may differ from its checkpoint's."""


def parameter_groups(adapter: Adapter, settings: OptimizerSettings, text_encoder_rate: float) -> list[dict[str, Any]]:
    """Return groups of the adapter's down and up matrices, the denoiser's first.

    `base_lr` is a group's learning rate at the top of the schedule: text encoders have their own, and LoRA+ (Hayou et
    al., arXiv:2402.12354) multiplies that of the up matrices. Prodigy finds one rate for all, so all its groups get 1.
    """
    groups = []
    for component in dict.fromkeys(module.component for module in adapter.modules):
        modules = [module for module in adapter.modules if module.component == component]
        rate = settings.learning_rate
        if component != "denoiser" and settings.name != "prodigy":
            rate = text_encoder_rate
        matrices = {"down": (1.0, [m.down for m in modules]), "up": (settings.lora_plus_ratio, [m.up for m in modules])}
        for matrix, (ratio, parameters) in matrices.items():
            lr = rate * ratio
            groups.append({"params": parameters, "name": f"{component}.{matrix}", "lr": lr, "base_lr": lr})
    return groups


def build_optimizer(adapter: Adapter, settings: OptimizerSettings, adapter_settings: AdapterSettings) -> Optimizer:
    """Return the optimizer named in `settings` over the adapter's parameter groups."""
    groups = parameter_groups(adapter, settings, adapter_settings.text_encoder_learning_rate)
    rate, decay = settings.learning_rate, settings.weight_decay
    match settings.name:
        case "adamw":
            # Fused: one pass over each tensor; a third of the foreach version's time on a CPU, fewer kernels on a GPU.
            return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=True)
        case "adamw8bit":
            # It tells its missing CPU kernels to stderr, over whatever is on the screen.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            from bitsandbytes.optim import AdamW8bit

            return _optimizer(AdamW8bit(groups, lr=rate, weight_decay=decay))
        case "adafactor":
            # The one of transformers: torch's has a rate that follows the weights' size, and up matrices start at 0.
            from transformers.optimization import Adafactor

            fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
            return _optimizer(Adafactor(groups, lr=rate, weight_decay=decay, **fixed))
        case "prodigy":
            from pytorch_optimizer import Prodigy

            # The authors' advice for diffusion models (Mishchenko & Defazio, arXiv:2306.06101, and their README).
            advice = {"bias_correction": True, "safeguard_warmup": True}
            return _optimizer(Prodigy(groups, lr=rate, weight_decay=decay, weight_decouple=True, **advice))
        case "lion":
            # Chen et al., arXiv:2302.06675.
            from pytorch_optimizer import Lion

            return _optimizer(Lion(groups, lr=rate, weight_decay=decay, weight_decouple=True))


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set each group's rate to its `base_lr` times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def effective_rate(optimizer: Optimizer) -> float:
    """Return the first group's learning rate; for Prodigy times the distance that it has found so far."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))


def optimizer_tensors(optimizer: Optimizer, *, copy: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's whole state as tensors on the CPU and a JSON-ready rest that names them.

    Without `copy` its own tensors, where they are.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest = {
        "state": {str(key): _pack(value, f"state.{key}", tensors) for key, value in state["state"].items()},
        "groups": [
            {key: _pack(value, f"groups.{i}.{key}", tensors) for key, value in group.items() if key != "params"}
            for i, group in enumerate(state["param_groups"])
        ],
    }
    if copy:
        # A copy each: 8-bit optimizers share one table between all weights, and safetensors refuses shared memory.
        tensors = {name: value.to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    return tensors, rest


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Put a state from `optimizer_tensors` into a fresh optimizer over the same parameters.

    Raises CheckpointError where the number of groups differs or a tensor is missing.
    """
    own = optimizer.state_dict()["param_groups"]
    if len(own) != len(rest["groups"]):
        raise CheckpointError(
            "The checkpoint's optimizer does not fit the run's.",
            why=f"It has {len(rest['groups'])} parameter groups, the run has {len(own)}.",
            fix="Resume with the settings that the run began with, or start a new run.",
        )
    try:
        groups = [_merge_group(fresh, saved, tensors) for fresh, saved in zip(own, rest["groups"], strict=True)]
        state = {int(key): _unpack(value, tensors) for key, value in rest["state"].items()}
    except KeyError as error:
        raise CheckpointError(f"The checkpoint's optimizer lacks the tensor {error}.") from error
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _optimizer(value: Any) -> Optimizer:
    """Give an optimizer of an untyped library its type."""
    assert isinstance(value, Optimizer)
    return value


def _merge_group(fresh: dict[str, Any], saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return `fresh` with the saved values; JSON has no tuples, so the fresh group says where one belongs."""
    group = dict(fresh)
    for key, packed in saved.items():
        if key in _SETTINGS:
            continue
        value = _unpack(packed, tensors)
        group[key] = tuple(value) if isinstance(fresh.get(key), tuple) else value
    return group


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Replace tensors in nested values by their names and collect them."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _pack(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which no checkpoint can hold")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, Mapping):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    return {key: _unpack(item, tensors) for key, item in value["dict"].items()}
