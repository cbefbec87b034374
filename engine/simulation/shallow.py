"""A deep model's step from shallow copies of it: equal blocks take equal memory, so that a few tell of all.

A full-size model has up to 60 equal blocks, and one step of it on the meta device takes ten seconds. Of each group of
equal blocks a copy of the model with one and a copy with two of them are simulated; what the second block adds is what
each further one adds. UNets, whose blocks lie inside other ones, are simulated whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorasmith.engine.block_checkpointing import chosen_blocks, denoiser_blocks
from lorasmith.engine.families import Family
from lorasmith.engine.memory.constants import Law
from lorasmith.engine.simulation.step import StepPeak

FEW = 2
"""Groups of no more blocks stay in every copy."""
PIXELS = 1e6
"""Pixels of a megapixel."""
SIDES = (512, 1024)
"""Sides in pixels of the pictures that laws are read from."""


@dataclass(frozen=True)
class Group:
    """Equal blocks of the denoiser that follow each other in its list `holder`; `paths` are theirs in the denoiser."""

    holder: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Counted:
    """What one step was counted to take in copies with one and with two blocks of a group and none of the others."""

    one: StepPeak
    two: StepPeak

    @property
    def block(self) -> float:
        """MiB that each block keeps until the backward pass."""
        return self.two.kept_mib - self.one.kept_mib

    @property
    def rest(self) -> float:
        """MiB that everything but the group's blocks keeps."""
        return self.one.kept_mib - self.block

    @property
    def passing(self) -> float:
        """MiB that the peak takes beyond what is kept, while a block of the group is computed backward."""
        return self.two.peak_mib - self.two.kept_mib


@dataclass(frozen=True)
class GroupSteps:
    """A group's counts without and with checkpointing, and how many of its blocks half of checkpointing takes."""

    count: int
    checkpointed: int
    plain: Counted
    spared: Counted


def block_groups(family: Family) -> list[Group]:
    """Return the groups of more than two equal blocks in lists of the denoiser itself; [] for UNets."""
    groups: list[Group] = []
    for name, path, shapes in _blocks_of_lists(family):
        if (
            groups
            and groups[-1].holder == name
            and shapes == _shapes(family.denoiser.get_submodule(groups[-1].paths[0]))
        ):
            groups[-1] = Group(name, (*groups[-1].paths, path))
        else:
            groups.append(Group(name, (path,)))
    return [group for group in groups if len(group.paths) > FEW]


@contextmanager
def shallow_copy(family: Family, groups: Sequence[Group], kept: Group | None, depth: int = 1) -> Iterator[Family]:
    """Give the family a denoiser of its own with `depth` blocks of the group `kept` and none of the other groups."""
    whole = family.denoiser
    left_out = {path for group in groups for path in group.paths[depth if group is kept else 0 :]}
    holders = {group.holder for group in groups}
    lists: dict[str, Any] = {name: whole.get_submodule(name) for name in holders}
    try:
        for name, blocks in lists.items():
            inside = [block for index, block in enumerate(blocks) if f"{name}.{index}" not in left_out]
            setattr(whole, name, nn.ModuleList(inside))
        family.denoiser = copy.deepcopy(whole)
    finally:
        for name, blocks in lists.items():
            setattr(whole, name, blocks)
    try:
        yield family
    finally:
        family.denoiser = whole


def half_of(family: Family, groups: Sequence[Group]) -> tuple[list[int], float]:
    """Return what half of checkpointing takes: how many blocks of each group, and the share of what else there is.

    Where there are no blocks outside the groups, that is 1 if it takes the very first block, and 0 otherwise: then
    the difference in the rest is what the first block, whose inputs need no gradients, does not keep.
    """
    taken = set(chosen_blocks(family, 0.5))
    counts = [sum(path in taken for path in group.paths) for group in groups]
    inside = {path for group in groups for path in group.paths}
    others = [path for path, _ in denoiser_blocks(family) if path not in inside]
    if not others:
        return counts, float(counts[0] > 0)
    return counts, sum(path in taken for path in others) / len(others)


def whole_peaks(groups: Sequence[GroupSteps], others: float) -> tuple[float, float, float]:
    """Return the MiB at the peak of the whole model's step without, with half and with full checkpointing.

    Groups follow each other forward, so that backward the last one comes first, when everything is still kept; the
    blocks behind the one that is computed have let go of theirs. `others` is the second result of `half_of`.
    """
    none = all_ = half = 0.0
    kept_none, kept_all = groups[0].plain.rest, groups[0].spared.rest
    kept_half = kept_none + others * (kept_all - kept_none)
    for group in groups:
        kept_none += group.count * group.plain.block
        kept_all += group.count * group.spared.block
        none = max(none, kept_none + group.plain.passing)
        all_ = max(all_, kept_all + group.spared.passing)
        kept_half += group.checkpointed * group.spared.block
        half = max(half, kept_half + group.spared.passing if group.checkpointed else 0.0)
        kept_half += (group.count - group.checkpointed) * group.plain.block
        half = max(half, kept_half + group.plain.passing if group.count > group.checkpointed else 0.0)
    return none, half, all_


def whole_kernels(groups: Sequence[GroupSteps]) -> tuple[int, int]:
    """Return the kernels of the whole model's step without and with full checkpointing."""

    def summed(counts: Sequence[tuple[int, Counted]]) -> int:
        rest = 2 * counts[0][1].one.kernels - counts[0][1].two.kernels
        return rest + sum(count * (counted.two.kernels - counted.one.kernels) for count, counted in counts)

    return summed([(g.count, g.plain) for g in groups]), summed([(g.count, g.spared) for g in groups])


def law_of(points: Mapping[tuple[int, int], float]) -> Law:
    """Return the law through what one picture at each of `SIDES` and two at the smaller one take.

    `points` are MiB by pictures and side. Without a count of two pictures nothing is taken for fixed.
    """
    small, large = SIDES
    low, high = small**2 / PIXELS, large**2 / PIXELS
    megapixel = (points[1, large] - points[1, small]) / (high - low)
    each = points[2, small] - points[1, small] if (2, small) in points else points[1, small]
    return Law(points[1, small] - each, each - megapixel * low, megapixel)


def _blocks_of_lists(family: Family) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Yield list name, path and shapes of each block that lies in a list of the denoiser itself."""
    for path, block in denoiser_blocks(family):
        name, _, index = path.rpartition(".")
        if index.isdecimal() and "." not in name:
            yield name, path, _shapes(block)


def _shapes(block: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(weight.shape)) for name, weight in block.named_parameters())
