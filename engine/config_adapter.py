"""The settings of a run that say what is trained: the adapter.

See `engine.config`, which puts all sections together.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from lorasmith.engine.adapter_combinations import ROTATIONS, pairs
from lorasmith.engine.config_data import Rate, Section

MAX_RANK = 1024
MAX_RATE_FACTOR = 100.0


class AdapterSettings(Section):
    """The LoRA itself."""

    kind: Literal["lora", "locon", "dora", "loha", "lokr", "oft", "boft"] = "lora"
    """`lora` adapts linear layers; `locon` also convolutions, for textures and styles; `dora` learns size and direction
    apart; `loha` and `lokr` are products that hold more in a smaller file; `oft` and `boft` rotate weights."""
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 16
    """Size of the LoRA: more can hold more and overfits sooner."""
    alpha: Annotated[float, Field(gt=0.0, le=4096.0)] = 16.0
    """Strength: the change is scaled by alpha / rank."""
    convolutions: bool = False
    """Adapt convolution layers too; `locon` always does."""
    conv_rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 8
    """Rank of the convolution layers."""
    conv_alpha: Annotated[float, Field(gt=0.0, le=4096.0)] = 8.0
    """Alpha of the convolution layers."""
    rslora: bool = False
    """Scale by alpha / √rank instead, so that high ranks learn as fast as low ones (Kalajdzievski,
    arXiv:2312.03732)."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq"] = "default"
    """How the weights begin (`lora`, `locon`, `dora`); none but `loftq` changes the base model at first. `pissa` and
    `olora` begin with the main directions of the base's own weights, `loftq` with those of what quantization took off
    them, so that training sees nearly the whole base (all three: `lora`, `locon`); they are shared at twice the
    rank."""
    lokr_factor: Annotated[int, Field(ge=0, le=1024)] = 0
    """Size of the small factor (`lokr` only); 0: as square as possible."""
    lokr_full: bool = False
    """Keep the large factor whole instead of splitting it by rank (`lokr` only)."""
    block_size: Annotated[int, Field(ge=2, le=1024)] = 32
    """Largest size of the blocks of outputs that are rotated (`oft` and `boft` only); smaller where a layer's outputs
    cannot be divided so, as in LyCORIS."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of LoRA inputs dropped in training (`lora` and `locon`)."""
    rank_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of ranks dropped in training (`lora`, `locon`); of output channels (`loha`, `lokr`)."""
    max_norm: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    """Shrink a layer's weights after each step where the norm of its change is larger than this (`lora`, `locon`,
    `loha`, `lokr`); 0: never. Usually 1."""
    targets: Literal["attention", "attention-mlp", "all-linear", "diffusers", "kohya", "ai-toolkit"] = "attention"
    """Which layers are adapted: attention only, with the feed-forward layers, every linear layer of the blocks, or the
    set of that trainer."""
    include: list[Annotated[str, Field(min_length=1)]] = []
    """Adapt only layers in whose dotted path one of these regular expressions is found; empty: all."""
    exclude: list[Annotated[str, Field(min_length=1)]] = []
    """Leave out layers in whose dotted path one of these regular expressions is found."""
    block_ranks: list[Annotated[str, Field(min_length=3)]] = []
    """Other ranks for some layers, as PATTERN=RANK with a regular expression; the first that is found counts, and alpha
    changes with the rank. Rank 0 leaves them out."""
    block_learning_rates: list[Annotated[str, Field(min_length=3)]] = []
    """Other learning rates for some layers, as PATTERN=FACTOR with a regular expression; the first found counts."""
    text_encoder: bool = False
    """Train the text encoder too; costs memory, since prompts cannot be cached."""
    text_encoder_learning_rate: Rate = 5e-5
    """Learning rate of the text encoder's LoRA; optimizers that find one rate for all weights do not read it."""
    start_from: str = ""
    """A LoRA file, of any layout, whose weights the new one begins with. Empty: none."""

    @field_validator("include", "exclude", mode="after")
    @classmethod
    def _check_patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            _require_pattern(pattern)
        return patterns

    @field_validator("block_ranks", mode="after")
    @classmethod
    def _check_ranks(cls, entries: list[str]) -> list[str]:
        for entry, (pattern, value) in zip(entries, pairs(entries), strict=True):
            if not pattern or not value.strip().isdecimal() or int(value) > MAX_RANK:
                raise ValueError(f"{entry}: must be PATTERN=RANK with a whole number from 0 to {MAX_RANK}")
            _require_pattern(pattern)
        return entries

    @field_validator("block_learning_rates", mode="after")
    @classmethod
    def _check_rates(cls, entries: list[str]) -> list[str]:
        for entry, (pattern, value) in zip(entries, pairs(entries), strict=True):
            try:
                usable = bool(pattern) and 0.0 < float(value) <= MAX_RATE_FACTOR
            except ValueError:
                usable = False
            if not usable:
                raise ValueError(f"{entry}: must be PATTERN=FACTOR with a number above 0 and up to {MAX_RATE_FACTOR:g}")
            _require_pattern(pattern)
        return entries


def effective_scale(settings: AdapterSettings, *, convolution: bool = False) -> float:
    """Return what the trained product is multiplied by: alpha / rank, or alpha / √rank for rsLoRA.

    1 for kinds without one. Of convolutions larger than 1x1 with `convolution`. Layers of `block_ranks` keep
    alpha / rank; a LoKr whose factors are both whole has 1 (`adapter_layers.whole_factors`).
    """
    if settings.kind in ROTATIONS or (settings.kind == "lokr" and settings.lokr_full):
        return 1.0
    rank, alpha = (settings.conv_rank, settings.conv_alpha) if convolution else (settings.rank, settings.alpha)
    return scale_of(rank, alpha, settings)


def scale_of(rank: int, alpha: float, settings: AdapterSettings) -> float:
    """Return the scale of a product of this rank and alpha."""
    return alpha / math.sqrt(rank) if settings.rslora else alpha / rank


def _require_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern}: must be a regular expression, but {error}") from None
