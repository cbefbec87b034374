"""Optimizers: how each is built, how its learning rate is set and read, and its whole state as plain numbers.

Every optimizer here was chosen so that a resumed run continues bit for bit: its state survives the way through
`optimizer_tensors` and `load_optimizer` unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch.optim import Optimizer

from lorasmith.engine.adapters import Adapter
from lorasmith.engine.combinations import ONE_RATE as ONE_RATE
from lorasmith.engine.combinations import SCHEDULE_FREE as SCHEDULE_FREE
from lorasmith.engine.config import AdapterSettings, OptimizerSettings
from lorasmith.engine.optimizers.fused_backward import FusedBackward as FusedBackward
from lorasmith.engine.optimizers.groups import parameter_groups as parameter_groups
from lorasmith.engine.optimizers.schedule_free import ScheduleFreeAverage as ScheduleFreeAverage
from lorasmith.engine.optimizers.state import load_optimizer as load_optimizer
from lorasmith.engine.optimizers.state import optimizer_tensors as optimizer_tensors

Groups = list[dict[str, Any]]
Build = Callable[..., Any]


def build_optimizer(adapter: Adapter, settings: OptimizerSettings, adapter_settings: AdapterSettings) -> Optimizer:
    """Return the optimizer named in `settings` over the adapter's parameter groups."""
    groups = parameter_groups(adapter, settings, adapter_settings.text_encoder_learning_rate)
    build = _BUILDERS[settings.name]
    optimizer = build(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    assert isinstance(optimizer, Optimizer)
    return optimizer


def _torch_adamw(groups: Groups, **settings: Any) -> Optimizer:
    # Fused: one pass over each tensor; a third of the foreach version's time on a CPU, fewer kernels on a GPU.
    return torch.optim.AdamW(groups, fused=True, **settings)


def _bitsandbytes(name: str, groups: Groups, *, paged: bool = False, **settings: Any) -> Any:
    # It tells its missing CPU kernels to stderr, over whatever is on the screen.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.optim

    # There is nothing to spill from on a CPU, and the library would only warn of it.
    paged = paged and groups[0]["params"][0].device.type != "cpu"
    return getattr(bitsandbytes.optim, name)(groups, is_paged=paged, **settings)


def _adafactor(groups: Groups, **settings: Any) -> Any:
    # The one of transformers: torch's has a rate that follows the weights' size, and up matrices start at 0.
    from transformers.optimization import Adafactor

    return Adafactor(groups, scale_parameter=False, relative_step=False, warmup_init=False, **settings)


def _prodigy(groups: Groups, **settings: Any) -> Any:
    from pytorch_optimizer import Prodigy

    # The authors' advice for diffusion models (Mishchenko & Defazio, arXiv:2306.06101, and their README).
    return Prodigy(groups, weight_decouple=True, bias_correction=True, safeguard_warmup=True, **settings)


def _prodigy_schedulefree(groups: Groups, **settings: Any) -> Any:
    from pytorch_optimizer import Prodigy

    from lorasmith.engine.optimizers.schedule_free_prodigy import ScheduleFreeProdigy

    # No momentum: averaging takes its place. No bias correction: both classes count steps in the same number.
    advice = {"weight_decouple": True, "bias_correction": False, "safeguard_warmup": True, "betas": (0.0, 0.999)}
    return ScheduleFreeProdigy(Prodigy(groups, **advice, **settings))


def _pytorch_optimizer(name: str, groups: Groups, **settings: Any) -> Any:
    import pytorch_optimizer

    return getattr(pytorch_optimizer, name)(groups, **settings)


_BUILDERS: Final[dict[str, Build]] = {
    "adamw": _torch_adamw,
    "adamw8bit": partial(_bitsandbytes, "AdamW8bit"),
    "paged_adamw": partial(_bitsandbytes, "AdamW32bit", paged=True),
    "paged_adamw8bit": partial(_bitsandbytes, "AdamW8bit", paged=True),
    # Defazio et al., arXiv:2405.15682.
    "adamw_schedulefree": partial(_pytorch_optimizer, "ScheduleFreeAdamW"),
    "adafactor": _adafactor,
    # Chen et al., arXiv:2302.06675.
    "lion": partial(_pytorch_optimizer, "Lion", weight_decouple=True),
    "lion8bit": partial(_bitsandbytes, "Lion8bit"),
    "paged_lion8bit": partial(_bitsandbytes, "Lion8bit", paged=True),
    "prodigy": _prodigy,
    "prodigy_schedulefree": _prodigy_schedulefree,
    # Adam with D-Adaptation (Defazio & Mishchenko, arXiv:2301.07733).
    "dadaptation": partial(_pytorch_optimizer, "DAdaptAdam", weight_decouple=True),
    # Luo et al., arXiv:2307.02047.
    "came": partial(_pytorch_optimizer, "CAME", weight_decouple=True),
    # Pagliardini et al., arXiv:2409.03137, without its warm-ups of alpha and beta3: these are made for runs of 10⁵
    # steps and more, and over a LoRA's few thousand the slow average, which starts at 0, is still small.
    "ademamix": partial(_bitsandbytes, "AdEMAMix"),
    "ademamix8bit": partial(_bitsandbytes, "AdEMAMix8bit"),
}


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set each group's rate to its `base_lr` times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def effective_rate(optimizer: Optimizer) -> float:
    """Return the first group's learning rate; times the distance found so far (`d`) where the optimizer finds one."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))
