"""Frozen layers in 8 and 4 bits: their numbers, their gradients, what moves them, and who reads their weight."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasmith.engine import quantization
from lorasmith.engine.errors import HardwareError
from lorasmith.engine.parking import bring_back, clear
from lorasmith.engine.quantization import bytes_per_weight, codecs, full_weight, num_weights, pack_module, products
from lorasmith.engine.quantization.frozen_linear import FrozenLinear
from tests.engine.test_parking import FakeCard

CPU = torch.device("cpu")
FORMATS = ("fp8", "int8", "nf4")
ERRORS = {"int8": 0.012, "fp8": 0.03, "nf4": 0.1}
"""Root mean square error of a weight of normal numbers against their size: measured 0.0078, 0.0255 and 0.0915."""
PRODUCT_ERRORS = {"int8": 0.016, "fp8": 0.045}
"""The same of a product with inputs in 8 bits too: measured 0.0109 and 0.0366."""


class Net(nn.Module):
    """Two blocks between a first and a last layer."""

    def __init__(self, width: int = 64, checkpointed: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in "ab"
        )
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return self.last(x)


def packed_net(kind: str, checkpointed: bool) -> Net:
    torch.manual_seed(0)
    net = Net(checkpointed=checkpointed).requires_grad_(False)
    pack_module(net, CPU, kind, quantized_matmul=kind != "nf4")
    return net


def normal_layer(outputs: int = 96, inputs: int = 160, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    layer.weight.copy_(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)) * 0.02)
    return layer.to(dtype)


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.float() - right.float()).norm() / right.float().norm())


def through(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and the gradient of the input for a loss that weighs every result differently."""
    x = x.detach().requires_grad_()
    result = layer(x)
    (result * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum().backward()
    assert x.grad is not None
    return result.detach(), x.grad


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_layer_computes_with_its_widened_weight_and_gives_the_gradient_of_its_input_alone(
    kind: str, dtype: torch.dtype
) -> None:
    plain = normal_layer(dtype=dtype)
    packed = FrozenLinear(plain, kind, CPU)
    weight = packed.weight
    assert (weight.dtype, weight.shape) == (dtype, plain.weight.shape)
    assert error(weight, plain.weight) < ERRORS[kind]
    x = torch.randn(2, 20, 160, generator=torch.Generator().manual_seed(2)).to(dtype)
    right = nn.Linear(160, 96).to(dtype).requires_grad_(False)
    right.weight.copy_(weight)
    right.bias.copy_(plain.bias)
    for found, expected in zip(through(packed, x), through(right, x), strict=True):
        assert torch.equal(found, expected)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    assert packed.state_dict().keys() == {"bias"}


def test_nf4_is_what_bitsandbytes_packs_and_its_odd_shapes_too() -> None:
    import bitsandbytes.functional as functional

    for shape in ((96, 160), (5, 7), (3, 64)):
        layer = normal_layer(*shape)
        packed, state = functional.quantize_4bit(layer.weight.data, compress_statistics=True, quant_type="nf4")
        assert torch.equal(FrozenLinear(layer, "nf4", CPU).weight, functional.dequantize_4bit(packed, state))


def test_packing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = normal_layer()
    whole = {kind: FrozenLinear(layer, kind, CPU).weight for kind in FORMATS}
    monkeypatch.setattr(codecs, "_PIECE", 1000)
    monkeypatch.setattr(codecs, "_CPU_PIECE", 1024)
    assert all(torch.equal(FrozenLinear(layer, kind, CPU).weight, whole[kind]) for kind in FORMATS)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_of_zeros_stays_zero_and_large_weights_stay_finite(kind: str) -> None:
    layer = normal_layer(dtype=torch.bfloat16)
    layer.weight[0] = 0.0
    layer.weight[1] *= 1e30
    weight = FrozenLinear(layer, kind, CPU).weight
    assert not weight[0].any() or kind == "nf4"  # whose blocks of 64 go over the ends of rows
    assert bool(weight.isfinite().all())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_8_bits_are_near_and_widen_where_the_shapes_do_not_suit(kind: str, dtype: torch.dtype) -> None:
    plain = normal_layer(dtype=dtype)
    multiplied, widened = FrozenLinear(plain, kind, CPU, quantized_matmul=True), FrozenLinear(plain, kind, CPU)
    x = torch.randn(2, 20, 160, generator=torch.Generator().manual_seed(2)).to(dtype)
    for found, right, other in zip(through(multiplied, x), through(plain, x), through(widened, x), strict=True):
        assert error(found, right) < PRODUCT_ERRORS[kind]
        assert not torch.equal(found, other)
    few, odd = x[:1, :5], normal_layer(97, 160, dtype)
    assert torch.equal(multiplied(few), widened(few))
    assert torch.equal(FrozenLinear(odd, kind, CPU, quantized_matmul=True)(x), FrozenLinear(odd, kind, CPU)(x))


def test_products_of_fp8_are_refused_where_the_device_has_none_and_int8_needs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", missing)
    products.has_products.cache_clear()
    try:
        with pytest.raises(HardwareError, match=r"quantized_matmul cannot be used with fp8.*int8"):
            pack_module(Net(), CPU, "fp8", quantized_matmul=True)
        assert pack_module(Net(), CPU, "fp8") == 4
        assert pack_module(Net(), CPU, "int8", quantized_matmul=True) == 4
    finally:
        products.has_products.cache_clear()


def test_a_broken_bitsandbytes_takes_nf4_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    codecs.bitsandbytes.cache_clear()
    try:
        with pytest.raises(HardwareError, match=r"nf4 needs bitsandbytes.*fp8 or int8"):
            pack_module(Net(), CPU, "nf4")
        assert pack_module(Net(), CPU, "int8") == pack_module(Net(), CPU, "fp8") == 4
    finally:
        codecs.bitsandbytes.cache_clear()


def test_blocks_are_packed_and_what_is_outside_them_or_embeds_the_noise_level_is_not() -> None:
    net = Net()
    weights = num_weights(net)
    assert pack_module(net, CPU, "int8", skip=["blocks.1.2"]) == 3
    packed = {path for path, layer in net.named_modules() if quantization.is_frozen_linear(layer)}
    assert packed == {"blocks.0.0", "blocks.0.2", "blocks.1.0"}
    assert num_weights(net) == weights
    layer = nn.Linear(2, 2, device="meta")
    for path in ("transformer_blocks.0.attn.to_q", "encoder.layers.3.mlp.fc1", "transformer_blocks.7.img_mod.1"):
        assert quantization.is_packed(path, layer)
    for path in ("proj_out", "t_embedder.mlp.0", "down_blocks.0.resnets.0.time_emb_proj", "cap_embedder.1"):
        assert not quantization.is_packed(path, layer)
    assert not quantization.is_packed("transformer_blocks.0.norm", nn.LayerNorm(2))


@pytest.mark.parametrize("kind", FORMATS)
def test_packed_bytes_are_as_told(kind: str) -> None:
    packed = FrozenLinear(normal_layer(256, 512), kind, CPU)
    held = sum(tensor.nbytes for name, tensor in packed.named_buffers() if name != "packed_code")
    assert held == pytest.approx(256 * 512 * bytes_per_weight(kind, 256, 512), abs=16)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_packed_module_moves_copies_parks_and_takes_another_format_without_being_packed_again(kind: str) -> None:
    net = Net().requires_grad_(False)
    pack_module(net, CPU, kind)
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(2))
    right = net(x)
    assert torch.equal(copy.deepcopy(net)(x), right)
    card = FakeCard()
    parked, _ = clear(card, [net])
    assert {id(tensor) for tensor in net.blocks[0][0].packed} <= {id(t) for group in parked.groups for t in group}
    assert torch.equal(net(x), right)  # what was left on the card is ruined by now
    bring_back(parked)
    assert torch.equal(net(x), right)
    before = [tensor.clone() for tensor in net.blocks[0][0].packed]
    net.to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(before, net.blocks[0][0].packed, strict=True))
    assert full_weight(net.blocks[0][0]).dtype == net(x.bfloat16()).dtype == torch.bfloat16
    assert error(net(x.bfloat16()), right) < 0.05
    meta = Net().to("meta")
    pack_module(meta, torch.device("meta"), kind)
    assert meta(x.to("meta")).shape == right.shape


@pytest.mark.parametrize("kind", FORMATS)
def test_checkpointing_gives_the_same_bits(kind: str) -> None:
    x = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(2))
    plain, checkpointed = (through(packed_net(kind, checkpointed), x) for checkpointed in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("kind", ["nf4", *(pytest.param(kind, marks=pytest.mark.campaign) for kind in ("fp8", "int8"))])
def test_a_compiled_net_gives_the_same_bits(kind: str) -> None:
    x = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(2))
    net = packed_net(kind, checkpointed=True)
    right = through(net, x)
    compiled = through(torch.compile(net, backend="aot_eager"), x)
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(right, compiled, strict=True))


def test_nothing_widened_is_kept_for_the_backward_pass() -> None:
    packed = FrozenLinear(normal_layer(dtype=torch.bfloat16), "int8", CPU)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        packed(torch.randn(3, 160, dtype=torch.bfloat16, requires_grad=True))
    own = {tensor.untyped_storage().data_ptr() for tensor in packed.packed}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= own


@pytest.mark.parametrize("kind", ["int8", *(pytest.param(kind, marks=pytest.mark.campaign) for kind in ("fp8", "nf4"))])
def test_loading_takes_little_more_memory_than_what_is_packed_and_one_layer(kind: str, tmp_path: Path) -> None:
    # In a process whose allocator gives back at once what is freed.
    script = Path(__file__).with_name("packing_memory.py")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    answer = subprocess.run(
        [sys.executable, str(script), str(tmp_path), kind], capture_output=True, text=True, env=environment, check=True
    )
    figures = json.loads(answer.stdout)
    beside = 64 * codecs._CPU_PIECE if kind == "nf4" else 8 * codecs._PIECE
    assert figures["growth"] < figures["packed"] + figures["layer"] + beside + 2**20, figures
    assert figures["growth"] > 0.9 * figures["packed"], figures
