"""What a run takes of main memory and of the disk, part by part, in GiB. Torch-free; see `forecast`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasmith.engine.combinations import SCHEDULE_FREE
from lorasmith.engine.dataset.cache_size import ENTRY_BYTES, MAX_PROMPT_BYTES, prompt_bytes
from lorasmith.engine.disk_plan import plan_disk
from lorasmith.engine.memory.card_parts import part_bytes
from lorasmith.engine.memory.constants import GIB, MIB

if TYPE_CHECKING:
    from lorasmith.engine.memory.card_parts import CardParts, Named

PROGRAM_GIB = 1.5
"""Main memory of the process itself: 0.5 GiB with torch, diffusers and transformers imported (measured without a GPU),
and 1 GiB assumed for what the CUDA driver and its libraries keep there."""
_SPARE_PROMPTS = 8
"""Prompts of a run beside its pictures' own: those of previews, the empty one and the like."""


def ram_parts(card: CardParts, card_peak: float) -> Named:
    """Return the most of main memory: while the base is loaded, or while it is trained.

    On the processor everything that a card would hold, `card_peak` GiB, is there too.
    """
    loading = _loading(card)
    training = _training(card)
    if card.config.train.device == "cpu":
        training = [("training", card_peak), *training]
    return max(loading, training, key=lambda parts: sum(gib for _, gib in parts))


def disk_parts(card: CardParts) -> Named:
    """Return what the run writes, as `disk_plan` counts it, and its pictures and prompts in the cache."""
    plan = plan_disk(card.config, card.numbers)
    parts: Named = [
        ("checkpoints", plan.checkpoints / GIB),
        ("previews", plan.previews / GIB),
        ("export", plan.export / GIB),
        ("journal", plan.journal / GIB),
    ]
    return [*parts, ("cache", (_latents_bytes(card) + _prompts_bytes(card)) / GIB)]


def _loading(card: CardParts) -> Named:
    """Parts are read one after another, and then lie on the card or wait here.

    Weights in the format that is computed in are mapped from their files: their pages can be given up at any time, and
    are not counted.
    """
    memory, model = card.config.memory, card.model
    read = 0.0 if card.subject.mapped else 1.0
    most = read * part_bytes(model.denoiser, "none", card.wide) / GIB
    held = memory.quantize != "none" or not card.subject.mapped
    waiting = card.denoiser if card.waits and held else 0.0
    most = max(most, waiting)
    texts_held = memory.quantize_text_encoders != "none" or not card.subject.mapped
    for part, kept in zip(model.text.values(), card.texts, strict=True):
        most = max(most, waiting + read * part_bytes(part, "none", card.wide) / GIB)
        waiting += kept if memory.apart and texts_held else 0.0
    return [("program", PROGRAM_GIB), ("loading", max(most, waiting + card.autoencoder))]


def _training(card: CardParts) -> Named:
    saved = card.numbers * 4 * (2 if card.average or card.config.optimizer.name in SCHEDULE_FREE else 1) / GIB
    waiting = sum(card.texts) if card.keeps_text and card.config.memory.apart else 0.0
    return [
        ("program", PROGRAM_GIB),
        ("swapped blocks", card.swapped / GIB),
        ("activations", card.offloaded * MIB / GIB),
        ("encoders", waiting),
        ("pictures and prompts", (_latents_bytes(card) + _prompts_bytes(card)) / GIB),
        ("saving", saved + card.optimizer),
    ]


def _latents_bytes(card: CardParts) -> float:
    """Return the bytes of all encoded pictures, as if each were as large as the largest."""
    spec, subject = card.subject.spec, card.subject
    places = subject.megapixels * 1e6 / spec.latent_downscale**2
    one = ENTRY_BYTES + places * (spec.latent_channels * card.wide + 1)
    dataset = subject.config.dataset
    views = (1 + len(set(dataset.more_resolutions))) * (2 if dataset.flip else 1)
    return one * subject.number_of_pictures * views


def _prompts_bytes(card: CardParts) -> float:
    if card.keeps_text:
        return 0.0
    config, count = card.config, card.subject.number_of_pictures + _SPARE_PROMPTS
    captions = config.captions
    if captions.shuffle or captions.tag_dropout or captions.wildcards:
        count += config.train.steps * config.train.gradient_accumulation * config.train.batch_size
    one = prompt_bytes(card.subject.spec.prompt_numbers, card.wide)
    return min(count * one, MAX_PROMPT_BYTES)
