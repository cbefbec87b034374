"""What can be done so that a run fits: the levers, which values each may take, and a configuration with them set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasmith.engine.advisor import read_preset
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.step_time import CardSpeed

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.memory.forecast import Subject

_FORMATS, _MULTIPLIED = ("none", "int8", "fp8", "nf4"), ("int8", "fp8")
EIGHTHS = tuple(eighth / 8 for eighth in range(9))
_SWAP_LEVELS = 12
_IN_8_BITS: Mapping[str, str] = {
    "adamw": "adamw8bit",
    "paged_adamw": "paged_adamw8bit",
    "lion": "lion8bit",
    "ademamix": "ademamix8bit",
}
_COMPUTES_BF16 = (8, 0)
FIELDS: Mapping[str, str] = {
    "quantize": "memory.quantize",
    "quantize_text": "memory.quantize_text_encoders",
    "matmul": "memory.quantized_matmul",
    "swapped": "memory.swapped_blocks",
    "offload": "memory.offload_activations",
    "lora": "memory.lora_precision",
    "apart": "memory.apart",
    "tiles": "memory.tile_pictures",
    "optimizer": "optimizer.name",
    "batch": "train.batch_size",
    "accumulation": "train.gradient_accumulation",
    "resolution": "dataset.resolution",
}
"""The setting of each lever but `checkpointed`, which is two: `train.gradient_checkpointing` and its share."""


@dataclass(frozen=True)
class Levers:
    """One value of each lever; `checkpointed` is the share of the blocks, 0: gradient checkpointing is off."""

    checkpointed: float
    quantize: str
    quantize_text: str
    matmul: bool
    swapped: int
    offload: bool
    lora: str
    apart: bool
    tiles: bool
    optimizer: str
    batch: int
    accumulation: int
    resolution: int

    def key_values(self) -> dict[str, Any]:
        """Return the levers as settings by dotted key; without checkpointing its share must be whole."""
        values = {key: getattr(self, name) for name, key in FIELDS.items()}
        values["train.gradient_checkpointing"] = self.checkpointed > 0
        values["memory.checkpoint_share"] = self.checkpointed or 1.0
        return values


@dataclass(frozen=True)
class Choices:
    """The values that each lever may take for a run: those that the user fixed have one.

    `checkpointed` and `swapped` rise; `quantize`, `lora` and `optimizer` begin with the best quality; `matmul` is by
    the base's format; `batches` are (pictures at once, batches added up) with the same effect, the largest first;
    `resolutions` fall.
    """

    start: Levers
    checkpointed: tuple[float, ...]
    swapped: tuple[int, ...]
    quantize: tuple[str, ...]
    matmul: Mapping[str, tuple[bool, ...]]
    lora: tuple[str, ...]
    optimizer: tuple[str, ...]
    batches: tuple[tuple[int, int], ...]
    offload: tuple[bool, ...]
    apart: tuple[bool, ...]
    tiles: tuple[bool, ...]
    quantize_text: tuple[str, ...]
    resolutions: tuple[int, ...]


def levers_of(config: RunConfig) -> Levers:
    """Return the levers as a configuration has them."""
    memory, train = config.memory, config.train
    return Levers(
        checkpointed=memory.checkpoint_share if train.gradient_checkpointing else 0.0,
        quantize=memory.quantize,
        quantize_text=memory.quantize_text_encoders,
        matmul=memory.quantized_matmul,
        swapped=memory.swapped_blocks,
        offload=memory.offload_activations,
        lora=memory.lora_precision,
        apart=memory.apart,
        tiles=memory.tile_pictures,
        optimizer=config.optimizer.name,
        batch=train.batch_size,
        accumulation=train.gradient_accumulation,
        resolution=config.dataset.resolution,
    )


def with_levers(subject: Subject, levers: Levers) -> Subject:
    """Return the subject with the levers set; the largest bucket shrinks with the resolution."""
    config = subject.config
    by_section: dict[str, dict[str, Any]] = {}
    for key, value in levers.key_values().items():
        section, _, name = key.partition(".")
        if getattr(getattr(config, section), name) != value:
            by_section.setdefault(section, {})[name] = value
    update = {name: getattr(config, name).model_copy(update=values) for name, values in by_section.items()}
    scale = (levers.resolution / config.dataset.resolution) ** 2
    return replace(subject, config=config.model_copy(update=update), megapixels=subject.megapixels * scale)


def choices(
    subject: Subject,
    card: CardSpeed | None,
    fixed: frozenset[str],
    unusable: frozenset[tuple[str, Any]],
    fast_products: frozenset[str] = frozenset(),
) -> Choices:
    """Return what may be done: nothing to `fixed` keys, and nothing with what is `unusable` on this machine.

    Products in 8 bits are had only in the formats in which they were measured to be fast on this machine.
    """
    start = levers_of(subject.config)
    open_ = _Open(fixed, unusable)
    trained = subject.config.adapter.text_encoder
    texts = _quantizations("quantize_text", start.quantize_text, _FORMATS, open_)
    multiplies = start.matmul and FIELDS["matmul"] in fixed
    return Choices(
        start=start,
        checkpointed=_checkpointed(start, open_),
        swapped=open_.of("swapped", start.swapped, _swap_levels(subject.model.num_blocks)),
        quantize=_quantizations("quantize", start.quantize, _MULTIPLIED if multiplies else _FORMATS, open_),
        matmul=_multiplies(start, open_, fast_products),
        lora=open_.of("lora", start.lora, ("fp32", "base") if _in_bf16(subject.config, card) else ("fp32",)),
        optimizer=_optimizers(start, open_),
        batches=_batches(start, open_),
        offload=open_.of("offload", start.offload, (False, True)),
        apart=open_.of("apart", start.apart, (False, True)),
        tiles=open_.of("tiles", start.tiles, (False, True)),
        quantize_text=(start.quantize_text,) if trained else texts,
        resolutions=() if FIELDS["resolution"] in fixed else _lower_resolutions(subject, start),
    )


@dataclass(frozen=True)
class _Open:
    fixed: frozenset[str]
    unusable: frozenset[tuple[str, Any]]

    def of(self, lever: str, now: Any, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return those `values` of a lever that may be chosen: only what it is now, where the user fixed it."""
        key = FIELDS[lever]
        if key in self.fixed:
            return (now,)
        # A switch or number that is unusable in one "on" position is unusable altogether.
        broken = {value for name, value in self.unusable if name == key}
        kept = tuple(v for v in values if v not in broken and not (v and not isinstance(v, str) and any(broken)))
        return kept or (now,)


def _checkpointed(start: Levers, open_: _Open) -> tuple[float, ...]:
    share_fixed = "memory.checkpoint_share" in open_.fixed
    if "train.gradient_checkpointing" in open_.fixed:
        if start.checkpointed == 0:
            return (0.0,)
        return (start.checkpointed,) if share_fixed else EIGHTHS[1:]
    if share_fixed and start.checkpointed not in (0.0, 1.0):
        return (start.checkpointed,)
    return (0.0, 1.0) if share_fixed else EIGHTHS


def _swap_levels(blocks: int) -> tuple[int, ...]:
    # Not the last ones: with few blocks on the card there is nothing to compute while others come.
    most = max(0, blocks - 2)
    return tuple(sorted({round(most * level / _SWAP_LEVELS) for level in range(_SWAP_LEVELS + 1)}))


def _quantizations(lever: str, now: str, known: tuple[str, ...], open_: _Open) -> tuple[str, ...]:
    formats = open_.of(lever, now, known)
    if "int8" in formats and FIELDS[lever] not in open_.fixed:
        # As large as fp8 and more exact; fp8 is for machines where int8 does not work.
        return tuple(name for name in formats if name != "fp8")
    return formats


def _multiplies(start: Levers, open_: _Open, fast_products: frozenset[str]) -> dict[str, tuple[bool, ...]]:
    """Return for each format of the base whether products in it may be had, the usual first."""
    if FIELDS["matmul"] in open_.fixed:
        return dict.fromkeys(_FORMATS, (start.matmul,))
    found: dict[str, tuple[bool, ...]] = dict.fromkeys(_FORMATS, (False,))
    for name in fast_products:
        found[name] = open_.of("matmul", False, (False, True))
    return found


def _in_bf16(config: RunConfig, card: CardSpeed | None) -> bool:
    """Tell whether the base computes in bf16: a LoRA's own gradients are too small for fp16."""
    if config.train.precision == "auto":
        return card is not None and card.capability >= _COMPUTES_BF16
    return config.train.precision == "bf16"


def _optimizers(start: Levers, open_: _Open) -> tuple[str, ...]:
    smaller = _IN_8_BITS.get(start.optimizer)
    return open_.of("optimizer", start.optimizer, (start.optimizer, smaller) if smaller else (start.optimizer,))


def _batches(start: Levers, open_: _Open) -> tuple[tuple[int, int], ...]:
    now = (start.batch, start.accumulation)
    if open_.fixed & {FIELDS["batch"], FIELDS["accumulation"]}:
        return (now,)
    parts = [part for part in range(start.batch, 0, -1) if start.batch % part == 0]
    return tuple((part, start.batch // part * start.accumulation) for part in parts)


def _lower_resolutions(subject: Subject, start: Levers) -> tuple[int, ...]:
    floor = lowest_resolution(subject)
    return tuple(side for side in range(start.resolution // 128 * 128, floor - 1, -128) if side < start.resolution)


def lowest_resolution(subject: Subject) -> int:
    """Return the side in pixels below which the family's preset warns; without one half of what it was made for."""
    try:
        advice = read_preset(subject.spec.name).get("advice", {})
    except ConfigError:
        advice = {}
    return int(advice.get("resolution_floor", {}).get("value", subject.spec.default_resolution // 2))
