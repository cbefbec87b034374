"""What the rows of `engine.foot_guns` look at: a run's settings beside what its base model's preset says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from lorasmith.engine.advisor import goals, read_preset, recommended_steps
from lorasmith.engine.combinations import ONE_RATE, WITH_UP
from lorasmith.engine.config_adapter import effective_scale
from lorasmith.engine.errors import ConfigError

if TYPE_CHECKING:
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.families import BaseIdentity, FamilySpec

SMALL_STEPS = {"lion": 3.0, "lion8bit": 3.0, "paged_lion8bit": 3.0}
"""Optimizers whose steps are larger at the same rate, by how much at least (Chen et al., arXiv:2302.06675, section 5:
a rate 3 to 10 times smaller than AdamW's)."""
REAL_SHARE = 0.1
"""A base with a smaller share of its family's usual weights is a tiny one for trying out, which no preset is about."""
ROUNDING = 1.01
"""A rate is out of its band where it is out by more than this."""


@dataclass(frozen=True)
class FootGun:
    """One thing that is known to spoil a LoRA.

    `key` names it, `message` says in a sentence what is wrong and what it does. `fix` are the settings, by dotted key,
    that put it right, empty where only the user can; `fix_words` say the same. `note`: worth knowing, and no mistake.
    """

    key: str
    message: str
    fix: Mapping[str, Any]
    fix_words: str
    severity: Literal["warning", "note"] = "warning"

    @property
    def words(self) -> str:
        """The message with its fix."""
        return f"{self.message} {self.fix_words}"


@dataclass(frozen=True)
class Circumstances:
    """What else is known of a run beside its settings; nothing of it has to be.

    `goal` is a goal of the presets. Of `captions` captions, `tag_captions` are lists of tags and `prose_captions`
    sentences. `unneeded` are memory settings, by dotted key, without which the run would fit the card as well.
    """

    goal: str = ""
    captions: int = 0
    tag_captions: int = 0
    prose_captions: int = 0
    unneeded: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Case:
    """A run as the rows see it; what the preset says is empty for a tiny base and for a family without bounds."""

    config: RunConfig
    spec: FamilySpec
    identity: BaseIdentity | None
    num_pictures: int | None
    trigger_known: str
    around: Circumstances

    @cached_property
    def preset(self) -> Mapping[str, Any]:
        """The family's preset, where it has bounds."""
        if self.identity is not None and self.identity.parameters < REAL_SHARE * self.spec.denoiser_parameters:
            return {}
        try:
            preset = read_preset(self.spec.name)
        except ConfigError:
            return {}
        return preset if "advice" in preset else {}

    @property
    def advice(self) -> Mapping[str, Any]:
        """The preset's bounds."""
        found: Mapping[str, Any] = self.preset.get("advice", {})
        return found

    def usual(self, key: str) -> Any:
        """Return the preset's value of a setting, None where it has none."""
        return self.preset.get("defaults", {}).get(key, {}).get("value")

    @property
    def base(self) -> str:
        """The base model's family in words."""
        return self.spec.label

    @property
    def native(self) -> int:
        """The side in pixels that the base was trained at."""
        return self.identity.native_resolution if self.identity is not None else self.spec.default_resolution

    @property
    def finds_rate(self) -> bool:
        """Whether the optimizer finds its own learning rate."""
        return self.config.optimizer.name in ONE_RATE

    @property
    def scale(self) -> float:
        """What the trained product is multiplied by."""
        return effective_scale(self.config.adapter)

    @property
    def band(self) -> tuple[float, float] | None:
        """The lowest and highest learning rate at scale 1 for this optimizer, None where nothing is known of it."""
        entry = self.advice.get("learning_rate_band")
        if entry is None or self.finds_rate or self.config.adapter.kind not in WITH_UP:
            return None
        return entry["low"] / self._caution, entry["high"] / self._caution

    @property
    def rate(self) -> float:
        """The learning rate in effect: times the scale, as the change of weights grows by both alike."""
        return self.config.optimizer.learning_rate * self.scale

    @property
    def usual_rate(self) -> float:
        """The recommended learning rate at scale 1, for this optimizer."""
        return float(self.usual("optimizer.learning_rate") or 1e-4) / self._caution

    @property
    def _caution(self) -> float:
        return SMALL_STEPS.get(self.config.optimizer.name, 1.0)

    @property
    def pictures_per_step(self) -> int:
        """Pictures that one optimizer step sees."""
        return self.config.train.batch_size * self.config.train.gradient_accumulation

    def recommended_steps(self) -> list[int]:
        """Return the steps that the preset recommends for the goal, or for each where it is not known."""
        known = goals(self.spec.name) if self.preset else ()
        chosen = [goal for goal in known if goal == self.around.goal] or list(known)
        pictures = self.num_pictures or 0
        return [recommended_steps(self.spec.name, goal, pictures, self.pictures_per_step) for goal in chosen]

    def rate_words(self) -> str:
        """Begin a sentence with the learning rate, and with what it acts like where the scale is not 1."""
        rate = f"A learning rate of {self.config.optimizer.learning_rate:g}"
        if math.isclose(self.scale, 1):
            return f"{rate} is"
        return f"{rate} at a scale of {self.scale:.3g} acts like one of {self.rate:.2g}, which is"

    @property
    def with_optimizer(self) -> str:
        """Name the optimizer where it takes larger steps than others at the same rate."""
        return f" with {self.config.optimizer.name}" if self._caution != 1 else ""


def rounded(value: float) -> float:
    """Return `value` with two digits, rounded down, so that a bound is never exceeded."""
    power = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.floor(value / power + 1e-6) * power:.1e}")


def at_scale_one(case: Case) -> dict[str, Any]:
    """Return the settings that make the scale 1."""
    adapter = case.config.adapter
    return {"adapter.alpha": float(f"{math.sqrt(adapter.rank):.3g}") if adapter.rslora else float(adapter.rank)}
