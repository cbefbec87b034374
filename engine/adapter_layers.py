"""Which layers an adapter takes, and which tensors each of them gets: known from names and shapes alone, torch-free.

Both the adapter that is built and the forecast of its size follow from here.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.engine.adapter_combinations import ROTATIONS, pairs
from lorasmith.engine.errors import ConfigError

if TYPE_CHECKING:
    from lorasmith.engine.config import AdapterSettings
    from lorasmith.engine.families import Component, FamilySpec

Shape = tuple[int, ...]
_PATTERNS = ("include", "exclude", "block_ranks", "block_learning_rates")


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is adapted: rank, alpha, and the factor on its learning rate."""

    rank: int
    alpha: float
    rate: float


def plan_layers(
    shapes: Mapping[str, Shape], spec: FamilySpec, settings: AdapterSettings, component: Component
) -> dict[str, LayerPlan]:
    """Return a plan for each layer to adapt, in the order of `shapes` (weight shapes by dotted path).

    Raises ConfigError where the family has no such target preset.
    """
    suffixes = wanted_suffixes(spec, settings, component)
    plans = {}
    for path, shape in shapes.items():
        if any(path == suffix or path.endswith(f".{suffix}") for suffix in suffixes):
            plan = _plan(f"{component}.{path}", path, shape, settings)
            if plan.rank > 0:
                plans[path] = plan
    return plans


def wanted_suffixes(spec: FamilySpec, settings: AdapterSettings, component: Component) -> tuple[str, ...]:
    """Return what the paths of wanted layers end in; raises ConfigError where the family has no such preset."""
    if component != "denoiser":
        return spec.text_encoder_targets
    if settings.targets not in spec.targets:
        raise ConfigError(
            f"adapter.targets = {settings.targets}: {spec.label} has no such set of layers.",
            fix=f"It has {', '.join(spec.targets)}.",
        )
    convolutions = spec.conv_targets if settings.convolutions or settings.kind == "locon" else ()
    return (*spec.targets[settings.targets], *convolutions)


def without_patterns(settings: AdapterSettings) -> AdapterSettings:
    """Return the same settings for all layers of the targets."""
    return settings.model_copy(update={name: [] for name in _PATTERNS})


def unfound_patterns(
    candidates: Iterable[tuple[Component, str]], spec: FamilySpec, settings: AdapterSettings
) -> list[str]:
    """Return a sentence with its fix for each pattern in the settings that is found in none of the `candidates`.

    Those are all layers (component, path) of the targets.
    """
    names = list(candidates)
    example = f" ({spec.label} names its layers like {names[0][1]})" if names else ""
    return [
        f"adapter.{key}: {pattern} is found in no layer that adapter.targets = {settings.targets} takes{example}; "
        "correct the pattern, take more layers with adapter.targets, or leave it out"
        for key in _PATTERNS
        for pattern in _patterns(settings, key)
        if not any(_found(pattern, f"{component}.{path}", path) for component, path in names)
    ]


def tensor_shapes(shape: Shape, plan: LayerPlan, settings: AdapterSettings) -> dict[str, Shape]:
    """Return the shapes of the trained tensors of a layer with this weight shape, under peft's names, or LyCORIS'."""
    rank, out, inputs, kernel = plan.rank, shape[0], shape[1], shape[2:]
    match settings.kind:
        case "loha":
            sides = {"a": (out, rank), "b": (rank, inputs * math.prod(kernel))}
            return {f"hada_w{half}_{side}": size for half in "12" for side, size in sides.items()}
        case "lokr":
            return _lokr_shapes(shape, rank, settings)
        case "oft" | "boft":
            return {"oft_blocks": rotation_shape(out, settings)}
    tensors = {"lora_A.weight": (rank, inputs, *kernel), "lora_B.weight": (out, rank, *(1 for _ in kernel))}
    if settings.kind == "dora":
        tensors["lora_magnitude_vector.weight"] = (1, out, *(1 for _ in kernel)) if kernel else (out,)
    return tensors


@functools.cache
def _turned_blocks(outputs: int, wanted: int, *, butterfly: bool) -> Shape:
    if butterfly:
        # Pairs of blocks, pairs of pairs, …: the number of blocks is a power of two (LyCORIS' power2factorization).
        sizes = [outputs >> power for power in range(outputs.bit_length()) if outputs % (2 << power) == 0]
        size = next((size for size in sizes if size <= wanted), sizes[-1] if sizes else 0)
        return ((outputs // size).bit_length(), outputs // size, size, size) if size else ()
    near = (min(kronecker_sides(outputs, wanted)), kronecker_sides(outputs, 0)[0], outputs)
    size = next((size for size in near if size > 1), 0)
    return (outputs // size, size, size) if size else ()


def rotation_shape(outputs: int, settings: AdapterSettings) -> Shape:
    """Return the shape of `oft_blocks`: (blocks, b, b) for OFT, (stages, blocks, b, b) for BOFT, () where none fits.

    OFT follows LyCORIS' `factorization`, so that LyCORIS loads the files too: b is `block_size` where it divides the
    outputs into no fewer blocks than that, else the number of these blocks, or a smaller divisor. Blocks of one could
    not turn: then b is near the root of the outputs, or all of them where their number is prime.

    BOFT needs an even b and a power of two of blocks: the largest such b up to `block_size`, else the smallest; an odd
    number of outputs has none. With log2(blocks) + 1 stages every output can reach all.
    """
    return _turned_blocks(outputs, settings.block_size, butterfly=settings.kind == "boft")


def kronecker_sides(size: int, factor: int) -> tuple[int, int]:
    """Split a side of a weight into two factors, the smaller first: `factor` where it divides, else near it.

    As square as possible for factor 0. LyCORIS' rule (`factorization`), which peft has too: every divisor up to
    `factor` is tried while the sum of both factors falls.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    best = (1, size)
    for small in range(2, math.isqrt(size) + 1):
        if size % small == 0 and small <= (factor or size):
            best = (small, size // small)
    return best


def whole_factors(shape: Shape, rank: int, settings: AdapterSettings) -> bool:
    """Tell whether both factors of a LoKr are kept whole: the rank saves nothing, or `lokr_full` asks for it.

    Then LyCORIS and the programs that read its files take no alpha into account.
    """
    sides = [kronecker_sides(size, settings.lokr_factor)[1] for size in shape[:2]]
    return settings.lokr_full or rank >= max(sides) / 2


def _lokr_shapes(shape: Shape, rank: int, settings: AdapterSettings) -> dict[str, Shape]:
    (out_small, out_large), (in_small, in_large) = (kronecker_sides(size, settings.lokr_factor) for size in shape[:2])
    first: dict[str, Shape] = {"lokr_w1": (out_small, in_small)}
    if whole_factors(shape, rank, settings):
        return first | {"lokr_w2": (out_large, in_large, *shape[2:])}
    return first | {"lokr_w2_a": (out_large, rank), "lokr_w2_b": (rank, in_large * math.prod(shape[2:]))}


def _plan(name: str, path: str, shape: Shape, settings: AdapterSettings) -> LayerPlan:
    # A 1x1 convolution is a linear layer in all but name and takes the plain rank, as in kohya's files.
    wide = math.prod(shape[2:]) > 1
    rank, alpha = (settings.conv_rank, settings.conv_alpha) if wide else (settings.rank, settings.alpha)
    left_out = settings.include and not any(_found(pattern, name, path) for pattern in settings.include)
    if left_out or any(_found(pattern, name, path) for pattern in settings.exclude):
        return LayerPlan(0, alpha, 1.0)
    if settings.kind in ROTATIONS and not rotation_shape(shape[0], settings):
        return LayerPlan(0, alpha, 1.0)
    for pattern, value in pairs(settings.block_ranks):
        if _found(pattern, name, path):
            rank, alpha = int(value), alpha * int(value) / rank
            break
    rates = (float(value) for pattern, value in pairs(settings.block_learning_rates) if _found(pattern, name, path))
    return LayerPlan(rank, alpha, next(rates, 1.0))


def has_patterns(settings: AdapterSettings) -> bool:
    """Tell whether the settings take layers, or treat them, by their names."""
    return any(getattr(settings, name) for name in _PATTERNS)


def _patterns(settings: AdapterSettings, key: str) -> list[str]:
    entries: list[str] = getattr(settings, key)
    return [pattern for pattern, _ in pairs(entries)] if key.startswith("block_") else entries


def _found(pattern: str, name: str, path: str) -> bool:
    """Tell whether a pattern is found in a layer's path, or in that with its component before it."""
    return re.search(pattern, path) is not None or re.search(pattern, name) is not None
