"""What lies on the card in each stage of a run, part by part, in GiB. Torch-free; see `forecast`.

It follows the engine: the base is loaded, the adapter attached, pictures and then prompts are encoded, the encoders
released, and then come steps, previews and saves.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from lorasmith.engine.adapter_combinations import pairs
from lorasmith.engine.combinations import SCHEDULE_FREE
from lorasmith.engine.dataset.cache_size import PREVIEWS_AT_ONCE, max_prompts, pictures_at_once, prompts_at_once
from lorasmith.engine.memory.constants import GIB, MIB, BlockGroup, PartMemory
from lorasmith.engine.quantization import bytes_per_weight
from lorasmith.engine.storage import OPTIMIZER_BYTES

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.families import Quantization
    from lorasmith.engine.memory.constants import StepLaws
    from lorasmith.engine.memory.forecast import Subject

Named = list[tuple[str, float]]
"""Parts by name, in GiB."""
Where = Literal["card", "host"]

CONTEXT_GIB = 0.5
"""The CUDA context with its libraries' workspaces (`performance.md` of the design)."""
LAWS_RANK = 16
"""The rank that the derived activations are for."""
RING = 2
"""Swapped blocks that have room on the card at a time (`block_swap.swap_blocks`)."""
_KEPT_INPUTS = 2
"""Blocks whose inputs are on the card with `offload_activations` (`activation_offload.AHEAD`)."""
_WHOLE_IN_8_BIT = 4096
"""8-bit optimizers keep the state of weights with fewer numbers in 32 bits."""
_SMALLEST_SIDE = 320
"""Narrowest side of a layer that anyone adapts: the outermost level of Stable Diffusion's UNets."""
_UPDATE_BYTES = 8
"""What an optimizer computes beside its state for each number: an Adam's denominator and update."""
_LAYER_NUMBERS = 48
"""Bytes of activations for each token and number of width in one layer of a trained text encoder: 34 by Korthikanti et
al. (arXiv:2205.05198, equation 2), and the layer's input in fp32 for each of four or so adapted layers."""


def number_bytes(config: RunConfig) -> int:
    """Return the bytes of one number that the base computes with; `auto` is taken as 16 bits on a card."""
    return 4 if config.train.precision == "fp32" or config.train.device == "cpu" else 2


class CardParts:
    """The sizes of one run's parts in GiB, each computed once, and what each stage has of them."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.config, self.model = subject, subject.config, subject.model
        config, memory = self.config, self.config.memory
        self.wide = number_bytes(config)
        self.waits = memory.apart or memory.swapped_blocks > 0
        self.keeps_text = keeps_text(subject, self.wide)
        self.numbers = adapter_numbers(subject)
        self.adapter = self.numbers * 4 / GIB
        self.optimizer = self.numbers * optimizer_bytes(config) / GIB
        self.average = self.adapter if config.train.ema_decay and config.optimizer.name not in SCHEDULE_FREE else 0.0
        whole = part_bytes(self.model.denoiser, memory.quantize, self.wide)
        self.swapped, ring = swapped_bytes(self.model.blocks, memory.swapped_blocks, memory.quantize, self.wide)
        self.denoiser, self.weights = whole / GIB, (whole - self.swapped + ring) / GIB
        self.dequantizing = self._widened(self.model.denoiser, memory.quantize)
        texts = self.model.text.values()
        self.texts = [part_bytes(part, memory.quantize_text_encoders, self.wide) / GIB for part in texts]
        # In fp16 the autoencoder's activations overflow: `LoadedModel.choose_vae_dtype`.
        vae_wide = 4 if config.train.precision == "fp16" else self.wide
        self.vae_scale = vae_wide / 2
        self.autoencoder = part_bytes(self.model.autoencoder, "none", vae_wide) / GIB

    def load(self) -> Named:
        """Return what loading takes: with parts that wait in main memory only the layer that is being packed."""
        memory = self.config.memory
        packing = 2 * max(
            self.dequantizing,
            *(self._widened(part, memory.quantize_text_encoders) for part in self.model.text.values()),
            0.0,
        )
        encoders = 0.0 if memory.apart else sum(self.texts)
        autoencoder = 0.0 if memory.apart else self.autoencoder
        return [*self._base(), ("encoders", encoders), ("autoencoder", autoencoder), ("packing", packing)]

    def encode_text(self) -> Named:
        """Return what encoding prompts takes; nothing where they are encoded as they come."""
        if self.keeps_text or not self.texts:
            return []
        prompts = prompts_at_once(self.subject.spec.token_limit)
        work = self._text_work(prompts)
        if self.config.memory.apart:
            size, needed = max(zip(self.texts, work, strict=True), key=sum)
            return [*self._base(), ("adapter", self._early_adapter), ("encoders", size), ("encoding", needed)]
        parts: Named = [("encoders", sum(self.texts)), ("autoencoder", self.autoencoder), ("encoding", max(work))]
        return [*self._base(), ("adapter", self._early_adapter), *parts]

    def encode_images(self) -> Named:
        """Return what encoding the largest pictures takes, as many at a time as the engine takes."""
        law, megapixels = self.model.autoencoder.work, self.subject.megapixels
        if self.config.memory.tile_pictures:
            work = law.mib(1, min(megapixels, self._tile_megapixels))
        else:
            work = law.mib(min(pictures_at_once(megapixels * 1e6), self.subject.number_of_pictures), megapixels)
        encoders = 0.0 if self.config.memory.apart else sum(self.texts)
        parts: Named = [("encoders", encoders), ("autoencoder", self.autoencoder), ("encoding", self._vae_gib(work))]
        return [*self._base(), ("adapter", self._early_adapter), *parts]

    def step(self) -> Named:
        """Return what a step takes where its activations, or its update of the weights, take most."""
        activations = self.activations / GIB * MIB
        update = (self.adapter + self.average) + self.numbers * _UPDATE_BYTES / GIB
        working = ("activations", activations) if activations >= update else ("updating", update)
        parts: Named = [("adapter", self.adapter), ("gradients", self.adapter), ("optimizer", self.optimizer)]
        return [*self._resident(), *parts, ("average", self.average), *self._kept_text(working[1]), working]

    def preview(self) -> Named:
        """Return what drawing a preview takes: denoising, or the decoder behind it; nothing without previews."""
        previews = self.config.previews
        if not previews.every:
            return []
        pixels = (previews.side or self.config.dataset.resolution) ** 2
        planned = (len(previews.prompts) or 2) * len(set(previews.seeds))
        pictures = min(planned, PREVIEWS_AT_ONCE, pictures_at_once(pixels))
        spec = self.subject.spec
        guided = spec.guides_in_one_batch and (previews.guidance or spec.draw_guidance) > 1.0
        scale = self.wide / 2
        drawing = scale * self.model.draw.mib(pictures * (1 + guided), pixels / 1e6) * MIB / GIB
        seen = min(pixels / 1e6, self._tile_megapixels) if self.config.memory.tile_pictures else pixels / 1e6
        decoding = self._vae_gib(self.model.autoencoder.decode.mib(1, seen))
        working: Named = [("drawing", drawing)]
        if self.autoencoder + decoding > drawing:
            working = [("autoencoder", self.autoencoder), ("drawing", decoding)]
        return [*self.save(), ("dequantizing", self.dequantizing), *working]

    def save(self) -> Named:
        """Return what lies on the card while a checkpoint is written: what lies there between steps."""
        # A schedule-free optimizer's average is computed for the moment: `schedule_free.in_place`.
        moment = self.adapter if self.config.optimizer.name in SCHEDULE_FREE else self.average
        parts: Named = [("adapter", self.adapter), ("optimizer", self.optimizer), ("average", moment)]
        return [("context", self._context), ("weights", self.weights), *parts, *self._kept_text(math.inf)]

    @property
    def activations(self) -> float:
        """MiB of a step's activations at their peak."""
        subject, config = self.subject, self.config
        laws_of = subject.step or self.model.steps[config.adapter.targets]
        in_fp32 = self.wide == 4
        # In fp32 there is one format for all, twice as wide as that of a LoRA in the base's 16 bits.
        laws = laws_of.base if in_fp32 or config.memory.lora_precision == "base" else laws_of.fp32
        share, pictures = checkpointed_share(config, self.model.num_blocks), config.train.batch_size
        mib = max(0.0, _laws_mib(laws, share, largest_rank(config), pictures, subject.megapixels))
        # A step that was simulated for these settings was so in fp32 too.
        mib = mib * 2 if in_fp32 and subject.step is None else mib
        return max(0.0, mib - self.offloaded) + self._text_activations

    @property
    def offloaded(self) -> float:
        """MiB of the blocks' inputs that wait in main memory."""
        config = self.config
        share = checkpointed_share(config, self.model.num_blocks)
        if not (config.memory.offload_activations and share):
            return 0.0
        away = max(0.0, share - _KEPT_INPUTS / max(1, self.model.num_blocks))
        inputs = self.model.inputs.mib(config.train.batch_size, self.subject.megapixels)
        return inputs * away * self.wide / 2

    @property
    def _context(self) -> float:
        return 0.0 if self.config.train.device == "cpu" else CONTEXT_GIB

    @property
    def _early_adapter(self) -> float:
        """The adapter while pictures and prompts are encoded: it is where the denoiser is."""
        return 0.0 if self.waits else self.adapter

    def _base(self) -> Named:
        """Return what lies on the card before the first step."""
        return [("context", self._context), ("weights", 0.0 if self.waits else self.denoiser)]

    def _resident(self) -> Named:
        frozen = self.subject.training_adapter_bytes / GIB
        weights = self.weights + frozen
        return [("context", self._context), ("weights", weights), ("dequantizing", self.dequantizing)]

    def _kept_text(self, working: float) -> Named:
        """Return the text encoders that stay, or what they need more than `working` GiB that they come before."""
        if not self.keeps_text or not self.texts:
            return []
        if not self.config.memory.apart or self.config.adapter.text_encoder:
            return [("encoders", sum(self.texts))]
        visit = max(map(sum, zip(self.texts, self._text_work(self.config.train.batch_size), strict=True)))
        return [("encoders", max(0.0, visit - working))]

    def _text_work(self, prompts: int) -> list[float]:
        scale, quantize = self.wide / 2, self.config.memory.quantize_text_encoders
        return [
            scale * part.work.mib(prompts) * MIB / GIB + self._widened(part, quantize)
            for part in self.model.text.values()
        ]

    @property
    def _text_activations(self) -> float:
        """MiB that training the text encoders adds, from their numbers of weights: 12 · width² a layer."""
        if not self.config.adapter.text_encoder:
            return 0.0
        total = 0.0
        for name in self.subject.spec.trainable_text_encoders:
            part = self.model.text.get(name)
            if part is None or not part.layer:
                continue
            width = math.sqrt(part.layer / 4)
            layers = max(1.0, part.packed / (12 * width * width))
            one = self._text_tokens * width * _LAYER_NUMBERS * self.wide / 2
            # With checkpointing each layer keeps its input, and one is computed again at a time.
            kept = self._text_tokens * width * self.wide
            each = layers * kept + one if self.config.train.gradient_checkpointing else layers * one
            total += each * self.config.train.batch_size
        return total / MIB

    @property
    def _text_tokens(self) -> int:
        """Tokens of the text encoders that can be trained: all are CLIPs, which read 77."""
        return min(77, self.subject.spec.token_limit)

    @property
    def _tile_megapixels(self) -> float:
        """Pixels of a tile, of half the side that the base was made for: `LoadedModel.save_memory`."""
        return (self.subject.spec.default_resolution // 2) ** 2 / 1e6

    def _vae_gib(self, mib: float) -> float:
        return mib * self.vae_scale * MIB / GIB

    def _widened(self, part: PartMemory, quantize: Quantization) -> float:
        """GiB of the largest packed layer in the numbers that are computed with."""
        return 0.0 if quantize == "none" else part.layer * self.wide / GIB


def part_bytes(part: PartMemory, quantize: Quantization, wide: int) -> float:
    """Return the bytes of a part's weights as they are kept, numbers that are not packed being `wide` bytes."""
    return part.packed * weight_bytes(quantize, part.layer, wide) + part.plain * wide


def weight_bytes(quantize: Quantization, layer: int, wide: int) -> float:
    """Return the bytes of one weight of a packed layer, with its share of the scales of a layer as large as a square
    one of `layer` numbers."""
    if quantize == "none":
        return wide
    return bytes_per_weight(quantize, 1, max(1, math.isqrt(layer)))


@lru_cache(256)
def swapped_bytes(blocks: tuple[BlockGroup, ...], count: int, quantize: Quantization, wide: int) -> tuple[float, float]:
    """Return the bytes of `count` evenly spread blocks, and those of the ring on the card: `block_swap.swap_blocks`."""
    each = wide if quantize == "none" else bytes_per_weight(quantize)
    sizes = [group.packed * each + group.plain * wide for group in blocks for _ in range(group.count)]
    count = min(count, len(sizes))
    chosen = [sizes[(2 * place + 1) * len(sizes) // (2 * count)] for place in range(count)]
    return sum(chosen), min(RING, count) * max(chosen, default=0.0)


def checkpointed_share(config: RunConfig, num_blocks: int) -> float:
    """Return the share of the blocks that are computed twice: those asked for, and every swapped one."""
    asked = config.memory.checkpoint_share if config.train.gradient_checkpointing else 0.0
    return max(asked, min(1.0, config.memory.swapped_blocks / max(1, num_blocks)))


def largest_rank(config: RunConfig) -> int:
    """Return the largest rank that a layer has."""
    adapter = config.adapter
    if not adapter.block_ranks:
        return adapter.rank
    return max(adapter.rank, *(int(value) for _, value in pairs(adapter.block_ranks)))


def adapter_numbers(subject: Subject) -> int:
    """Return how many numbers are trained: counted, or of every layer of the targets with the largest rank."""
    if subject.num_parameters is not None:
        return subject.num_parameters
    step = subject.step or subject.model.steps[subject.config.adapter.targets]
    numbers = step.per_rank * largest_rank(subject.config)
    if not subject.config.adapter.text_encoder:
        return numbers
    for name in subject.spec.trainable_text_encoders:
        part = subject.model.text.get(name)
        if part is not None and part.layer:
            # Of each 12 · width² weights four matrices of attention are adapted: 8 · width numbers a rank.
            width = math.sqrt(part.layer / 4)
            numbers += int(part.packed / (12 * width * width) * 8 * width) * subject.config.adapter.rank
    return numbers


def optimizer_bytes(config: RunConfig) -> float:
    """Return the bytes of an optimizer's state for each trained number.

    8-bit ones keep a byte for each number that others keep four of, and 1/64 more for their blocks' scales, where the
    adapter's matrices are large enough.
    """
    bytes_each = OPTIMIZER_BYTES[config.optimizer.name]
    adapter = config.adapter
    smallest = min([adapter.rank, *(int(value) for _, value in pairs(adapter.block_ranks))])
    small = smallest * _SMALLEST_SIDE < _WHOLE_IN_8_BIT or adapter.kind not in ("lora", "dora") or adapter.convolutions
    return bytes_each if "8bit" not in config.optimizer.name or small else bytes_each / 4 * (1 + 1 / 64)


def keeps_text(subject: Subject, wide: int) -> bool:
    """Tell whether the text encoders stay while training: they are trained, or there are too many prompts to keep."""
    config = subject.config
    if config.adapter.text_encoder:
        return True
    if subject.keeps_text is not None:
        return subject.keeps_text
    captions = config.captions
    if not (captions.shuffle or captions.tag_dropout or captions.wildcards):
        return False
    uses = config.train.steps * config.train.gradient_accumulation * config.train.batch_size
    return uses > max_prompts(subject.spec.prompt_numbers, wide)


def _laws_mib(laws: StepLaws, share: float, rank: int, pictures: int, megapixels: float) -> float:
    """Return a step's activations with this share of the blocks checkpointed: linear from none to half to all."""
    half = laws.half.mib(pictures, megapixels)
    if share <= 0.5:
        none = laws.none.mib(pictures, megapixels)
        base = none + (half - none) * share * 2
    else:
        base = half + (laws.all.mib(pictures, megapixels) - half) * (share * 2 - 1)
    more = laws.rank_none.mib(pictures, megapixels) * (1 - share) + laws.rank_all.mib(pictures, megapixels) * share
    return base + more * (rank - LAWS_RANK)
