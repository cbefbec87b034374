"""Rotations of what a layer gives: the layer of OFT and BOFT, as LyCORIS, ComfyUI and A1111 mean their tensors.

The frozen layer computes its outputs, and blocks of these are turned, which is the same as turning the rows of its
weight: so quantized layers and convolutions of every size work, and the bias is left as it is. OFT: Qiu et al.,
arXiv:2306.07280; BOFT: Liu et al., arXiv:2311.06243. The conventions are those of lycoris/modules/diag_oft.py and
boft.py, which comfy/weight_adapter/oft.py and boft.py share. peft's layers of these names turn inputs instead.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorasmith.engine.adapters.module import PEFT_NAME


def turn_less_identity(blocks: Tensor) -> Tensor:
    """Return R - I for R = (I + Q)(I - Q)⁻¹ with Q = B - Bᵀ, for each B of `blocks` (…, b, b).

    It is 2 Q (I - Q)⁻¹, which is exactly 0 where B is and keeps small rotations whole. I - Q can always be inverted;
    never waits for the device.
    """
    skew = blocks - blocks.transpose(-1, -2)
    eye = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype)
    change: Tensor = torch.linalg.solve_ex(eye - skew, 2.0 * skew, left=False).result
    return change


class RotatedLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft has no types
    """A linear or convolution layer whose outputs, less the bias, are turned.

    `oft_blocks` is (blocks, b, b) for OFT, which turns blocks of outputs that lie side by side; (stages, blocks, b, b)
    for BOFT, whose later stages turn outputs that lie ever farther apart. See `adapter_layers.rotation_shape`.
    """

    adapter_layer_names = ("oft_blocks",)
    other_param_names = ()

    def __init__(self, base_layer: Any, shape: tuple[int, ...]) -> None:
        """Wrap `base_layer` with blocks of zeros, which turn nothing."""
        super().__init__()
        self.base_layer: Any = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = PEFT_NAME
        blocks = torch.zeros(shape, device=base_layer.weight.device, dtype=torch.float32)
        self.oft_blocks = nn.ParameterDict({PEFT_NAME: nn.Parameter(blocks)})

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Run the base layer and turn what it gives, computed in fp32."""
        plain: Tensor = self.base_layer(x, *rest, **named)
        if self._disable_adapters:
            return plain
        axis = 1 if isinstance(self.base_layer, nn.Conv2d) else -1
        outputs = plain.float().movedim(axis, -1)
        bias = self.base_layer.bias
        change = self.change(outputs if bias is None else outputs - bias.float())
        # Added, so that a change of 0 leaves every bit.
        return (plain + change.movedim(-1, axis)).to(plain.dtype)

    def change(self, outputs: Tensor) -> Tensor:
        """Return what turning vectors (…, out), fp32, adds to them."""
        blocks = self.oft_blocks[PEFT_NAME]
        turns = turn_less_identity(blocks)
        if blocks.dim() == 3:
            # R times a column in BOFT, but Rᵀ in OFT: the readers' own formulas differ so.
            return _turned(turns.transpose(1, 2), outputs)
        change = torch.zeros_like(outputs)
        for stage, turn in enumerate(turns):
            stride = 2**stage * (turn.shape[-1] // 2)
            added = _turned(turn, _regrouped(outputs + change, 2, stride))
            change = change + _regrouped(added, stride, 2)
        return change


def _regrouped(vectors: Tensor, rows: int, columns: int) -> Tensor:
    """Lay runs of rows · columns numbers of `vectors` (…, out) the other way, column by column."""
    grid = vectors.reshape(*vectors.shape[:-1], -1, rows, columns)
    return grid.transpose(-1, -2).reshape(vectors.shape)


def _turned(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Multiply each block of `vectors` (…, blocks · b) by its matrix of `matrices` (blocks, b, b)."""
    pieces = vectors.reshape(*vectors.shape[:-1], *matrices.shape[:2])
    return torch.einsum("nij,...nj->...ni", matrices, pieces).flatten(-2)
