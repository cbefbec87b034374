"""Gradient checkpointing of a chosen share of the denoiser's blocks.

A checkpointed block keeps its inputs alone and is computed again in the backward pass (Chen et al., arXiv:1604.06174).
diffusers checkpoints all blocks or none; a share fills the card instead. With `offload` even the inputs wait in main
memory. The results are the same to the bit, dropout included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from lorasmith.engine.activation_offload import Offloader

if TYPE_CHECKING:
    from lorasmith.engine.families import Family

Forward = Callable[..., Any]


class CheckpointedForward:
    """Takes the place of a block's `forward`: runs `inner` under a checkpoint while gradients are wanted."""

    def __init__(self, inner: Forward, offloader: Offloader | None = None) -> None:
        functools.update_wrapper(self, inner)
        self.inner = inner
        self.offloader = offloader

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Return what `inner` returns."""
        if not torch.is_grad_enabled():
            return self.inner(*args, **named)
        leaves, structure = pytree.tree_flatten((args, named))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[place] for place in places]
        rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def run(*given: Tensor) -> Any:
            # Everything that takes memory comes in as an argument: what is closed over would be kept.
            filled = list(rest)
            for place, tensor in zip(places, given, strict=True):
                filled[place] = tensor
            again, more = pytree.tree_unflatten(filled, structure)
            return self.inner(*again, **more)

        if self.offloader is None:
            return checkpoint(run, *tensors, use_reentrant=False)
        with self.offloader.keeping(tensors):
            return checkpoint(run, *tensors, use_reentrant=False)


@dataclass(frozen=True)
class CheckpointedBlocks:
    """The denoiser's blocks that are checkpointed, by path, and how many it has."""

    names: tuple[str, ...]
    total: int
    offloader: Offloader | None
    _blocks: tuple[nn.Module, ...]

    def undo(self) -> None:
        """Let all blocks keep their activations again."""
        for block in self._blocks:
            _unwrap(block)


def checkpoint_blocks(family: Family, share: float, offload: bool = False) -> CheckpointedBlocks:
    """Checkpoint the `share` (0 to 1) of the denoiser's blocks that saves most, and no other blocks any more.

    Equal blocks are taken from the first on: a block is computed again when those behind it are done and freed, so the
    last blocks' activations, which then all lie there, are the ones to keep. Blocks whose weights are swapped
    (`engine.block_swap`) are always among them. With `offload` their inputs wait in main memory.
    """
    blocks = denoiser_blocks(family)
    wanted = set(chosen_blocks(family, share))
    offloader = Offloader(family.device) if offload else None
    taken = []
    for name, block in blocks:
        _unwrap(block)
        inner = block.forward
        if name in wanted or getattr(inner, "needs_checkpoint", False):
            block.forward = CheckpointedForward(inner, offloader)
            taken.append((name, block))
    return CheckpointedBlocks(tuple(n for n, _ in taken), len(blocks), offloader, tuple(b for _, b in taken))


def denoiser_blocks(family: Family) -> list[tuple[str, nn.Module]]:
    """Return the path and module of each block of the denoiser, outermost ones alone, in the order of their making."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in family.denoiser.named_modules():
        inside = bool(found) and name.startswith(found[-1][0] + ".")
        if type(module).__name__ in family.spec.block_classes and not inside:
            found.append((name, module))
    return found


def is_checkpointed(block: nn.Module) -> bool:
    """Tell whether a module is a block that is checkpointed."""
    return isinstance(block.__dict__.get("forward"), CheckpointedForward)


def chosen_blocks(family: Family, share: float) -> list[str]:
    """Return the paths of the `share` of the blocks whose activations take most, at least one where it is not 0."""
    blocks = denoiser_blocks(family)
    count = min(len(blocks), max(round(share * len(blocks)), int(share > 0)))
    levels = _levels(family.denoiser)
    # The sort is stable: equal blocks stay in their order.
    ranked = sorted(blocks, key=lambda named: -activation_weight(named[0], named[1], levels))
    return [name for name, _ in ranked[:count]]


def activation_weight(name: str, block: nn.Module, levels: int = 0) -> float:
    """Return a measure of what a block keeps for the backward pass: the features that its layers take and give.

    By the positions of the picture that it works at: a quarter at each lower level of a UNet, of which `levels` are
    there. Text positions are counted as picture positions, since a module does not say which it sees.
    """
    features = sum(_features(module) for module in block.modules())
    return features * 0.25 ** _depth(name, levels)


def _features(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return layer.in_features + layer.out_features
    return layer.in_channels + layer.out_channels if isinstance(layer, nn.Conv2d) else 0


def _levels(denoiser: nn.Module) -> int:
    """Return how many levels a UNet has, by the lists of blocks that diffusers' UNets have; 0 for a transformer."""
    down: Sequence[object] | None = getattr(denoiser, "down_blocks", None)
    return len(down) if down is not None and hasattr(denoiser, "up_blocks") else 0


def _depth(name: str, levels: int) -> int:
    part, _, rest = name.partition(".")
    if not levels or part not in ("down_blocks", "mid_block", "up_blocks"):
        return 0
    if part == "mid_block":
        return levels - 1
    place = int(rest.partition(".")[0])
    return place if part == "down_blocks" else levels - 1 - place


def _unwrap(block: nn.Module) -> None:
    forward = block.__dict__.get("forward")
    if not isinstance(forward, CheckpointedForward):
        return
    del block.forward
    if forward.inner != block.forward:
        block.forward = forward.inner
