"""Which adapter settings cannot hold together: a table, each row a condition and one sentence with its fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorasmith.engine.config_adapter import AdapterSettings

    Condition = Callable[[AdapterSettings], bool]

PRODUCTS = ("lora", "locon", "dora", "loha", "lokr")
"""Kinds that add a product of small matrices, times alpha / rank."""
ROTATIONS = ("oft", "boft")
"""Kinds that turn the weights, and so have neither rank nor alpha."""
_PLAIN = ("lora", "locon")
OF_WEIGHTS = ("pissa", "olora", "loftq")
"""Starts that are taken from the base model's weights, and kept beside the trained ones."""


def _odd_ranks(adapter: AdapterSettings) -> bool:
    ranks = [adapter.rank, *(int(rank) for _, rank in pairs(adapter.block_ranks))]
    if adapter.convolutions or adapter.kind == "locon":
        ranks.append(adapter.conv_rank)
    return any(rank % 2 for rank in ranks)


def pairs(entries: list[str]) -> list[tuple[str, str]]:
    """Split entries such as `attn1=8` into pattern and value at the last `=`, since patterns may hold one."""
    return [(pattern, value) for pattern, _, value in (entry.rpartition("=") for entry in entries)]


_TABLE: tuple[tuple[Condition, str], ...] = (
    (
        lambda a: a.init != "default" and a.kind not in (*_PLAIN, "dora"),
        "adapter.init must be default with adapter.kind = {kind}, which has a start of its own",
    ),
    (
        lambda a: a.init in OF_WEIGHTS and a.kind == "dora",
        "adapter.init = {init} does not go with adapter.kind = dora; set adapter.init = default or adapter.kind = lora",
    ),
    (
        lambda a: a.init in OF_WEIGHTS and bool(a.start_from),
        "adapter.start_from and adapter.init = {init} are two different beginnings; set adapter.init = default",
    ),
    (
        lambda a: a.init == "orthogonal" and _odd_ranks(a),
        "adapter.init = orthogonal needs even ranks; change adapter.rank, adapter.conv_rank and adapter.block_ranks, "
        "or set adapter.init = gaussian",
    ),
    (
        lambda a: a.rslora and a.kind in ROTATIONS,
        "adapter.rslora must be false with adapter.kind = {kind}, which has no rank",
    ),
    (
        lambda a: bool(a.block_ranks) and a.kind in ROTATIONS,
        "adapter.block_ranks has no meaning with adapter.kind = {kind}, which has no rank; leave layers out with "
        "adapter.exclude",
    ),
    (
        lambda a: a.dropout > 0 and a.kind not in _PLAIN,
        "adapter.dropout must be 0 with adapter.kind = {kind}; lora and locon have it",
    ),
    (
        lambda a: a.rank_dropout > 0 and (a.kind in ("dora", *ROTATIONS) or a.init in OF_WEIGHTS),
        "adapter.rank_dropout must be 0 with adapter.kind = {kind} and adapter.init = {init}; lora, locon, loha and "
        "lokr with init = default have it",
    ),
    (
        lambda a: a.max_norm > 0 and (a.kind in ("dora", *ROTATIONS) or a.init in OF_WEIGHTS),
        "adapter.max_norm must be 0 with adapter.kind = {kind} and adapter.init = {init}; lora, locon, loha and "
        "lokr with init = default have it",
    ),
)


def adapter_contradictions(adapter: AdapterSettings) -> list[str]:
    """Return one sentence, with its fix, for each pair of adapter settings that cannot both hold."""
    return [words.format(kind=adapter.kind, init=adapter.init) for applies, words in _TABLE if applies(adapter)]
