"""Choices that do not go with the base model, the captions or the card."""

from __future__ import annotations

from collections.abc import Callable

from lorasmith.engine.combinations import without_meaning
from lorasmith.engine.compatibility import missing_training_adapter
from lorasmith.engine.dataset.check_goals import aim_of
from lorasmith.engine.dataset.check_wording import CLASS_WORDS
from lorasmith.engine.foot_guns._case import Case, FootGun

RARE_WORD = "zqx"
NOT_COMMERCIAL = ("non-commercial", "noncommercial", "cc-by-nc")
GUIDANCE = 0.5
"""Guidance is another one from this difference on."""
MOST = 0.5
_SAVERS = {
    "memory.quantize": ("none", "A quantized base is slower and draws slightly worse"),
    "memory.swapped_blocks": (0, "Blocks that wait in main memory make every step slower"),
    "memory.offload_activations": (False, "Activations that wait in main memory make every step slower"),
    "train.gradient_checkpointing": (False, "Gradient checkpointing makes every step about a third slower"),
}
"""Memory settings that cost speed or quality: the value that leaves them off, and what they cost."""


def _meaningless(case: Case) -> FootGun | None:
    found = without_meaning(case.config, case.spec)
    if not found:
        return None
    fix = {key: usual for key, usual, _ in found}
    names = " and ".join(fix)
    # base_contradictions says the same of each setting, and no run starts with it.
    return FootGun(
        "no-meaning",
        f"{names} {'has' if len(fix) == 1 else 'have'} no meaning for {case.base}, which is another kind of model.",
        fix,
        f"Set {'it' if len(fix) == 1 else 'them'} back to the default.",
    )


def _undistilled(case: Case) -> FootGun | None:
    words = missing_training_adapter(case.config.base, case.identity) if case.identity is not None else ""
    if not words:
        return None
    message, _, fix_words = words.partition(". ")
    return FootGun("no-training-adapter", f"{message}.", {"base.training_adapter": "auto"}, fix_words)


def _not_commercial(case: Case) -> FootGun | None:
    if case.identity is None:
        return None
    own, usual = str(case.identity.details.get("license", "") or ""), case.spec.license
    if not any(word in (own or usual.name).lower() for word in NOT_COMMERCIAL):
        return None
    return FootGun(
        "not-commercial",
        f"The license of the base model is for non-commercial use. {usual.consequence}",
        {},
        f"Read it before you sell anything: {usual.url}",
        severity="note",
    )


def _fp16_overflow(case: Case) -> FootGun | None:
    entry = case.advice.get("precision")
    if entry is None or entry["value"] != "bf16" or case.config.train.precision != "fp16":
        return None
    return FootGun(
        "fp16-overflow",
        f"{case.base} computes with numbers that fp16 does not hold: the loss can become no number and pictures black.",
        {"train.precision": "auto"},
        "Set train.precision to auto, which is bf16 where the card can.",
    )


def _guidance(case: Case) -> FootGun | None:
    usual, guidance = case.usual("objective.guidance"), case.config.objective.guidance
    if usual is None or abs(guidance - usual) < GUIDANCE:
        return None
    return FootGun(
        "guidance",
        f"objective.guidance = {guidance:g} is for drawing: trained with it, the LoRA bends what the guidance adds, "
        "and its pictures look overdone.",
        {"objective.guidance": usual},
        f"Set objective.guidance to {usual:g}; previews.guidance is the one that draws.",
    )


def _offset_beside_zero_snr(case: Case) -> FootGun | None:
    objective = case.config.objective
    own = bool(case.identity.details.get("zero_snr")) if case.identity is not None else False
    if not (objective.zero_terminal_snr or own) or not (objective.noise_offset or objective.multires_iterations):
        return None
    return FootGun(
        "offset-zero-snr",
        "The noise schedule ends in pure noise, which teaches dark and bright pictures already; offset noise on top "
        "washes them out.",
        {"objective.noise_offset": 0.0, "objective.multires_iterations": 0},
        "Set objective.noise_offset and objective.multires_iterations to 0.",
    )


def _fused_backward(case: Case) -> FootGun | None:
    # sd-scripts wires it into full fine-tuning alone; measured here as well, see OptimizerSettings.fused_backward.
    if not case.config.optimizer.fused_backward:
        return None
    return FootGun(
        "fused-backward",
        "A fused backward pass saves nothing for a LoRA, whatever guides say: theirs are figures of training whole "
        "models. And gradients can no longer be shortened.",
        {"optimizer.fused_backward": False, "optimizer.max_grad_norm": 1.0},
        "Set optimizer.fused_backward to false and optimizer.max_grad_norm to 1.",
        severity="note",
    )


def _unneeded_saver(case: Case) -> FootGun | None:
    config = case.config
    on = {
        "memory.quantize": config.memory.quantize != "none",
        "memory.swapped_blocks": config.memory.swapped_blocks > 0,
        "memory.offload_activations": config.memory.offload_activations,
        "train.gradient_checkpointing": config.train.gradient_checkpointing,
    }
    key = next((key for key in _SAVERS if on[key] and key in case.around.unneeded), "")
    if not key:
        return None
    off, cost = _SAVERS[key]
    told = off if isinstance(off, str | int) and not isinstance(off, bool) else "false"
    return FootGun(
        "saver-unneeded",
        f"{cost}, and this card has room without.",
        {key: off},
        f"Set {key} to {told}.",
    )


def _tag_soup(case: Case) -> FootGun | None:
    around = case.around
    if case.spec.caption_style != "prose" or around.tag_captions <= MOST * around.captions:
        return None
    return FootGun(
        "tags-for-prose",
        f"{around.tag_captions} of {around.captions} captions are lists of tags, and {case.base} reads sentences: "
        "prompts are followed worse.",
        {},
        "Write sentences (“a woman with red hair stands in a garden”), or let a captioner write them.",
    )


def _prose(case: Case) -> FootGun | None:
    around = case.around
    if case.spec.caption_style != "tags" or around.prose_captions <= MOST * around.captions:
        return None
    return FootGun(
        "prose-for-tags",
        f"{around.prose_captions} of {around.captions} captions are long sentences, and {case.base} was trained on "
        "tags and short phrases.",
        {},
        "Short phrases between commas work best, the most important first.",
        severity="note",
    )


def _shuffled_prose(case: Case) -> FootGun | None:
    settings, around = case.config.captions, case.around
    tags = around.tag_captions > MOST * around.captions
    prose = around.prose_captions > MOST * around.captions or (case.spec.caption_style == "prose" and not tags)
    if not prose or not (settings.shuffle or settings.tag_dropout):
        return None
    return FootGun(
        "shuffled-prose",
        "Shuffling or dropping tags tears sentences apart at their commas; pieces in a wrong order are learnt.",
        {"captions.shuffle": False, "captions.tag_dropout": 0.0},
        "Set captions.shuffle to false and captions.tag_dropout to 0.",
    )


def _real_word(case: Case) -> FootGun | None:
    trigger = case.config.captions.trigger.strip()
    if not trigger or not (case.trigger_known or trigger.casefold() in CLASS_WORDS):
        return None
    known = case.trigger_known or f"“{trigger}” is a word that the base knows."
    return FootGun(
        "real-word-trigger",
        f"{known} The LoRA has to unlearn its meaning, and every prompt with it changes.",
        {"captions.trigger": RARE_WORD},
        f"Take a rare word of letters, such as {RARE_WORD}, as captions.trigger.",
    )


def _flipped_sides(case: Case) -> FootGun | None:
    aim = aim_of(case.around.goal)
    if not case.config.dataset.flip or not aim.by_sides:
        return None
    return FootGun(
        "flipped-sides",
        f"Mirrored pictures teach {aim.what} with left and right exchanged: faces lose their likeness, lettering is "
        "written backwards.",
        {"dataset.flip": False},
        "Set dataset.flip to false.",
    )


ROWS: tuple[Callable[[Case], FootGun | None], ...] = (
    _meaningless,
    _undistilled,
    _fp16_overflow,
    _guidance,
    _offset_beside_zero_snr,
    _tag_soup,
    _prose,
    _shuffled_prose,
    _real_word,
    _flipped_sides,
    _unneeded_saver,
    _fused_backward,
    _not_commercial,
)
