"""An optimizer's whole state as tensors and JSON. No pickle, so that a checkpoint can hold nothing but numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lorasmith.engine.errors import CheckpointError

_TENSOR = "tensor"
_SETTINGS = ("name", "base_lr", "weight_decay")
"""What a group has from the run's settings, not from training: an extended run's may differ from its checkpoint's."""


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
    _move_groups(optimizer)
    if getattr(optimizer, "is_paged", False):
        _page(optimizer)


def _move_groups(optimizer: Optimizer) -> None:
    """Move the tensors of groups to their weights: `load_state_dict` does that for the state alone."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        for key, value in group.items():
            if isinstance(value, Tensor):
                group[key] = value.to(device)


def _page(optimizer: Any) -> None:
    """Put the loaded state of a paged optimizer back into memory that can spill: loading took it out of there."""
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            if key in state and state[key].shape == parameter.shape:
                paged = optimizer.get_state_buffer(parameter, dtype=state[key].dtype)
                state[key] = paged.copy_(state[key])


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
