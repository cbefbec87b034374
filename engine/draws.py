"""Random draws as functions of their place in the run, so that nothing needs to be carried over a resume.

Every draw is keyed by (seed, purpose, numbers): the same key gives the same values in any process, at any worker count
and after any number of resumes.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def draw_key(seed: int, purpose: str, *place: int) -> int:
    """Return a 63-bit number for a purpose such as `noise` at a place such as (step, sample)."""
    text = f"{seed}/{purpose}/{'/'.join(map(str, place))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def python_rng(seed: int, purpose: str, *place: int) -> random.Random:
    """Return a Python generator for that place."""
    return random.Random(draw_key(seed, purpose, *place))


def torch_rng(seed: int, purpose: str, *place: int) -> torch.Generator:
    """Return a CPU torch generator for that place; CPU, so that every device draws the same values."""
    import torch

    return torch.Generator().manual_seed(draw_key(seed, purpose, *place))
