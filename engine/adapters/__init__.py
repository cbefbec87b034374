"""The LoRA: small trainable matrices beside frozen layers, attached through peft.

LoRA (Hu et al., arXiv:2106.09685) adds `up @ down * alpha / rank` to a layer's weight. LoCon (Yeh et al.,
arXiv:2309.14859) does the same for convolutions: `down` is a convolution of the layer's own shape to `rank` channels,
`up` one of 1x1. Weights are always 32-bit floats, whatever the base model is stored in, and their first values follow
from the seed and the layer's name alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorasmith.engine.config import AdapterSettings
from lorasmith.engine.draws import torch_rng
from lorasmith.engine.errors import BaseModelError, CheckpointError
from lorasmith.engine.families import Component, Family

_PEFT_NAME = "default"


Kind = Literal["lora", "dora", "loha", "lokr", "oft", "boft"]
"""What a module is; LoCon is `lora` on a convolution."""
DOWN, UP = "lora_A.weight", "lora_B.weight"


@dataclass
class AdapterModule:
    """The trained tensors of one layer, under the names that peft gives them."""

    component: Component
    path: str
    """Dotted path of the layer inside the component."""
    kind: Kind
    tensors: dict[str, nn.Parameter]
    """`lora_A.weight` (rank, in[, k, k]) and `lora_B.weight` (out, rank[, 1, 1]) for LoRA, with
    `lora_magnitude_vector.weight` for DoRA; `hada_…` for LoHa, `lokr_…` for LoKr, `oft_R.weight`; `boft_…`."""
    rank: int
    alpha: float
    scale: float
    """What the product of the tensors is multiplied by; 1 where the kind has none."""
    rate: float = 1.0
    """Factor on the learning rate."""
    start: dict[str, Tensor] | None = None
    """The first values, where the base model's weight was changed so that they change nothing: the module's own change
    is now less start."""

    @property
    def down(self) -> nn.Parameter:
        """The down matrix of a LoRA or DoRA."""
        return self.tensors[DOWN]

    @property
    def up(self) -> nn.Parameter:
        """The up matrix of a LoRA or DoRA."""
        return self.tensors[UP]

    @property
    def name(self) -> str:
        """The component and path that name this module in checkpoints."""
        return f"{self.component}.{self.path}"


@dataclass
class Adapter:
    """Every trained module of a run, in a fixed order."""

    modules: list[AdapterModule]
    dropouts: list[nn.Dropout] = field(default_factory=list)
    layers: list[Any] = field(default_factory=list)
    """The peft layers, each around the base model's own layer."""

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
        with torch.no_grad():
            down, up = module.down.float(), module.up.float()
            if down.dim() == 2:
                return up @ down * module.scale
            return torch.einsum("or,rikl->oikl", up.flatten(1), down) * module.scale

    def after_step(self) -> None:
        """Do what follows each update of the weights; nothing yet."""

    def all_finite(self) -> bool:
        """Tell whether no weight is NaN or infinite; waits for the device."""
        with torch.no_grad():
            norms = torch._foreach_norm([parameter.detach() for parameter in self.parameters()])
            return bool(torch.isfinite(torch.stack(norms)).all())

    def train(self, mode: bool = True) -> None:
        """Switch LoRA dropout on or off; nothing else of the base model depends on a mode."""
        for dropout in self.dropouts:
            dropout.train(mode)

    def set_enabled(self, enabled: bool) -> None:
        """Switch the whole adapter on, or off to get exactly the base model."""
        for layer in self.layers:
            # Not peft's enable_adapters: it also changes requires_grad.
            layer._disable_adapters = not enabled

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for module in self.modules:
            for tensor, parameter in module.tensors.items():
                yield f"{module.name}.{tensor}", parameter


def attach_adapter(family: Family, settings: AdapterSettings, seed: int) -> Adapter:
    """Freeze the loaded base model and add trainable LoRA modules to it.

    Raises BaseModelError where a wanted component or every wanted layer is missing in it.
    """
    adapter = Adapter([])
    wanted = family.spec.targets[settings.targets]
    convolutions = family.spec.conv_targets if settings.kind == "locon" else ()
    _attach(adapter, "denoiser", family.denoiser, (*wanted, *convolutions), settings)
    if settings.text_encoder:
        if not family.text_encoders:
            raise BaseModelError(
                "The base model has no text encoder to train.", fix="Set adapter.text_encoder = false."
            )
        for component, encoder in family.text_encoders.items():
            _attach(adapter, component, encoder, family.spec.text_encoder_targets, settings)
    _draw_first_weights(adapter, seed)
    return adapter


def target_paths(root: nn.Module, suffixes: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return the linear and convolution layers of `root` whose dotted path is or ends in one of `suffixes`."""
    return {
        path: module
        for path, module in root.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and any(path == suffix or path.endswith(f".{suffix}") for suffix in suffixes)
    }


def _attach(
    adapter: Adapter, component: Component, root: nn.Module, suffixes: tuple[str, ...], settings: AdapterSettings
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    layers = target_paths(root, suffixes)
    if not layers:
        raise BaseModelError(
            f"The base model's {component} has no layer to adapt.",
            why=f"No linear or convolution layer is named {', '.join(suffixes)}.",
            fix="Choose other adapter.targets, or report this base model.",
        )
    # A 1x1 convolution is a linear layer in all but name and takes the plain rank, as in kohya's files.
    convolutions = [
        path for path, layer in layers.items() if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1
    ]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        rank_pattern=dict.fromkeys(convolutions, settings.conv_rank),
        alpha_pattern=dict.fromkeys(convolutions, settings.conv_alpha),
        lora_dropout=settings.dropout,
        target_modules=sorted(layers),
        init_lora_weights=False,
    )
    root.requires_grad_(False)
    inject_adapter_in_model(config, root, _PEFT_NAME)
    for path in sorted(layers):
        layer: Any = root.get_submodule(path)
        down, up = layer.lora_A[_PEFT_NAME], layer.lora_B[_PEFT_NAME]
        # peft makes them in the base's type, and bf16 weights would swallow small updates.
        down.to(torch.float32)
        up.to(torch.float32)
        rank, alpha = layer.r[_PEFT_NAME], layer.lora_alpha[_PEFT_NAME]
        tensors = {DOWN: down.weight, UP: up.weight}
        adapter.modules.append(AdapterModule(component, path, "lora", tensors, rank, alpha, alpha / rank))
        adapter.layers.append(layer)
        dropout = layer.lora_dropout[_PEFT_NAME]
        if isinstance(dropout, nn.Dropout):
            adapter.dropouts.append(dropout)


def _draw_first_weights(adapter: Adapter, seed: int) -> None:
    """Fill `down` as a linear layer starts (Kaiming uniform, a = √5: ±1/√fan_in) and `up` with zeros."""
    for module in adapter.modules:
        bound = 1.0 / math.sqrt(module.down[0].numel())
        values = torch.empty(module.down.shape).uniform_(-bound, bound, generator=torch_rng(seed, module.name))
        with torch.no_grad():
            module.down.copy_(values)
            module.up.zero_()
