"""Memory savers change no result: the same loss and gradients with each, for every base model family.

Checkpointing, offload and block swap are exact to the bit; an adapter in the base's 16 bits is within a stated
distance of one in fp32. `make test` runs each family with one saver in turn and one with all, `make test-all` all pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.engine.adapters import Adapter, attach_adapter
from lorasmith.engine.block_checkpointing import checkpoint_blocks, denoiser_blocks, is_checkpointed
from lorasmith.engine.block_swap import BlockSwap, frozen_tensors, swap_blocks
from lorasmith.engine.config import AdapterSettings, ObjectiveSettings
from lorasmith.engine.families import Family, Placement, identify_base
from lorasmith.engine.objectives import build_objective
from lorasmith.engine.sources import locate_base
from tests.contracts.cells import ADAPTERS
from tests.engine.running import load_tiny
from tests.tiny import TINY_BUILDERS

CPU = torch.device("cpu")
SAVERS: dict[str, Callable[[Family], object]] = {
    "checkpointing": lambda family: checkpoint_blocks(family, 1.0),
    "half of it": lambda family: checkpoint_blocks(family, 0.5),
    "offload": lambda family: checkpoint_blocks(family, 1.0, offload=True),
    "swap": lambda family: swap_blocks(family, 99),
    "half swap": lambda family: swap_blocks(family, max(1, len(denoiser_blocks(family)) // 2)),
    "deep swap": lambda family: swap_blocks(family, 99, depth=3),
}
PAIRS = [pair for pair in itertools.permutations(SAVERS, 2) if {*pair} != {"swap", "half swap"}]
FAMILIES = sorted(TINY_BUILDERS)
CELLS = [
    pytest.param(family, saver, marks=() if place % len(SAVERS) == number else pytest.mark.campaign)
    for place, family in enumerate(FAMILIES)
    for number, saver in enumerate(SAVERS)
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny base models by family, built when first asked for."""

    class Built(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = TINY_BUILDERS[name](tmp_path_factory.mktemp("savers") / name)
            return self[name]

    return Built()


def adapted(base: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Family, Adapter]:
    """A base model with an adapter that changes something and drops inputs by chance."""
    family = load_tiny(base, dtype)
    settings = {"rank": 2, "alpha": 2.0, "dropout": 0.3, "targets": "attention-mlp"} | settings
    adapter = attach_adapter(family, AdapterSettings(**settings), seed=1)
    for number, module in enumerate(adapter.modules):
        for place, (name, tensor) in enumerate(module.tensors.items()):
            if "magnitude" not in name:
                nn.init.normal_(tensor, std=0.2, generator=torch.Generator().manual_seed(10 * number + place))
    adapter.train()
    return family, adapter


def answer(family: Family, adapter: Adapter, backward: bool = True) -> list[Tensor]:
    """The loss of one batch, and the gradients of the adapter."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn((2, family.spec.latent_channels, 8, 8), generator=generator)
    batch = build_objective(family, ObjectiveSettings(), seed=0).at(latents, 0.4, [5, 6])
    prompts = family.collate(family.encode_prompts(["a red circle", "a blue square"]))
    torch.manual_seed(3)
    objective = build_objective(family, ObjectiveSettings(), seed=0)
    loss = objective.loss(family.predict(batch.noisy.to(family.dtype), batch.timesteps, prompts), batch)
    if not backward:
        return [loss.detach()]
    loss.backward()
    result = [loss.detach()]
    for parameter in adapter.parameters():
        result.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    assert sum(bool(gradient.any()) for gradient in result[1:]) > len(result) // 2
    return result


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


@pytest.mark.parametrize(("name", "saver"), CELLS)
def test_each_saver_gives_the_same_bits(name: str, saver: str, bases: dict[str, Path]) -> None:
    family, adapter = adapted(bases[name])
    expected = answer(family, adapter)
    SAVERS[saver](family)
    for _ in range(2):
        assert equal(answer(family, adapter), expected)


@pytest.mark.campaign
@pytest.mark.parametrize("name", FAMILIES)
def test_each_pair_of_savers_gives_the_same_bits(name: str, bases: dict[str, Path]) -> None:
    for pair in PAIRS:
        family, adapter = adapted(bases[name])
        expected = answer(family, adapter)
        for saver in pair:
            SAVERS[saver](family)
        for _ in range(2):
            assert equal(answer(family, adapter), expected), pair


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", pytest.param("pissa", marks=pytest.mark.campaign)])
def test_all_savers_at_once_suit_every_kind_of_adapter_and_validation_between(
    kind: str, bases: dict[str, Path]
) -> None:
    settings = ADAPTERS[kind] | ({"rank_dropout": 0.3, "dropout": 0.0} if kind == "loha" else {})
    family, adapter = adapted(bases["flux1"], **settings)
    expected = answer(family, adapter)
    adapter.train(False)
    with torch.no_grad():
        validated = answer(family, adapter, backward=False)
    adapter.train()
    swap_blocks(family, 2)
    checkpoint_blocks(family, 0.5, offload=True)
    for _ in range(2):
        assert equal(answer(family, adapter), expected)
        adapter.train(False)
        with torch.no_grad():
            assert equal(answer(family, adapter, backward=False), validated)
        adapter.train()


class TestCheckpointing:
    def test_the_blocks_that_keep_most_come_first_and_of_equal_ones_the_first(self, bases: dict[str, Path]) -> None:
        family = load_tiny(bases["flux1"])
        names = [name for name, _ in denoiser_blocks(family)]
        assert checkpoint_blocks(family, 1 / 3).names == (names[0],)
        assert names[0].startswith("transformer_blocks.")
        assert checkpoint_blocks(family, 1.0).names == tuple(names)
        assert [is_checkpointed(block) for _, block in denoiser_blocks(family)] == [True] * 3
        single = [name for name in names if name.startswith("single")]
        assert checkpoint_blocks(family, 2 / 3).names == (names[0], single[0])

    def test_a_unets_upper_levels_keep_most(self, bases: dict[str, Path]) -> None:
        family = load_tiny(bases["sdxl"])
        first = checkpoint_blocks(family, 0.3).names
        assert first
        assert all(name.startswith(("down_blocks.0", "up_blocks.1")) for name in first if "resnets" in name)

    def test_a_chosen_block_keeps_its_inputs_alone(self, bases: dict[str, Path]) -> None:
        family, adapter = adapted(bases["z_image"])
        kept = []
        for share in (0.0, 0.5, 1.0):
            checkpoint_blocks(family, share)
            kept.append(saved_bytes(lambda: answer(family, adapter)))
        assert kept[0] > 1.3 * kept[1] > 1.6 * kept[2], kept

    def test_undone_it_is_as_before(self, bases: dict[str, Path]) -> None:
        family, adapter = adapted(bases["z_image"])
        plain = saved_bytes(lambda: answer(family, adapter))
        checkpoint_blocks(family, 1.0).undo()
        assert saved_bytes(lambda: answer(family, adapter)) == plain
        assert not any("forward" in vars(block) for _, block in denoiser_blocks(family))

    def test_what_goes_between_blocks_waits_in_main_memory_until_it_is_used(self, bases: dict[str, Path]) -> None:
        family, adapter = adapted(bases["z_image"])
        checkpointed = checkpoint_blocks(family, 1.0, offload=True)
        assert checkpointed.offloader is not None
        held: list[int] = []
        for _, block in denoiser_blocks(family):
            block.register_forward_hook(lambda *_: held.append(checkpointed.offloader.host_bytes))
        answer(family, adapter)
        forward = held[: checkpointed.total]
        assert forward == sorted(forward)
        assert forward[-1] == checkpointed.offloader.most_host_bytes > 0
        assert checkpointed.offloader.host_bytes == 0


def saved_bytes(work: Callable[[], object]) -> int:
    """Bytes of activations that autograd keeps of `work` outside of checkpoints, weights not counted."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.grad_fn is not None or not tensor.is_leaf:
            seen[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(seen.values())
