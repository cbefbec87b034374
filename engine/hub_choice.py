"""Which files of a Hub repository a model needs: configurations, tokenizers and safetensors weights. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.safetensors_header import PICKLE_FIX, PICKLE_SUFFIXES

SKIPPED_PARTS = {"safety_checker", "feature_extractor", "image_encoder"}
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_PLAIN_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_FP16_WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model)(\.fp16(-\d{5}-of-\d{5})?|-\d{5}-of-\d{5}\.fp16)\.safetensors"
    r"|(model|diffusion_pytorch_model)\.(fp16\.safetensors\.index|safetensors\.index\.fp16)\.json"
)


def needed_part_files(part: str, names: Iterable[str], repo: str) -> list[str]:
    """Choose the configurations, tokenizer files and safetensors weights of one part; "" is the repository's root.

    Plain weights are preferred to the fp16 variant. Raises BaseModelError where there are pickled weights only.
    """
    inside = [name for name in names if PurePosixPath(name).parent == PurePosixPath(part)]
    return _part_files(part, inside, repo)


INDEXES = ("model_index.json", "modular_model_index.json")
"""What says that a repository is in the diffusers layout; the second is that of modular pipelines."""


def index_of(names: Iterable[str]) -> str:
    """Return the index among a repository's files, "" where there is none."""
    return next((name for name in INDEXES if name in set(names)), "")


def needed_files(names: Iterable[str], index: dict[str, Any], repo: str) -> list[str]:
    """Choose the files of a repository to download; `index` is what its index says.

    Plain weights are preferred to the fp16 variant. Raises BaseModelError where a part has pickled weights only.
    """
    all_names = list(names)
    # The card names the license.
    chosen = [index_of(all_names), *(name for name in all_names if name == "README.md")]
    parts = [key for key, value in index.items() if isinstance(value, list) and value and value[0]]
    for part in sorted(set(parts) - SKIPPED_PARTS):
        chosen += needed_part_files(part, all_names, repo)
    return chosen


def _part_files(part: str, inside: list[str], repo: str) -> list[str]:
    def matching(pattern: re.Pattern[str]) -> list[str]:
        return [name for name in inside if pattern.fullmatch(PurePosixPath(name).name)]

    weights = matching(_PLAIN_WEIGHTS)
    if not any(name.endswith(".safetensors") for name in weights):
        weights = matching(_FP16_WEIGHTS)
    pickles = [name for name in inside if name.endswith(PICKLE_SUFFIXES)]
    if pickles and not weights:
        raise BaseModelError(
            f"{repo} has its {part or 'weights'} only as a pickle, {pickles[0]}.",
            why="Opening a pickle can run code.",
            fix=PICKLE_FIX,
        )
    texts = [name for name in inside if name.endswith(_TEXT_SUFFIXES) and ".index." not in name]
    return sorted({*texts, *weights})
