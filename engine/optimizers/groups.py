"""Which weights learn at which rate: text encoders, LoRA+ and chosen blocks have rates of their own."""

from __future__ import annotations

from typing import Any

from lorasmith.engine.adapters import UP, Adapter, AdapterModule
from lorasmith.engine.combinations import ONE_RATE
from lorasmith.engine.config import OptimizerSettings


def parameter_groups(adapter: Adapter, settings: OptimizerSettings, text_encoder_rate: float) -> list[dict[str, Any]]:
    """Return groups of the adapter's weights, the denoiser's first, each of one learning rate.

    `base_lr` is a group's learning rate at the top of the schedule: text encoders have their own, a module's `rate`
    multiplies it, and LoRA+ (Hayou et al., arXiv:2402.12354) that of the up matrices alone: neither the magnitudes of
    `dora` nor kinds without an up matrix. What finds one rate for all has it in all groups.
    """
    groups: dict[str, dict[str, Any]] = {}
    for component in dict.fromkeys(module.component for module in adapter.modules):
        modules = [module for module in adapter.modules if module.component == component]
        rate = settings.learning_rate if component == "denoiser" else text_encoder_rate
        ratio = settings.lora_plus_ratio
        if component != "denoiser" and settings.text_encoder_lora_plus_ratio:
            ratio = settings.text_encoder_lora_plus_ratio
        if settings.name in ONE_RATE:
            rate, ratio = settings.learning_rate, 1.0
        for part in ("down", "up", "all"):
            for module in modules:
                factor = 1.0 if settings.name in ONE_RATE else module.rate
                name = f"{component}.{part}" + ("" if factor == 1.0 else f" x{factor:g}")
                lr = rate * factor * (ratio if part == "up" else 1.0)
                fresh = {"params": [], "name": name, "lr": lr, "base_lr": lr}
                if parameters := _parameters(module, part):
                    groups.setdefault(name, fresh)["params"] += parameters
    return list(groups.values())


def _parameters(module: AdapterModule, part: str) -> list[Any]:
    """Return the weights of a module that belong to `part`; kinds without an up matrix are `all`."""
    if UP not in module.tensors:
        return list(module.tensors.values()) if part == "all" else []
    if part == "up":
        return [module.tensors[UP]]
    return [tensor for name, tensor in module.tensors.items() if name != UP] if part == "down" else []
