"""Learning rates and what they are multiplied by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorasmith.engine.foot_guns._case import ROUNDING, Case, FootGun, at_scale_one, rounded

OLDER_MODELS = 2.5e-4
"""Rates from here on are those of SD 1.5 and SDXL; guide 002_9a4687e838d82f1c.txt names reusing them for flow models as
the usual mistake."""
PRODIGY_DECAY = 0.01
"""The weight decay that Prodigy's authors recommend for diffusion models (the README of konstmish/prodigy)."""
STRONG_DECAY = 0.1


def _rate_high(case: Case) -> FootGun | None:
    if case.band is None or case.rate <= case.band[1] * ROUNDING:
        return None
    highest = case.band[1]
    fix = {"optimizer.learning_rate": rounded(highest / case.scale)}
    what = f"{case.rate_words()} above the {highest:.2g} that {case.base} bears{case.with_optimizer}"
    if case.spec.objective == "flow" and case.rate >= OLDER_MODELS * ROUNDING:
        key, why = "rate-of-older-models", "such rates are for older models, and flow models overdo everything at them."
    else:
        key, why = "rate-high", "single pictures are learnt by heart, and then the base's own drawing breaks."
    words = f"Set optimizer.learning_rate to {fix['optimizer.learning_rate']:g} or less."
    return FootGun(key, f"{what}: {why}", fix, words)


def _rate_low(case: Case) -> FootGun | None:
    if case.band is None or case.rate * ROUNDING >= case.band[0]:
        return None
    fix: dict[str, Any] = {} if case.scale >= 1 else at_scale_one(case)
    scale = case.scale if case.scale >= 1 else 1.0
    fix["optimizer.learning_rate"] = rounded(case.usual_rate / scale)
    message = f"{case.rate_words()} below {case.band[0]:.2g}: hardly anything is learnt in the usual number of steps."
    return FootGun("rate-low", message, fix, _set_words(fix))


def _alpha_high(case: Case) -> FootGun | None:
    habit = case.advice.get("alpha_habit")
    if habit is None or case.scale <= habit["high"] * ROUNDING:
        return None
    divisor = "√rank" if case.config.adapter.rslora else "rank"
    fix = {**at_scale_one(case), **_tamed(case)}
    message = (
        f"adapter.alpha makes the scale alpha / {divisor} {case.scale:.3g}, and trainers of {case.base} stay at "
        f"{habit['high']:g} or below: the LoRA learns that many times faster than its learning rate says."
    )
    return FootGun("alpha-high", message, fix, _set_words(fix))


def _alpha_low(case: Case) -> FootGun | None:
    habit = case.advice.get("alpha_habit")
    if habit is None or case.scale * ROUNDING >= habit["low"]:
        return None
    fix = {**at_scale_one(case), **_tamed(case)}
    message = (
        f"adapter.alpha makes the scale alpha / rank {case.scale:.2g}: the LoRA hardly acts, and trainers of "
        f"{case.base} stay above {habit['low']:g}."
    )
    return FootGun("alpha-low", message, fix, _set_words(fix))


def _tamed(case: Case) -> dict[str, Any]:
    """Return the learning rate for a scale of 1, where the present one would be too high then."""
    if case.band is None or case.config.optimizer.learning_rate <= case.band[1]:
        return {}
    return {"optimizer.learning_rate": rounded(case.usual_rate)}


def _rate_beside_found_one(case: Case) -> FootGun | None:
    if not case.finds_rate or case.config.optimizer.learning_rate == 1.0:
        return None
    optimizer = case.config.optimizer
    return FootGun(
        "found-rate",
        f"{optimizer.name} finds the learning rate itself and multiplies it by {optimizer.learning_rate:g}: "
        "the LoRA learns next to nothing.",
        {"optimizer.learning_rate": 1.0},
        "Set optimizer.learning_rate to 1.",
    )


def _lora_plus_beside_found_rate(case: Case) -> FootGun | None:
    optimizer = case.config.optimizer
    if not case.finds_rate or (
        optimizer.lora_plus_ratio == 1.0 and optimizer.text_encoder_lora_plus_ratio in (0.0, 1.0)
    ):
        return None
    # kohya-ss/sd-scripts issue 1929
    return FootGun(
        "found-rate-lora-plus",
        f"{optimizer.name} finds one rate for all weights, and LoRA+ asks for two: it stops or finds a wrong one.",
        {"optimizer.lora_plus_ratio": 1.0, "optimizer.text_encoder_lora_plus_ratio": 0.0},
        "Set optimizer.lora_plus_ratio to 1 and optimizer.text_encoder_lora_plus_ratio to 0.",
    )


def _decay_beside_found_rate(case: Case) -> FootGun | None:
    optimizer = case.config.optimizer
    if not case.finds_rate or optimizer.weight_decay < STRONG_DECAY:
        return None
    return FootGun(
        "found-rate-decay",
        f"A weight decay of {optimizer.weight_decay:g} pulls the LoRA to zero while {optimizer.name} is still looking "
        "for its rate, and it may find none.",
        {"optimizer.weight_decay": PRODIGY_DECAY},
        f"Set optimizer.weight_decay to {PRODIGY_DECAY:g}, as the optimizer's authors do for such models.",
    )


def _rate_with_lora_plus(case: Case) -> FootGun | None:
    ratio = case.config.optimizer.lora_plus_ratio
    # guide 000_38c307fe2d91a4a5.txt: with LoRA+ half the usual rate
    highest = case.usual_rate / 2
    if case.band is None or ratio == 1.0 or case.rate <= highest * ROUNDING:
        return None
    rate = rounded(highest / case.scale)
    return FootGun(
        "rate-lora-plus",
        f"LoRA+ trains the up matrices at {ratio:g} times the learning rate, which is the usual one without it.",
        {"optimizer.learning_rate": rate},
        f"Set optimizer.learning_rate to {rate:g}, half the usual; with pictures that still break, lower the ratio.",
    )


def _text_encoder_rate(case: Case) -> FootGun | None:
    entry, adapter = case.advice.get("text_encoder_rate"), case.config.adapter
    if entry is None or case.finds_rate or not adapter.text_encoder:
        return None
    if adapter.text_encoder_learning_rate * case.scale <= entry["high"] * ROUNDING:
        return None
    rate = rounded(entry["high"] / case.scale)
    return FootGun(
        "text-encoder-rate",
        f"adapter.text_encoder_learning_rate = {adapter.text_encoder_learning_rate:g} is more than a text encoder "
        f"bears ({entry['high']:g} at scale 1): words lose their meaning, and prompts are no longer followed.",
        {"adapter.text_encoder_learning_rate": rate},
        f"Set it to {rate:g} or less.",
    )


def _set_words(fix: dict[str, Any]) -> str:
    return f"Set {' and '.join(f'{key} to {value:g}' for key, value in fix.items())}."


ROWS: tuple[Callable[[Case], FootGun | None], ...] = (
    _rate_beside_found_one,
    _lora_plus_beside_found_rate,
    _decay_beside_found_rate,
    _rate_high,
    _rate_low,
    _alpha_high,
    _alpha_low,
    _rate_with_lora_plus,
    _text_encoder_rate,
)
