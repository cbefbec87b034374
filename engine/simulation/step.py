"""One real training step on the meta device, or on real tensors, with everything that it keeps counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lorasmith.engine.adapters import Adapter
from lorasmith.engine.config import RunConfig
from lorasmith.engine.families import Conditioning, Family
from lorasmith.engine.memory.constants import MIB
from lorasmith.engine.objectives import NoisyBatch, build_objective, tell_family
from lorasmith.engine.simulation.card_kernels import Kernels, fused_kernels
from lorasmith.engine.simulation.live_bytes import LiveBytes

PROMPT_TOKENS = 256
"""Tokens of a prompt, where a family does not fill up prompts to one length: a long caption's."""


@dataclass(frozen=True)
class StepShape:
    """What goes through a step at once: pictures, and their sides in pixels."""

    pictures: int
    height: int
    width: int
    tokens: int = PROMPT_TOKENS

    @property
    def megapixels(self) -> float:
        """Millions of pixels in one picture."""
        return self.height * self.width / 1e6


@dataclass(frozen=True)
class StepPeak:
    """What a step was counted to take, beside weights, the adapter, its gradients and its optimizer.

    `peak_mib` is the most that lived at once, `kept_mib` what the forward pass kept for the backward pass. `kernels`
    are the kernels launched. Gradients, which a step of several micro-batches has from its first one on, are in none.
    """

    peak_mib: float
    kept_mib: float
    kernels: int


def simulate_step(
    family: Family, adapter: Adapter, config: RunConfig, shape: StepShape, kernels: Kernels = "card"
) -> StepPeak:
    """Count one micro-batch's forward pass, loss and backward pass as `Learner.batch_loss` does them.

    On the meta device, or on real tensors for a comparison. Checkpointing is whatever `family` was prepared for
    (`Prepared`). The adapter's gradients are afterwards as they were.
    """
    batch, prompts = _inputs(family, config, shape)
    adapter.train()
    with fused_kernels(kernels), LiveBytes(family.device, _free_tensors(family, adapter)) as tracker:
        with _gradients_apart(adapter, tracker):
            tracker.count(*_tensors_of(batch), *prompts.values())
            loss = _loss(family, config, batch, prompts)
            kept = tracker.live
            torch.autograd.backward(loss)
        return StepPeak(tracker.peak / MIB, kept / MIB, tracker.kernels)


def forward_tflop(family: Family, config: RunConfig, shape: StepShape) -> float:
    """Return the TFLOP of a micro-batch's way forward; a multiplication and an addition are two operations."""
    batch, prompts = _inputs(family, config, shape)
    # Apart from counting bytes: the counter keeps what it has seen.
    with torch.no_grad(), fused_kernels(), FlopCounterMode(display=False) as counter:
        _loss(family, config, batch, prompts)
    return float(counter.get_total_flops()) / 1e12


def _inputs(family: Family, config: RunConfig, shape: StepShape) -> tuple[NoisyBatch, Conditioning]:
    """Return what the loader and the cache of prompts give a step, with noise; no prompts where they are encoded."""
    tell_family(family, config.objective)
    objective = build_objective(family, config.objective, config.run.seed)
    side = family.spec.latent_downscale
    size = (shape.pictures, family.spec.latent_channels, shape.height // side, shape.width // side)
    latents = torch.zeros(size, device=family.device)
    batch = objective.prepare(latents, torch.ones(shape.pictures, device=family.device), 0, 0)
    if config.adapter.text_encoder:
        return batch, {}
    return batch, family.collate([family.blank_prompt(shape.tokens)] * shape.pictures)


def _loss(family: Family, config: RunConfig, batch: NoisyBatch, prompts: Conditioning) -> Tensor:
    """Return the loss () as `Learner.batch_loss` computes it."""
    if not prompts:
        prompts = family.collate(family.encode_prompts([""] * len(batch.noisy)))
    prediction = family.predict(batch.noisy.to(family.dtype), batch.timesteps, prompts)
    objective = build_objective(family, config.objective, config.run.seed)
    return objective.loss(prediction, batch)


def _tensors_of(batch: NoisyBatch) -> Iterator[Tensor]:
    yield from (value for value in vars(batch).values() if isinstance(value, Tensor))


def _free_tensors(family: Family, adapter: Adapter) -> Iterator[Tensor]:
    """Yield what is there before a step: the networks' weights and buffers, and the adapter's weights."""
    for network in (family.denoiser, *family.text_encoders.values()):
        yield from network.parameters()
        yield from network.buffers()
    for module in adapter.modules:
        yield from module.tensors.values()
        yield from (module.start or {}).values()


@contextmanager
def _gradients_apart(adapter: Adapter, tracker: LiveBytes) -> Iterator[None]:
    """Let gradients come in a step and count as nothing once they are there; puts back the former ones."""
    parameters = adapter.parameters()
    former = [parameter.grad for parameter in parameters]

    def set_aside(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracker.set_aside(parameter.grad)

    hooks = [
        parameter.register_post_accumulate_grad_hook(set_aside)  # type: ignore[no-untyped-call]
        for parameter in parameters
    ]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in zip(parameters, former, strict=True):
            parameter.grad = gradient
