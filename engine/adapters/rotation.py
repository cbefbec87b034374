"""Rotations of a layer's inputs: the Cayley transform that OFT and BOFT share, and BOFT's layer.

peft has a BOFT too, but one that compiles a CUDA extension at its first use, does without the butterfly where it
cannot, and multiplies dense matrices as large as the layer. This one has the same tensors, means the same by them, and
needs neither. Liu et al., arXiv:2311.06243; OFT: Qiu et al., arXiv:2306.07280.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorasmith.engine.adapters.module import PEFT_NAME


def cayley(skew: Tensor) -> Tensor:
    """Return the rotations (I - S)(I + S)⁻¹ of skew-symmetric matrices S (n, b, b); never waits for the device.

    I + S can always be inverted. Not the Neumann series that peft has as well: its error grows with the rotation, and
    programs that read OFT files take the exact transform.
    """
    eye = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype).expand_as(skew)
    rotations: Tensor = torch.linalg.solve_ex(eye + skew, eye - skew, left=False).result
    return rotations


class ButterflyLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft has no types
    """A linear layer (or 1x1 convolution) whose inputs are turned by BOFT, and its outputs scaled.

    `boft_R` (stages, blocks, b, b): each stage turns blocks of inputs, the later stages blocks of inputs from two
    earlier ones. `boft_s` (out, 1) scales the outputs.
    """

    adapter_layer_names = ("boft_R", "boft_s")
    other_param_names = ()

    def __init__(self, base_layer: Any, block: int, stages: int) -> None:
        """Wrap `base_layer`; zeros and ones, so that nothing changes at first."""
        super().__init__()
        self.base_layer: Any = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = PEFT_NAME
        convolution, weight = isinstance(base_layer, nn.Conv2d), base_layer.weight
        inputs = base_layer.in_channels if convolution else base_layer.in_features
        out = base_layer.out_channels if convolution else base_layer.out_features
        place: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        blocks = torch.zeros(stages, inputs // block, block, block, **place)
        self.boft_R = nn.ParameterDict({PEFT_NAME: nn.Parameter(blocks)})
        self.boft_s = nn.ParameterDict({PEFT_NAME: nn.Parameter(torch.ones(out, 1, **place))})
        for stage in range(1, stages + 1):
            order = _order(inputs, block, stages, stage - 1).to(weight.device)
            self.register_buffer(f"order_{stage}", order, persistent=False)
            self.register_buffer(f"inverse_{stage}", torch.argsort(order), persistent=False)

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Run the base layer on turned inputs and scale what comes out; the bias is left as it is."""
        if self._disable_adapters:
            plain: Tensor = self.base_layer(x, *rest, **named)
            return plain
        channels = 1 if isinstance(self.base_layer, nn.Conv2d) else -1
        turned = self.rotate(x.float().movedim(channels, -1)).movedim(-1, channels).to(x.dtype)
        # Contiguous, so that the base layer takes the kernel that it takes without an adapter.
        result: Tensor = self.base_layer(turned.contiguous(), *rest, **named)
        scale, bias = self.boft_s[PEFT_NAME].flatten() - 1.0, self.base_layer.bias
        product = result if bias is None else result - (bias if channels == -1 else bias.view(-1, 1, 1))
        # Added and not multiplied, so that a scale of 1 changes no bit.
        scaled: Tensor = result + product * (scale if channels == -1 else scale.view(-1, 1, 1))
        return scaled.to(result.dtype)

    def rotate(self, x: Tensor) -> Tensor:
        """Turn vectors (…, in), fp32."""
        blocks = self.boft_R[PEFT_NAME]
        stages, num, block, _ = blocks.shape
        flat = blocks.flatten(0, 1)
        rotations = cayley(0.5 * (flat - flat.transpose(1, 2))).view(stages, num, block, block)
        shape = x.shape
        for stage in reversed(range(stages)):
            order, inverse = getattr(self, f"order_{stage + 1}"), getattr(self, f"inverse_{stage + 1}")
            pieces = x[..., inverse].reshape(*shape[:-1], num, block)
            x = torch.einsum("...nb,nbc->...nc", pieces, rotations[stage]).reshape(shape)[..., order]
        return x


def _order(inputs: int, block: int, stages: int, stage: int) -> Tensor:
    """Return the order of the inputs that peft gives a stage, so that its formula holds for these tensors."""
    num = inputs // block // 2**stage
    order: Tensor = BOFTLayer.block_butterfly_perm(None, inputs, num, block // 2, stages - 1)
    return order
