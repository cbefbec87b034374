"""What was derived of each base model's memory: the `[memory.*]` tables of its preset file. Torch-free.

`make derive-memory` computes them on the meta device, from the model's own graph and without its weights, by counting
the live storages of one real step (`engine.simulation`); nothing in them is fitted to a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from lorasmith.engine.errors import ConfigError

MIB = 1 << 20
GIB = 1 << 30
SAME_MODEL = 0.03
"""Two denoisers whose numbers of weights differ by less are the same architecture for the forecast."""


@dataclass(frozen=True)
class Law:
    """MiB that grow with the pictures: fixed + pictures · (picture + megapixel · megapixels); prompts count too."""

    fixed: float = 0.0
    picture: float = 0.0
    megapixel: float = 0.0

    def mib(self, pictures: int, megapixels: float = 0.0) -> float:
        """Return the MiB for `pictures` (or prompts) at once, each of `megapixels`."""
        return self.fixed + pictures * (self.picture + self.megapixel * megapixels)


@dataclass(frozen=True)
class PartMemory:
    """The weights of one part, in numbers: `packed` lie in linear layers, which quantization packs, `plain` do not.

    `layer` is the largest linear layer. `work` is what running the part once without gradients takes in 16 bits: for a
    text encoder by prompts of its full length, for the autoencoder encoding (`work`) and decoding (`decode`).
    """

    packed: int
    plain: int
    layer: int = 0
    work: Law = field(default_factory=Law)
    decode: Law = field(default_factory=Law)


@dataclass(frozen=True)
class BlockGroup:
    """`count` equal blocks of the denoiser, by class, with the numbers of weights of each."""

    name: str
    count: int
    packed: int
    plain: int


@dataclass(frozen=True)
class StepLaws:
    """The activations of a step at their peak, with rank 16: without, with half and with full checkpointing.

    `rank_none` and `rank_all` are what each further rank adds (or a lower one spares).
    """

    none: Law
    half: Law
    all: Law
    rank_none: Law = field(default_factory=Law)
    rank_all: Law = field(default_factory=Law)


@dataclass(frozen=True)
class StepMemory:
    """One set of adapted layers: the LoRA's numbers per rank, and a step's activations by the LoRA's own format.

    `fp32`: the LoRA computes in fp32 inside a 16-bit base; `base`: it computes in the base's 16 bits.
    """

    per_rank: int
    fp32: StepLaws
    base: StepLaws


@dataclass(frozen=True)
class ModelMemory:
    """Everything that a forecast needs of one size of a family.

    `inputs` is what full checkpointing keeps of the blocks' inputs; `draw` one denoising forward without gradients.
    `tflop` holds a, b, c of one picture's way forward in TFLOP: a + b · megapixels + c · megapixels²; `kernels` are a
    step's kernel launches without and with full checkpointing. `steps` are by target preset, for `adapter.kind` lora.
    """

    family: str
    name: str
    label: str
    hub: str
    denoiser: PartMemory
    blocks: tuple[BlockGroup, ...]
    text: Mapping[str, PartMemory]
    autoencoder: PartMemory
    draw: Law
    inputs: Law
    tflop: tuple[float, float, float]
    kernels: tuple[int, int]
    steps: Mapping[str, StepMemory]

    @property
    def parameters(self) -> int:
        """Numbers of weights in the denoiser."""
        return self.denoiser.packed + self.denoiser.plain

    @property
    def num_blocks(self) -> int:
        """Blocks of the denoiser that can be checkpointed or swapped."""
        return sum(group.count for group in self.blocks)


@cache
def model_memories(family: str) -> tuple[ModelMemory, ...]:
    """Return the derived sizes of a family, smallest denoiser first; () where its preset has none."""
    from lorasmith.engine.advisor import read_preset

    try:
        tables = read_preset(family).get("memory", {})
    except ConfigError:
        return ()
    found = [parse_memory(family, name, table) for name, table in tables.items()]
    return tuple(sorted(found, key=lambda memory: memory.parameters))


def find_memory(family: str, parameters: int) -> ModelMemory | None:
    """Return the derived sizes of the model whose denoiser has `parameters` numbers of weights; None: not derived."""
    memories = model_memories(family)
    nearest = min(memories, key=lambda memory: abs(memory.parameters - parameters), default=None)
    if nearest is None or abs(nearest.parameters / max(1, parameters) - 1) > SAME_MODEL:
        return None
    return nearest


def parse_memory(family: str, name: str, table: Mapping[str, Any]) -> ModelMemory:
    """Return a `[memory.NAME]` table as an object; raises KeyError or TypeError where it is not one."""
    return ModelMemory(
        family=family,
        name=name,
        label=table["label"],
        hub=table.get("hub", ""),
        denoiser=_part(table["denoiser"]),
        blocks=tuple(BlockGroup(**block) for block in table["blocks"]),
        text={part: _part(entry) for part, entry in table.get("text", {}).items()},
        autoencoder=_part(table["autoencoder"]),
        draw=Law(*table["draw"]),
        inputs=Law(*table["inputs"]),
        tflop=tuple(table["tflop"]),
        kernels=tuple(table["kernels"]),
        steps={targets: parse_step(entry) for targets, entry in table["step"].items()},
    )


def parse_step(table: Mapping[str, Any]) -> StepMemory:
    """Return a `[memory.NAME.step.TARGETS]` table as an object."""
    laws = {kind: StepLaws(**{key: Law(*law) for key, law in table[kind].items()}) for kind in ("fp32", "base")}
    return StepMemory(table["per_rank"], laws["fp32"], laws["base"])


def _part(table: Mapping[str, Any]) -> PartMemory:
    laws = {key: Law(*table[key]) for key in ("work", "decode") if key in table}
    return PartMemory(table["packed"], table["plain"], table.get("layer", 0), **laws)
