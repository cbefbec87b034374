"""How large the cache of a run becomes, from its buckets and the base model's sizes alone. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lorasmith.engine.dataset.buckets import BucketPlan, Sample
from lorasmith.engine.families import BaseIdentity, FamilySpec

ENTRY_BYTES = 200
"""What one file takes beside its numbers: the safetensors header with names, shapes, key and checksum."""
MAX_PROMPT_BYTES = 2 << 30
"""Prompts are kept in memory while training; where all of them would take more, they are encoded as they come."""
ENCODED_PIXELS = 1 << 20
"""Pixels of pictures that are encoded or drawn at once: as many as keep a card busy, and memory grows with them."""
ENCODED_TOKENS = 2048
"""The same for the tokens of prompts."""
PREVIEWS_AT_ONCE = 4
"""The most pictures that are drawn at once, however small."""
_MOST_AT_ONCE = 16


def forecast_cache(
    plan: BucketPlan, spec: FamilySpec, num_prompts: int, *, number_bytes: int = 2, prompt_numbers: int = 0
) -> int:
    """Return the bytes on disk of all latents, masks and prompts of a run.

    `number_bytes` is 4 in fp32, else 2; `prompt_numbers` (0: the family's) as `numbers_of_prompt` tells them.
    """
    prompts = num_prompts * prompt_bytes(prompt_numbers or spec.prompt_numbers, number_bytes)
    return latent_bytes(plan.samples, spec, number_bytes) + prompts


def latent_bytes(samples: Iterable[Sample], spec: FamilySpec, number_bytes: int) -> int:
    """Return the bytes of the entries of `samples`; what is the same in two of them is kept once."""
    entries = {(s.item.sha256, s.bucket, s.offset, s.flipped, s.item.mask_sha256): s for s in samples}
    total = 0
    for sample in entries.values():
        side = spec.latent_downscale
        places = (sample.bucket.width // side) * (sample.bucket.height // side)
        masked = sample.item.mask_path is not None or sample.item.transparent
        total += ENTRY_BYTES + places * (spec.latent_channels * number_bytes + masked)
    return total


def prompt_bytes(prompt_numbers: int, number_bytes: int) -> int:
    """Return the bytes of the entry of one prompt."""
    return ENTRY_BYTES + prompt_numbers * number_bytes


def max_prompts(prompt_numbers: int, number_bytes: int) -> int:
    """Return how many prompts `MAX_PROMPT_BYTES` hold."""
    return max(1, math.floor(MAX_PROMPT_BYTES / prompt_bytes(prompt_numbers, number_bytes)))


def numbers_of_prompt(spec: FamilySpec, identity: BaseIdentity | None) -> int:
    """Return how many numbers one prompt's embeddings have in this base model."""
    return int((identity.details.get("prompt_numbers") if identity else 0) or spec.prompt_numbers)


def pictures_at_once(pixels: float) -> int:
    """Return how many pictures of `pixels` each are encoded or drawn at once, at most."""
    return max(1, min(_MOST_AT_ONCE, int(ENCODED_PIXELS / pixels)))


def prompts_at_once(token_limit: int) -> int:
    """Return how many prompts of up to `token_limit` tokens are encoded at once, at most."""
    return max(1, min(_MOST_AT_ONCE, ENCODED_TOKENS // token_limit))
