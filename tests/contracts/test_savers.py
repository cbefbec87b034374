"""Memory savers change no result: the same loss and gradients with each, for every base model family.

Checkpointing, offload and block swap are exact to the bit; an adapter in the base's 16 bits is within a stated
distance of one in fp32. `make test` runs each family with one saver in turn, one with all, and
`make test-all` all pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.engine import memory_ladder
from lorasmith.engine.adapters import Adapter, attach_adapter
from lorasmith.engine.block_checkpointing import checkpoint_blocks, denoiser_blocks, is_checkpointed
from lorasmith.engine.block_swap import BlockSwap, frozen_tensors, swap_blocks
from lorasmith.engine.commands import Command
from lorasmith.engine.config import AdapterSettings, ObjectiveSettings
from lorasmith.engine.events import MemoryReduced
from lorasmith.engine.families import Family, Placement, identify_base
from lorasmith.engine.learner import Learner
from lorasmith.engine.objectives import build_objective
from lorasmith.engine.sources import locate_base
from tests.contracts.cells import ADAPTERS
from tests.engine.running import RecordingHost, load_tiny, run_training, tiny_config
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
            kept.append(saved_bytes(partial(answer, family, adapter)))
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


class TestSwap:
    def test_at_most_the_rings_blocks_are_on_the_card_and_never_what_is_computed_is_missing(
        self, bases: dict[str, Path]
    ) -> None:
        family, adapter = adapted(bases["lumina2"])
        swap = swap_blocks(family, 99)
        seen: list[tuple[str, list[str]]] = []
        for name, block in denoiser_blocks(family):
            inner = layer_of(block)
            inner.register_forward_pre_hook(lambda *_, name=name: seen.append((name, swap.on_card)))
        answer(family, adapter)
        assert swap.waits == 4, "the order is not known yet"
        first, swap.waits, swap.copies = list(seen), 0, 0
        seen.clear()
        answer(family, adapter)
        assert [name for name, _ in seen] == [name for name, _ in first]
        names = [name for name, _ in seen[:4]]
        assert [name for name, _ in seen[4:]] == names[::-1], "computed again from the last to the first"
        assert all(name in card and len(card) == 2 for name, card in seen)
        following = [*names[1:], names[2], *names[2::-1], None]
        for (name, card), after in zip(seen, following, strict=True):
            assert after is None or after in card, f"{after} was not begun ahead of {name}"
        assert (swap.waits, swap.copies) == (0, 4)

    def test_weights_are_views_of_one_buffer_a_block_and_adapters_stay_on_the_card(
        self, bases: dict[str, Path]
    ) -> None:
        family, adapter = adapted(bases["flux1"], init="pissa")
        before = {
            id(tensor): tensor.clone() for _, block in denoiser_blocks(family) for tensor in frozen_tensors(block)
        }
        swap = swap_blocks(family, 99)
        own = {id(tensor) for tensor in adapter.parameters()}
        own |= {id(tensor) for module in adapter.modules for tensor in (module.start or {}).values()}
        ranges = [(block.host.data_ptr(), block.host.data_ptr() + block.host.nbytes) for block in swap.blocks]
        for block, (low, high) in zip(swap.blocks, ranges, strict=True):
            for tensor in frozen_tensors(block.module):
                assert low <= tensor.data_ptr() < high
                assert torch.equal(tensor, before[id(tensor)])
                assert id(tensor) not in own
        assert swap.host_bytes >= sum(tensor.nbytes for tensor in before.values())
        assert swap.card_bytes == 0
        answer(family, adapter)
        assert swap.card_bytes == 2 * max(block.host.nbytes for block in swap.blocks)
        swap.release()
        assert (swap.card_bytes, swap.on_card) == (0, [])
        for block, (low, high) in zip(swap.blocks, ranges, strict=True):
            assert all(low <= tensor.data_ptr() < high for tensor in frozen_tensors(block.module))

    def test_they_can_be_given_up_brought_back_and_counted_anew(self, bases: dict[str, Path]) -> None:
        family, adapter = adapted(bases["z_image"])
        expected = answer(family, adapter)
        one = swap_blocks(family, 1)
        assert equal(answer(family, adapter), expected)
        more = swap_blocks(family, 3)
        assert not one.blocks
        assert family.swapped is more
        assert equal(answer(family, adapter), expected)
        more.bring_back()
        assert family.swapped is None
        assert equal(answer(family, adapter), expected)
        low = [block.host.data_ptr() for block in more.blocks]
        assert not low

    def test_a_step_that_fails_midway_leaves_nothing_wrong(self, bases: dict[str, Path]) -> None:
        family, adapter = adapted(bases["z_image"])
        expected = answer(family, adapter)
        swap = swap_blocks(family, 99)
        checkpointed = checkpoint_blocks(family, 1.0, offload=True)
        fails: list[bool] = []

        def fail(*_: Any) -> None:
            if fails.pop(0):
                raise MemoryError

        handle = layer_of(denoiser_blocks(family)[2][1]).register_forward_pre_hook(fail)
        for forward_too in (True, False):
            fails[:] = [forward_too, True]
            with pytest.raises(MemoryError):
                answer(family, adapter)
            swap.release()
            checkpointed.offloader.reset()  # type: ignore[union-attr]
            for parameter in adapter.parameters():
                parameter.grad = None
        handle.remove()
        assert equal(answer(family, adapter), expected)
        assert checkpointed.offloader.host_bytes == 0  # type: ignore[union-attr]

    def test_a_part_that_two_blocks_share_stays_on_the_card(self, bases: dict[str, Path]) -> None:
        family, adapter = adapted(bases["z_image"])
        blocks = [block for _, block in denoiser_blocks(family)]
        name, parameter = next((n, p) for n, p in blocks[2].named_parameters() if not p.requires_grad and p.dim() == 1)
        holder, _, leaf = name.rpartition(".")
        setattr(blocks[3].get_submodule(holder), leaf, parameter)
        expected = answer(family, adapter)
        swap = swap_blocks(family, 99)
        assert all(place.tensor is not parameter for block in swap.blocks for place in block.places)
        assert equal(answer(family, adapter), expected)

    @pytest.mark.campaign
    @pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
    def test_compiled_blocks_are_swapped_too(self, bases: dict[str, Path]) -> None:
        family, adapter = adapted(bases["qwen_image"], dropout=0.0)
        expected = answer(family, adapter)
        for _, block in denoiser_blocks(family):
            block.forward = torch.compile(block.forward, backend="aot_eager")  # type: ignore[method-assign]
        swap = swap_blocks(family, 99, depth=1)
        for _ in range(2):
            for one, other in zip(answer(family, adapter), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert swap.copies >= 4


def layer_of(block: nn.Module) -> nn.Module:
    """A module inside a block that runs once each time the block does."""
    return next(module for module in block.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.Linear))


class TestWaiting:
    def test_a_waiting_denoiser_comes_when_the_encoders_are_gone(
        self, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        present: list[tuple[str, bool]] = []
        moved = nn.Module.to

        def to(module: nn.Module, *place: Any, **named: Any) -> nn.Module:
            present.append((type(module).__name__, bool(family and (family[0].text_encoders or family[0]._vae))))
            return moved(module, *place, **named)

        family: list[Any] = []
        files = locate_base(str(bases["flux1"]))
        module, identity = identify_base(files)
        family.append(module.load(files, identity, CPU, torch.float32, Placement(apart=True)))
        monkeypatch.setattr(nn.Module, "to", to)
        family[0].encode_prompts(["a red circle"])
        family[0].encode_images(torch.zeros(1, 3, 64, 64))
        name = type(family[0].denoiser).__name__
        assert name not in dict(present), "it came while the encoders worked"
        family[0].release_encoders()
        assert [gone for moving, gone in present if moving == name] == [False], "it came before they were gone"
        family[0].release_encoders()
        assert [moving for moving, _ in present].count(name) == 1

    @pytest.mark.parametrize("placement", [Placement(apart=True), Placement(swapped_blocks=2)])
    def test_who_uses_it_before_gets_it(
        self, placement: Placement, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = locate_base(str(bases["flux1"]))
        module, identity = identify_base(files)
        family = module.load(files, identity, CPU, torch.float32, placement)
        if placement.swapped_blocks:
            family.release_encoders(keep_text=True)
        moves = count_moves(family.denoiser, monkeypatch)
        adapter = attach_adapter(family, AdapterSettings(rank=2), seed=1)
        expected = answer(family, adapter, backward=False)
        assert moves == [CPU]
        plain = load_tiny(bases["flux1"])
        assert equal(answer(plain, attach_adapter(plain, AdapterSettings(rank=2), seed=1), backward=False), expected)

    def test_swapped_blocks_never_were_on_the_card_at_once(
        self, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = locate_base(str(bases["flux1"]))
        module, identity = identify_base(files)
        family = module.load(files, identity, CPU, torch.float32, Placement(swapped_blocks=2))
        moves = count_moves(family.denoiser, monkeypatch)
        family.release_encoders(keep_text=True)
        swap_blocks(family, 2)
        adapter = attach_adapter(load_tiny(bases["flux1"]), AdapterSettings(rank=2), seed=1)
        answer(family, adapter, backward=False)
        assert not moves


def count_moves(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Where the whole module is moved from now on."""
    moves: list[torch.device] = []
    moved = module.to

    def to(device: torch.device) -> nn.Module:
        moves.append(device)
        return moved(device)

    monkeypatch.setattr(module, "to", to)
    return moves


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd15", "locon"),
        ("flux1", "dora"),
        *(
            pytest.param(*cell, marks=pytest.mark.campaign)
            for cell in itertools.product(FAMILIES, ["lora", "dora", "loha", "lokr"])
        ),
    ],
)
def test_an_adapter_in_the_bases_16_bits_is_as_near_to_the_truth_as_one_in_fp32(
    name: str, kind: str, bases: dict[str, Path]
) -> None:
    answers = []
    for dtype, base in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        family, adapter = adapted(bases[name], dtype, dropout=0.0, **ADAPTERS[kind])
        if base:
            adapter.compute_as_base()
        answers.append(answer(family, adapter))
        assert all(gradient.dtype == torch.float32 for gradient in answers[-1][1:])
    truth, fp32, half = (torch.cat([part.flatten() for part in parts[1:]]) for parts in answers)
    assert (half - truth).norm() <= 1.5 * (fp32 - truth).norm() + 1e-3 * truth.norm()
    assert (half - fp32).norm() <= 0.05 * fp32.norm()
    assert float(abs(answers[2][0] - answers[1][0])) <= 2e-3 * float(answers[1][0])


def test_an_adapter_in_16_bits_keeps_no_fp32_copies_and_drops_as_one_in_fp32(bases: dict[str, Path]) -> None:
    kept = []
    for base in (False, True):
        family, adapter = adapted(bases["flux1"], torch.bfloat16, targets="all-linear")
        if base:
            adapter.compute_as_base()
        kept.append(saved_bytes(partial(answer, family, adapter)))
        once = answer(family, adapter)
        checkpoint_blocks(family, 1.0)
        assert equal(answer(family, adapter), once)
    assert kept[1] < 0.85 * kept[0], kept


def test_a_run_with_every_saver_is_resumed_to_the_bit_and_gives_what_it_gives_without(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    savers = {"swapped_blocks": 2, "checkpoint_share": 0.5, "offload_activations": True, "apart": True}
    sections: dict[str, Any] = {
        "train": {"gradient_checkpointing": True, "gradient_accumulation": 2},
        "adapter": {"dropout": 0.2},
        "previews": {"every": 2, "steps": 1, "prompts": ["[trigger]"]},
        "checkpoints": {"every": 2},
    }
    # Tiles change the latents themselves, so both runs have them.
    _, plain = run_training(tiny_config(bases["flux1"], tmp_path, **sections, memory={"tile_pictures": True}))
    config = tiny_config(bases["flux1"], tmp_path, **sections, memory={**savers, "tile_pictures": True})
    _, whole = run_training(config)
    # A CPU's products round by where a weight begins, and a buffer begins its weights where a file does not.
    assert whole.losses() == pytest.approx(plain.losses(), rel=1e-6)
    stopped, first = run_training(config, RecordingHost(at={2: [Command.STOP]}))
    _, second = run_training(config, run=stopped)
    assert first.losses() + second.losses() == whole.losses()


def test_a_run_out_of_memory_offloads_and_swaps_at_last_and_a_resumed_one_does_so_at_once(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_ladder, "has_own_memory", lambda device: True)
    config = tiny_config(bases["z_image"], tmp_path, train={"batch_size": 1})
    _, plain = run_training(config)
    step = Learner.run_step

    def short(learner: Learner, number: int) -> Any:
        swapped = learner.family.swapped
        if not isinstance(swapped, BlockSwap) or len(swapped.blocks) < 4:
            raise MemoryError
        return step(learner, number)

    monkeypatch.setattr(Learner, "run_step", short)
    stopped, host = run_training(config, RecordingHost(at={2: [Command.STOP]}))
    changes = [event.change for event in host.of(MemoryReduced) if event.phase == "step"]
    assert [change.split()[-1] for change in changes[-3:]] == ["memory"] * 3
    assert "4 of 4 blocks" in changes[-1]
    _, again = run_training(config, run=stopped)
    assert not again.of(MemoryReduced)
    assert host.losses() + again.losses() == plain.losses()
