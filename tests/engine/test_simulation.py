"""Counting a step's memory on the meta device: as much as real tensors take, and what fused kernels keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lorasmith.engine.adapters import attach_adapter
from lorasmith.engine.block_checkpointing import checkpoint_blocks
from lorasmith.engine.config import RunConfig
from lorasmith.engine.families import Family, identify_base
from lorasmith.engine.families._loading import skeletons
from lorasmith.engine.simulation import (
    LiveBytes,
    StepPeak,
    StepShape,
    forward_tflop,
    fused_kernels,
    simulate_forward,
    simulate_step,
)
from lorasmith.engine.sources import BaseFiles
from tests.tiny import TINY_BUILDERS

CPU, META = torch.device("cpu"), torch.device("meta")
SHAPE = StepShape(2, 64, 128, 24)
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], BaseFiles]:
    """Build a family's tiny model once."""
    folder, built = tmp_path_factory.mktemp("bases"), {}

    def files(name: str) -> BaseFiles:
        if name not in built:
            built[name] = BaseFiles("folder", TINY_BUILDERS[name](folder / name), name)
        return built[name]

    return files


@pytest.fixture(params=["cpu", "meta"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def loaded(files: BaseFiles, device: torch.device, dtype: torch.dtype = torch.float32) -> Family:
    module, identity = identify_base(files)
    if device.type == "meta":
        with skeletons():
            return module.load(files, identity, device, dtype)
    return module.load(files, identity, device, dtype)


def config_for(**adapter: Any) -> RunConfig:
    return RunConfig.model_validate({"adapter": {"rank": 8, "alpha": 8.0, **adapter}})


def peaks(
    family: Family, config: RunConfig, shares: tuple[float, ...] = (0.0,), shape: StepShape = SHAPE
) -> list[StepPeak]:
    adapter = attach_adapter(family, config.adapter, 0)
    # As in a run, where only the first step makes tables of positions.
    simulate_step(family, adapter, config, shape, "processor")
    found = []
    for share in shares:
        checkpoint_blocks(family, share)
        found.append(simulate_step(family, adapter, config, shape, "processor"))
    return found


def assert_alike(real: list[StepPeak], counted: list[StepPeak]) -> None:
    assert [peak.peak_mib for peak in counted] == pytest.approx([peak.peak_mib for peak in real], rel=TOLERANCE)
    assert [peak.kept_mib for peak in counted] == pytest.approx([peak.kept_mib for peak in real], rel=TOLERANCE)


class TestLiveBytes:
    def test_counts_new_storages_in_blocks_until_they_are_freed(self, device: torch.device) -> None:
        weight = torch.ones(1000, device=device)
        with LiveBytes(device, [weight]) as tracker:
            first = weight * 2  # 4000 bytes: 8 blocks
            assert tracker.live == 4096
            view = first.view(10, 100)[2:].add_(1)  # in place, in a view
            assert tracker.live == 4096
            del first
            assert tracker.live == 4096  # the view keeps it
            del view
            assert (tracker.live, tracker.peak) == (0, 4096)
            weight.view(2, 500)
            assert tracker.live == 0

    def test_what_the_backward_pass_needs_stays(self, device: torch.device) -> None:
        weight = torch.ones(256, device=device, requires_grad=True)
        with LiveBytes(device, [weight]) as tracker:
            result = (weight * 2).square().sum()  # keeps weight * 2, and the sum
            assert tracker.live == 1024 + 512
            result.backward()
            del result
            assert tracker.live == 1024  # the gradient
            assert weight.grad is not None
            tracker.set_aside(weight.grad)
            assert tracker.live == 0
            weight.grad = None
            assert tracker.live == 0

    def test_counts_kernels_and_no_views(self, device: torch.device) -> None:
        with LiveBytes(device) as tracker:
            (torch.ones(4, 4, device=device).T @ torch.ones(4, 4, device=device)).reshape(16).add_(1)
        assert tracker.kernels == 4

    def test_other_devices_are_not_counted(self) -> None:
        with LiveBytes(META) as tracker:
            torch.ones(1000)
        assert (tracker.peak, tracker.kernels) == (0, 0)

    def test_remembered_results_are_those_of_torch(self) -> None:
        with LiveBytes(META):
            for _ in range(2):
                base = torch.empty(3, 4, 5, device="meta", dtype=torch.bfloat16).transpose(0, 2)
                results = [base + 1, base + 1.5, base.float(), base.clone(), *torch.max(base, dim=1)]
                whole = torch.empty(3, device="meta", dtype=torch.int64)
                results += [whole + 1, whole + 1.0, whole + True, base == 1]
                found = [(r.shape, r.stride(), r.dtype) for r in results]
        with torch.device("meta"):
            base = torch.empty(3, 4, 5, dtype=torch.bfloat16).transpose(0, 2)
            whole = torch.empty(3, dtype=torch.int64)
            plain = [base + 1, base + 1.5, base.float(), base.clone(), *torch.max(base, dim=1)]
            plain += [whole + 1, whole + 1.0, whole + True, base == 1]
        assert found == [(r.shape, r.stride(), r.dtype) for r in plain]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernels", ["card", "processor"])
def test_attention_keeps_no_scores(masked: bool, kernels: Any) -> None:
    tokens, heads, width = 2048, 4, 64
    parts = [
        torch.empty(1, heads, tokens, width, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]
    mask = torch.ones(1, 1, 1, tokens, device="meta", dtype=torch.bool) if masked else None
    with fused_kernels(kernels), LiveBytes(META, parts) as tracker:
        result = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask)
        kept = tracker.live
    output, sums = heads * tokens * width * 2, heads * tokens * 4
    assert output + sums <= kept < output + sums + 20_000  # a row of mask, numbers for dropout
    assert result.shape == parts[0].shape
    again = torch.nn.functional.scaled_dot_product_attention(*[part.detach() for part in parts])
    assert again.shape == result.shape  # torch's own meaning is back


def test_dropout_keeps_a_byte_a_number_on_a_card() -> None:
    value = torch.empty(1 << 16, device="meta", requires_grad=True)
    with fused_kernels(), LiveBytes(META, [value]) as tracker:
        kept = torch.nn.functional.dropout(value, 0.5, training=True)
        assert tracker.live == value.numel() * (4 + 1)
    del kept


SAMPLE = ("flux1", "lumina2", "sd15", "z_image")
"""Families in every test run: a UNet, double blocks, masks that count tokens, rows of their own length."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SAMPLE else [pytest.mark.campaign]) for name in sorted(TINY_BUILDERS)],
)
def test_a_step_takes_what_real_tensors_take(name: str, tiny: Callable[[str], BaseFiles]) -> None:
    assert_alike(*(peaks(loaded(tiny(name), device), config_for(), (0.0, 1.0)) for device in (CPU, META)))


@pytest.mark.parametrize(
    "kind",
    [
        "dora",
        *(pytest.param(kind, marks=pytest.mark.campaign) for kind in ("locon", "loha", "lokr", "oft", "boft")),
    ],
)
def test_every_kind_of_adapter_takes_what_real_tensors_take(kind: str, tiny: Callable[[str], BaseFiles]) -> None:
    # Larger, since LoKr's Kronecker product has another temporary tensor of some KiB on the processor.
    shape, config = StepShape(2, 128, 192, 24), config_for(kind=kind)
    assert_alike(*(peaks(loaded(tiny("qwen_image"), device), config, (0.5,), shape) for device in (CPU, META)))


def test_a_16_bit_base_takes_what_real_tensors_take(tiny: Callable[[str], BaseFiles]) -> None:
    config = config_for(targets="attention-mlp")
    assert_alike(*(peaks(loaded(tiny("flux1"), device, torch.bfloat16), config) for device in (CPU, META)))


def test_a_mid_size_model_takes_what_real_tensors_take(tiny: Callable[[str], BaseFiles]) -> None:
    both = (_mid_size(tiny("sd15"), device) for device in (CPU, META))
    real, counted = (peaks(family, config_for(), (0.0, 1.0), MID_SHAPE) for family in both)
    assert real[0].peak_mib > 15
    assert_alike(real, counted)


MID_SHAPE = StepShape(1, 128, 128)


def _mid_size(files: BaseFiles, device: torch.device) -> Family:
    """Stable Diffusion 1.5 with a fifth of its channels and its four levels."""
    from diffusers import UNet2DConditionModel

    family = loaded(files, CPU)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(64, 128, 256, 256), cross_attention_dim=192, attention_head_dim=8
        )
    family.denoiser, family.device = unet.requires_grad_(False).eval(), device
    family.text_encoders.clear()
    return family


def test_memory_is_a_line_in_pixels_and_in_pictures(tiny: Callable[[str], BaseFiles]) -> None:
    config = config_for()
    for share in (0.0, 1.0):
        family = loaded(tiny("flux1"), META, torch.bfloat16)
        adapter = attach_adapter(family, config.adapter, 0)
        checkpoint_blocks(family, share)
        found = [
            simulate_step(family, adapter, config, StepShape(pictures, side, side)).peak_mib
            for pictures, side in ((1, 256), (1, 512), (1, 384), (2, 384), (3, 384))
        ]
        slope = (found[1] - found[0]) / (512**2 - 256**2)
        assert found[2] == pytest.approx(found[0] + slope * (384**2 - 256**2), rel=0.01)
        # Positions and the like are fixed: not in proportion to the pictures, but a line in them too.
        assert found[4] == pytest.approx(2 * found[3] - found[2], rel=0.01)


def test_gradients_and_earlier_ones_are_left_out(tiny: Callable[[str], BaseFiles]) -> None:
    family, config = loaded(tiny("sd15"), META), config_for()
    adapter = attach_adapter(family, config.adapter, 0)
    first = simulate_step(family, adapter, config, SHAPE)
    former = [torch.zeros_like(parameter) for parameter in adapter.parameters()]
    for parameter, gradient in zip(adapter.parameters(), former, strict=True):
        parameter.grad = gradient
    assert simulate_step(family, adapter, config, SHAPE) == first
    assert all(parameter.grad is gradient for parameter, gradient in zip(adapter.parameters(), former, strict=True))


def test_networks_without_gradients_take_what_real_tensors_take(tiny: Callable[[str], BaseFiles]) -> None:
    def pieces(device: torch.device) -> Iterator[float]:
        family: Any = loaded(tiny("sdxl"), CPU)
        vae = family._prepared_vae().to(device)
        family.device = device
        sizes = (2, 3, 64, 96), (1, family.spec.latent_channels, 8, 12)
        pixels, latents = (torch.zeros(size, device=device) for size in sizes)
        for call in (lambda: family.latents_of(vae, pixels), lambda: family.pixels_of(vae, latents)):
            yield simulate_forward(call, device, [vae], "processor")
        encoder = family.text_encoders["text_encoder"].to(device)
        tokens = torch.ones((2, 20), dtype=torch.int64, device=device)
        yield simulate_forward(lambda: encoder(tokens), device, [encoder], "processor")

    for real, counted in zip(pieces(CPU), pieces(META), strict=True):
        assert counted == pytest.approx(real, rel=TOLERANCE)


def test_operations_on_the_way_forward_are_counted(tiny: Callable[[str], BaseFiles]) -> None:
    family, config = loaded(tiny("sd15"), META), config_for()
    attach_adapter(family, config.adapter, 0)
    one, two = (forward_tflop(family, config, StepShape(pictures, 64, 64)) for pictures in (1, 2))
    assert one > 0
    assert two == pytest.approx(2 * one, rel=0.01)
