"""How long a step takes on a card, from its data sheet or from what was measured on it. Torch-free.

A step takes as long as the slowest of three: the card's arithmetic, the processor that launches the card's kernels one
by one, and the copying of weights that do not fit. Nothing here is fitted to a model; the few constants say where they
come from, and `benchmarks/step_time_published.py` compares with what others measured.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.memory.constants import MIB
from lorasmith.engine.quantization import bytes_per_weight
from lorasmith.engine.storage import OPTIMIZER_BYTES

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.memory.constants import ModelMemory
    from lorasmith.engine.memory.forecast import Subject

_LANE_GB = {3: 0.985, 4: 1.969, 5: 3.938}
"""GB/s of one PCI Express lane by generation, one way (PCI-SIG)."""
_BACKWARD_ATTENTION = 2.5
"""Attention's way back over its way there, in operations (Dao, arXiv:2307.08691, section 4.1)."""
_FEWER_KERNELS = 0.98
"""Kernels of a step whose LoRA computes in the base's format, over those with an fp32 LoRA: 0.97 to 1.00, counted with
`engine.simulation` on four families; the LoRA's weights are converted instead of what goes in and comes out."""
_PRESERVING = 2.5
"""What `objective.preserve` multiplies a step by: see its description."""
_OPTIMIZER_SECONDS = 0.01
"""A fused optimizer's step over a LoRA of 1,120 tensors takes 9.6 ms on one core (measured)."""
_UNPACKING: Mapping[str, tuple[float, int]] = {"fp8": (7.0, 2), "int8": (7.0, 2), "nf4": (2.6, 2)}
"""Bytes that move for each weight that is widened to 16 bits, and kernels for each layer. fp8 and int8: read 1 and
write 2, then scale: read 2 and write 2; nf4 is scaled in the same kernel."""
_MULTIPLYING_KERNELS = 8
"""Kernels that `quantized_matmul` adds to each layer: the input's largest values, scaling and rounding, the result's
scales (`engine.quantization.products`)."""
_MULTIPLYING_BYTES = 32.0
"""Bytes that these move for each number of the input and result, eagerly and partly in fp32."""
_SWAP_LAUNCHES = 10
"""Copies, events and hooks of a swapped block in one pass, in kernels' time: a judgement."""
_STAND_IN = "GeForce RTX 3060"
_UNKNOWN_RANGE, _LIKE_RANGE, _CALIBRATED_RANGE = 3.0, 1.5, 1.15


@dataclass(frozen=True)
class _Habits:
    """What share of the data sheet is reached, and how long the processor needs for a kernel."""

    peak: float
    launch_us: float
    copy: float


_BEST = _Habits(peak=0.8, launch_us=16.5, copy=0.9)
"""A well-tuned program: 80 % of the peak, and an eager SDXL step's 191 ms of processor time over 11,537 kernels."""
_USUAL = _Habits(peak=0.5, launch_us=49.0, copy=0.8)
"""Half the peak (Hugging Face's QLoRA post: 0.88 s on an RTX 4090 whose floor is 0.43 s), and the geometric mean of the
seconds over kernels of seven published steps (SimpleTuner's table, 28 to 69 us)."""
_WORST = _Habits(peak=0.25, launch_us=70.0, copy=0.4)
"""A hot, small card (a Tesla T4 reaches 21 % in that post), a slow processor, memory that cannot be pinned."""


@dataclass(frozen=True)
class CardSpeed:
    """A card's data sheet: see `presets/cards.toml`. `exact` is False where it is another card of the same kind."""

    name: str
    tflops: float
    fp32: float
    int8: float
    fp8: float
    bandwidth_gb: float
    vram_gb: float
    pcie_gb: float
    watts: float
    capability: tuple[int, int]
    exact: bool = True


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, the range in which it is likely to be, and what that rests on, in words."""

    seconds: float
    low: float
    high: float
    basis: str

    def times(self, steps: int) -> StepTime:
        """Return the time of so many steps."""
        return replace(self, seconds=self.seconds * steps, low=self.low * steps, high=self.high * steps)


def card_speed(name: str, compute_capability: tuple[int, int] | None = None) -> CardSpeed | None:
    """Return the data sheet of the card that NVML calls `name`; of an unknown card that of the middle one of its kind.

    None where not even the compute capability is known, and for a slice of a card (MIG), whose share is not known.
    """
    if "MIG " in name.upper():
        return None
    found = _cards().get(_plain(name))
    if found is not None or compute_capability is None:
        return found
    cards = _cards().values()
    kin = [card for card in cards if card.capability == compute_capability]
    kin = kin or [card for card in cards if card.capability[0] == compute_capability[0]]
    if not kin:
        return None
    middle = sorted(kin, key=lambda card: card.tflops)[len(kin) // 2]
    return replace(middle, exact=False)


def step_seconds(subject: Subject, card: CardSpeed | None, calibration: float = 1.0) -> StepTime:
    """Return the time of one optimizer step; `calibration` is measured over estimated seconds on this card, 1: unknown.

    An estimate that is not calibrated can be wrong by a factor of two or three, and says so in its range.
    """
    known = card or _cards()[_plain(_STAND_IN)]
    usual = _step(subject, known, _USUAL)
    if calibration != 1.0:
        measured = usual * calibration
        return StepTime(measured, measured / _CALIBRATED_RANGE, measured * _CALIBRATED_RANGE, "measured on this card")
    wider = _UNKNOWN_RANGE if card is None else 1.0 if card.exact else _LIKE_RANGE
    low, high = _step(subject, known, _BEST) / wider, _step(subject, known, _WORST) * wider
    return StepTime(usual, low, high, _basis(card))


def _basis(card: CardSpeed | None) -> str:
    if card is None:
        return "a guess: this card is not known, so the speed of an RTX 3060 is taken"
    if not card.exact:
        return f"an estimate from the data sheet of the {card.name}, a card of the same kind"
    return f"an estimate from the data sheet of the {card.name}; the first steps tell the real time"


@dataclass(frozen=True)
class StepParts:
    """A step's time as a function of how many blocks are checkpointed and swapped, all else being set.

    Seconds: of the card and of the processor without checkpointing and for checkpointing all blocks; of the processor
    for a swapped block, of copying it, and of copying all inputs; all this `often` a step, and `after` once.
    """

    blocks: int
    card: float
    card_again: float
    launch: float
    launch_again: float
    launch_swap: float
    copy_block: float
    copy_inputs: float
    often: float
    after: float

    def seconds(self, checkpointed: float, swapped: int) -> float:
        """Return the seconds of a step with this share of the blocks checkpointed and so many swapped."""
        share = max(checkpointed, min(1.0, swapped / max(1, self.blocks)))
        computing = self.card + self.card_again * share
        launching = self.launch + self.launch_again * share + 2 * self.launch_swap * swapped
        # Twice: for the way there and for the way back, which computes a checkpointed block again at once.
        copying = 2 * self.copy_block * swapped + self.copy_inputs * share
        # The first block is waited for: nothing computes while it comes.
        waiting = self.copy_block if swapped else 0.0
        return (max(computing, launching, copying) + waiting) * self.often + self.after


def usual_parts(subject: Subject, card: CardSpeed | None) -> StepParts:
    """Return what `step_seconds(…).seconds` consists of before calibration: what plans are compared by."""
    return _parts(subject, card if card is not None else _cards()[_plain(_STAND_IN)], _USUAL)


def _step(subject: Subject, card: CardSpeed, habits: _Habits) -> float:
    config = subject.config
    checkpointed = config.memory.checkpoint_share if config.train.gradient_checkpointing else 0.0
    return _parts(subject, card, habits).seconds(checkpointed, config.memory.swapped_blocks)


def _parts(subject: Subject, card: CardSpeed, habits: _Habits) -> StepParts:
    config, model = subject.config, subject.model
    pcie = card.pcie_gb * habits.copy * 1e9
    computing, computing_again = _arithmetic(subject, card, habits)
    widening = _widening(config, model, card)
    launches, launches_again = _kernels(config, model, card)
    inputs = 0.0
    if config.memory.offload_activations:
        inputs = model.inputs.mib(config.train.batch_size, subject.megapixels) * MIB
    preserving = _PRESERVING if config.objective.preserve != "off" else 1.0
    return StepParts(
        blocks=model.num_blocks,
        card=computing + 2 * widening,
        card_again=computing_again + widening,
        launch=launches * habits.launch_us * 1e-6,
        launch_again=launches_again * habits.launch_us * 1e-6,
        launch_swap=_SWAP_LAUNCHES * habits.launch_us * 1e-6,
        copy_block=_block_bytes(config, model) / pcie,
        copy_inputs=inputs / pcie,
        often=config.train.gradient_accumulation * preserving,
        after=_optimizer(subject, card, pcie),
    )


def _block_bytes(config: RunConfig, model: ModelMemory) -> float:
    """Return the bytes of a block of the middling size, in the format that it is kept in."""
    wide = 4 if config.train.precision == "fp32" else 2
    each = wide if config.memory.quantize == "none" else bytes_per_weight(config.memory.quantize)
    packed = sum(group.count * group.packed for group in model.blocks)
    plain = sum(group.count * group.plain for group in model.blocks)
    return (packed * each + plain * wide) / max(1, model.num_blocks)


def _arithmetic(subject: Subject, card: CardSpeed, habits: _Habits) -> tuple[float, float]:
    """Return the seconds of the way there and back, in which no frozen weight has a gradient, and of the way again."""
    config = subject.config
    fixed, linear, square = subject.model.tflop
    pictures, megapixels = config.train.batch_size, subject.megapixels
    products = pictures * (fixed + linear * megapixels)
    attention = pictures * square * megapixels**2
    peak = card.fp32 if config.train.precision == "fp32" else card.tflops
    wide, moved = products / (peak * habits.peak), 0.0
    narrow = _narrow_peak(config, card)
    if narrow > peak:
        # The layers' width, as that of a square layer with half as many numbers as the largest one, each way.
        width = math.sqrt(max(1, subject.model.denoiser.layer)) / 2
        moved = _MULTIPLYING_BYTES * products * 1e12 / (2 * width) / (card.bandwidth_gb * 1e9)
        wide = products / (narrow * habits.peak)
    attending = attention / (peak * habits.peak)
    return 2 * (wide + moved) + (1 + _BACKWARD_ATTENTION) * attending, wide + moved + attending


def _narrow_peak(config: RunConfig, card: CardSpeed) -> float:
    """Return the card's peak where `quantized_matmul` multiplies in 8 bits; 0 where it does not."""
    if not config.memory.quantized_matmul:
        return 0.0
    return {"int8": card.int8, "fp8": card.fp8}.get(config.memory.quantize, 0.0)


def _widening(config: RunConfig, model: ModelMemory, card: CardSpeed) -> float:
    """Return the seconds in which the packed weights are widened to 16 bits once."""
    if config.memory.quantize == "none" or _narrow_peak(config, card):
        return 0.0
    moved, _ = _UNPACKING[config.memory.quantize]
    return moved * model.denoiser.packed / (card.bandwidth_gb * 1e9)


def _kernels(config: RunConfig, model: ModelMemory, card: CardSpeed) -> tuple[float, float]:
    """Return the kernels of a step without checkpointing, and those that full checkpointing adds."""
    none, whole = model.kernels
    again = float(whole - none)
    fewer = _FEWER_KERNELS if config.memory.lora_precision == "base" and config.train.precision != "fp32" else 1.0
    if config.memory.quantize == "none":
        return none * fewer, again * fewer
    # Linear layers are about half as large as the largest one.
    layers = 2 * model.denoiser.packed / max(1, model.denoiser.layer)
    each = _MULTIPLYING_KERNELS if _narrow_peak(config, card) else _UNPACKING[config.memory.quantize][1]
    return none * fewer + 2 * layers * each, again * fewer + layers * each


def _optimizer(subject: Subject, card: CardSpeed, pcie: float) -> float:
    config = subject.config
    name = config.optimizer.name
    step = subject.step or subject.model.steps.get(config.adapter.targets)
    per_rank = step.per_rank if step is not None else 0
    numbers = subject.num_parameters if subject.num_parameters is not None else per_rank * config.adapter.rank
    state = numbers * OPTIMIZER_BYTES[name]
    # Weights and gradients are read, weights and state written back.
    moved = (numbers * 12 + 2 * state) / (card.bandwidth_gb * 1e9)
    paged = 2 * state / pcie if name.startswith("paged") else 0.0
    return _OPTIMIZER_SECONDS + moved + paged


def _plain(name: str) -> str:
    return " ".join(name.removeprefix("NVIDIA ").split()).casefold()


@cache
def _cards() -> dict[str, CardSpeed]:
    """Return the data sheets of `presets/cards.toml` by every name of a card, without "NVIDIA " and in lower case."""
    import lorasmith.presets

    path = Path(next(iter(lorasmith.presets.__path__))) / "cards.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    rows = [row for series in table["series"] for row in series["cards"]]
    return {_plain(name): _card(name, row) for row in rows for name in row["names"]}


def _card(name: str, row: Mapping[str, Any]) -> CardSpeed:
    generation, lanes = row["pcie"]
    return CardSpeed(
        name=name,
        tflops=row["tflops"],
        fp32=row["fp32"],
        int8=row["int8"],
        fp8=row["fp8"],
        bandwidth_gb=row["bandwidth"],
        vram_gb=row["vram"],
        pcie_gb=_LANE_GB[generation] * lanes,
        watts=row["watts"],
        capability=(row["capability"][0], row["capability"][1]),
    )
