"""Keeping what the base model does with prompts that are not about what is learnt.

Differential output preservation and blank-prompt preservation, as ai-toolkit introduced them (`SDTrainer`,
`diff_output_preservation` and `blank_prompt_preservation`): beside the picture's own loss, the prediction with the LoRA
for another prompt, on the very same noisy latents, is pulled to the prediction of the base model without it. The other
prompt has the class ("woman") in the trigger's place, or is empty. So the LoRA learns what the trigger adds to the
class, and not the class anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lorasmith.engine.adapters import Adapter
from lorasmith.engine.families import Conditioning, Family
from lorasmith.engine.objectives.losses import NoisyBatch


def chosen_pictures(batch: NoisyBatch, chosen: Sequence[int]) -> NoisyBatch:
    """Return the batch with those of its pictures alone; nothing is copied where that is all of them."""
    if len(chosen) == len(batch.timesteps):
        return batch
    # Views of single pictures instead of an index tensor, which a GPU would be waited for.
    noisy = torch.stack([batch.noisy[place] for place in chosen])
    timesteps = torch.stack([batch.timesteps[place] for place in chosen])
    return dataclasses.replace(batch, noisy=noisy, timesteps=timesteps)


@contextmanager
def base_alone(adapter: Adapter) -> Iterator[None]:
    """Let the base model work without its adapter and without gradients inside."""
    adapter.set_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        adapter.set_enabled(True)


def preservation_loss(
    family: Family, adapter: Adapter, batch: NoisyBatch, conditionings: Sequence[Conditioning]
) -> Tensor:
    """Return the mean squared difference () that the adapter makes for these prompts, one a picture, in fp32.

    Of the batch only noisy latents (B, C, h, w) and timesteps count. The base model's prediction comes first, so that
    its memory is free again when that of the gradients is needed.
    """
    noisy, conditioning = batch.noisy.to(family.dtype), family.collate(conditionings)
    with base_alone(adapter):
        target = family.predict(noisy, batch.timesteps, conditioning).float()
    prediction = family.predict(noisy, batch.timesteps, conditioning)
    return (prediction.float() - target).square().mean()
