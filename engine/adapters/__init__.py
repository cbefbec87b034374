"""The adapter: small trainable tensors beside frozen layers, attached through peft.

LoRA (Hu et al., arXiv:2106.09685) adds `up @ down * alpha / rank` to a layer's weight. LoCon, LoHa and LoKr (Yeh et
al., arXiv:2309.14859) do the same for convolutions, with the entry-by-entry product of two such products, and with a
Kronecker product. DoRA (Liu et al., arXiv:2402.09353) learns the length of each row apart. OFT and BOFT turn the
outputs (see `rotation`). Weights are always 32-bit floats, whatever the base model is stored in, and their first values
follow from the seed and the layer's name alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.engine.adapter_layers import (
    has_patterns,
    plan_layers,
    unfound_patterns,
    wanted_suffixes,
    without_patterns,
)
from lorasmith.engine.adapters.change import change_of, limit_norm
from lorasmith.engine.adapters.first_weights import draw_first_weights
from lorasmith.engine.adapters.injection import build_modules, weight_shapes, wrap_layers
from lorasmith.engine.adapters.module import DOWN as DOWN
from lorasmith.engine.adapters.module import MAGNITUDE as MAGNITUDE
from lorasmith.engine.adapters.module import UP as UP
from lorasmith.engine.adapters.module import AdapterModule as AdapterModule
from lorasmith.engine.adapters.module import Kind as Kind
from lorasmith.engine.adapters.precision import compute_as_base
from lorasmith.engine.config import AdapterSettings
from lorasmith.engine.errors import BaseModelError, CheckpointError, ConfigError
from lorasmith.engine.families import Component, Family, FamilySpec
from lorasmith.engine.quantization import full_weight, is_frozen_linear

_START = "start."
"""Before the names of a module's first values in checkpoints."""


@dataclass
class Adapter:
    """Every trained module of a run, in a fixed order."""

    modules: list[AdapterModule]
    dropouts: list[nn.Module] = field(default_factory=list)
    """What drops something in training, and so follows `train`."""
    max_norm: float = 0.0
    """Largest Frobenius norm of a module's change; 0: none."""

    def parameters(self) -> list[nn.Parameter]:
        """Return all trained parameters, those of each module in turn."""
        return [parameter for module in self.modules for parameter in module.tensors.values()]

    def num_parameters(self) -> int:
        """Return how many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def state_dict(self, *, copy: bool = True) -> dict[str, Tensor]:
        """Return copies on the CPU under `COMPONENT.PATH.TENSOR`, e.g. `….lora_A.weight` (down), `.lora_B.weight` (up).

        Without `copy` the weights themselves, where they are.
        """
        return {key: value.detach().to("cpu", copy=True) if copy else value.detach() for key, value in self._named()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over saved values; raises CheckpointError where names or shapes are those of another adapter."""
        own = dict(self._named())
        different = sorted(own.keys() ^ tensors.keys())
        different += sorted(key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape)
        if different:
            raise CheckpointError(
                "The checkpoint's LoRA does not fit the run's.",
                why=f"{len(different)} of its tensors differ in name or shape, e.g. {different[0]}.",
                fix="Resume with the settings that the run began with, or start a new run.",
            )
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(tensors[key])

    def delta(self, module: AdapterModule) -> Tensor:
        """Return what `module` adds to its layer's weight at strength 1, in the shape of that weight, fp32."""
        return change_of(module)

    def after_step(self) -> None:
        """Shrink what has grown beyond `max_norm`, after each update of the weights; never waits for the device."""
        if self.max_norm:
            for module in self.modules:
                limit_norm(module, self.max_norm)

    def all_finite(self) -> bool:
        """Tell whether no weight is NaN or infinite; waits for the device."""
        with torch.no_grad():
            norms = torch._foreach_norm([parameter.detach() for parameter in self.parameters()])
            return bool(torch.isfinite(torch.stack(norms)).all())

    def train(self, mode: bool = True) -> None:
        """Switch dropout of all kinds on or off; nothing else of the base model depends on a mode."""
        for dropout in self.dropouts:
            dropout.train(mode)

    def compute_as_base(self) -> None:
        """Let every module compute in the base model's number format from now on; its weights stay in fp32.

        Not for rotations and not for LoRAs that keep their start, which 16 bits would lose; they stay in fp32.
        """
        for module in self.modules:
            if module.start is None:
                compute_as_base(module)

    def set_enabled(self, enabled: bool) -> None:
        """Switch the whole adapter on, or off to get exactly the base model."""
        for module in self.modules:
            # Not peft's enable_adapters: it also changes requires_grad.
            module.layer._disable_adapters = not enabled

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for module in self.modules:
            for name, tensor in module.tensors.items():
                yield f"{module.name}.{name}", tensor
            # Not drawn anew in a resumed run: another machine finds other directions of the same weight.
            for name, first in (module.start or {}).items():
                yield f"{module.name}.{_START}{name}", first


def attach_adapter(family: Family, settings: AdapterSettings, seed: int) -> Adapter:
    """Freeze the loaded base model and put adapter layers around its own.

    Raises BaseModelError where a wanted component or every wanted layer is missing in it, ConfigError where a pattern
    of the settings is found in none.
    """
    components = _components(family, settings)
    _check_patterns(components, family.spec, settings)
    adapter = Adapter([], max_norm=settings.max_norm)
    for component, root in components.items():
        plans = plan_layers(weight_shapes(root), family.spec, settings, component)
        if not plans:
            raise _nothing_to_adapt(component, family.spec, settings)
        wrap_layers(root, plans, settings)
        for module, dropouts in build_modules(root, component, plans, settings):
            adapter.modules.append(module)
            adapter.dropouts += dropouts
    unpacked = _unpacked(family, adapter) if settings.init == "loftq" else {}
    for module in adapter.modules:
        draw_first_weights(module, settings.init, seed, unpacked.get(module.name))
    return adapter


def _is_packed(module: AdapterModule) -> bool:
    layer: Any = module.layer
    return is_frozen_linear(layer.get_base_layer())


def _unpacked(family: Family, adapter: Adapter) -> dict[str, Tensor]:
    """Return by module name the weights that packed layers had before, read once more and left on the disk."""
    weights: dict[str, Tensor] = {}
    for component in {module.component for module in adapter.modules}:
        packed = [module for module in adapter.modules if module.component == component and _is_packed(module)]
        root = family.reload_part(component) if packed else None
        for module in packed:
            assert root is not None
            weights[module.name] = full_weight(root.get_submodule(module.path))
    return weights


def selected_layers(
    root: nn.Module, spec: FamilySpec, settings: AdapterSettings, component: Component
) -> dict[str, nn.Module]:
    """Return the layers of `root` that the settings adapt, by path; `adapter_layers.plan_layers` is torch-free."""
    return {path: root.get_submodule(path) for path in plan_layers(weight_shapes(root), spec, settings, component)}


def _components(family: Family, settings: AdapterSettings) -> dict[Component, nn.Module]:
    components = {"denoiser": family.denoiser}
    if settings.text_encoder:
        wanted = family.spec.trainable_text_encoders
        encoders = {name: encoder for name, encoder in family.text_encoders.items() if name in wanted}
        if not encoders:
            raise BaseModelError(
                "The base model has no text encoder to train.", fix="Set adapter.text_encoder = false."
            )
        components |= encoders
    return components


def _check_patterns(components: Mapping[Component, nn.Module], spec: FamilySpec, settings: AdapterSettings) -> None:
    if has_patterns(settings):
        found = [
            (component, path)
            for component, root in components.items()
            for path in plan_layers(weight_shapes(root), spec, without_patterns(settings), component)
        ]
        if problems := unfound_patterns(found, spec, settings):
            raise ConfigError(f"{problems[0]}.")


def _nothing_to_adapt(component: Component, spec: FamilySpec, settings: AdapterSettings) -> BaseModelError:
    suffixes = ", ".join(wanted_suffixes(spec, settings, component))
    return BaseModelError(
        f"The base model's {component} has no layer to adapt.",
        why=f"No linear or convolution layer is named {suffixes}, or the patterns of the settings leave all out.",
        fix="Choose other adapter.targets, adapter.include or adapter.exclude, or report this base model.",
    )
