"""One optimizer step: the part of training that runs thousands of times, and nothing else.

Nothing here waits for the device: losses and gradient norms come back as tensors on it, and whoever wants numbers reads
many at once. No events, no files and no commands, so that a benchmark or a test can call `run_step` by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorasmith.engine.adapters import Adapter
from lorasmith.engine.block_checkpointing import CheckpointedBlocks, checkpoint_blocks
from lorasmith.engine.compute import build_scaler
from lorasmith.engine.config import RunConfig
from lorasmith.engine.dataset.loader import Batch, Loader
from lorasmith.engine.dataset.prefetch import Prefetcher
from lorasmith.engine.draws import draw_key
from lorasmith.engine.ema import WeightAverage
from lorasmith.engine.errors import ConfigError
from lorasmith.engine.families import Conditioning, Family
from lorasmith.engine.holdout import HeldOut
from lorasmith.engine.lr_schedules import lr_factor
from lorasmith.engine.objectives import NoisyBatch, Objective, build_objective, tell_family
from lorasmith.engine.objectives.preservation import chosen_pictures, preservation_loss
from lorasmith.engine.optimizers import (
    SCHEDULE_FREE,
    FusedBackward,
    ScheduleFreeAverage,
    build_optimizer,
    effective_rate,
    load_optimizer,
    optimizer_tensors,
    set_learning_rates,
)
from lorasmith.engine.step_guard import StepGuard, spoil

TensorGroups = dict[str, dict[str, Tensor]]


@dataclass
class Learner:
    """Everything that a step needs.

    `conditionings` holds cached prompts; None where the text encoder stays in memory and encodes them as they come:
    because it is trained, or because there are too many. `average` is there where `train.ema_decay` or the optimizer
    averages weights, `fused` where `optimizer.fused_backward` asks for it.
    `memory` is JSON-ready and part of the state: the rungs of the memory ladder that were taken (`Rungs.shared`).
    """

    family: Family
    adapter: Adapter
    objective: Objective
    optimizer: Optimizer
    loader: Loader
    conditionings: Mapping[str, Conditioning] | None
    config: RunConfig
    scaler: torch.amp.GradScaler | None
    average: WeightAverage | ScheduleFreeAverage | None = None
    fused: FusedBackward | None = None
    held_out: HeldOut | None = None
    """The pictures to validate on, encoded; None where the run does not validate."""
    memory: dict[str, Any] = field(default_factory=dict)
    pictures_at_once: int = 0
    """Pictures of a micro-batch that take memory together; 0: all of it."""
    checkpointed: CheckpointedBlocks | None = None
    """The blocks that are computed again in the backward pass; None: the settings ask for none."""
    before_update: Callable[[], None] | None = None
    """Called in each step when its gradients are there and nothing is changed yet; what it raises ends the step."""

    def __post_init__(self) -> None:
        """Guard the steps, and take the batches from threads where the settings ask for it."""
        train = self.config.train
        self.guard = StepGuard(self.optimizer, self.config.optimizer.name, self.family.device, train.not_finite)
        end = train.steps * train.gradient_accumulation
        pin = self.family.device.type != "cpu"
        self.batches = Prefetcher(self.loader, train.loader_workers, end=end, pin=pin)

    def run_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Do the optimizer step that follows `step` finished ones.

        Returns the loss (mean over micro-batches) and the gradient norm before clipping, both still on the device.
        Where one of them is no number, the step changes nothing: neither weights nor optimizer nor average.
        """
        self.set_rates(step)
        num_micro = self.config.train.gradient_accumulation
        losses = []
        for part in range(num_micro):
            batch = self.batches.batch(step * num_micro + part)
            losses.append(self._add_gradients(batch, step, part))
        loss = losses[0] if num_micro == 1 else torch.stack(losses).mean()
        return loss, self._update(step, loss)

    def _add_gradients(self, batch: Batch, step: int, part: int) -> Tensor:
        """Add the gradients of a micro-batch, taken at once or in pieces with the same mean; return its loss."""
        train, num = self.config.train, len(batch.indices)
        at_once = self.pictures_at_once or num
        losses = []
        for start in range(0, num, at_once):
            piece = batch if at_once >= num else batch.pictures(start, start + at_once)
            if self.adapter.dropouts:
                place = (step, part, start) if start else (step, part)
                torch.manual_seed(draw_key(self.config.run.seed, "dropout", *place))
            terms = self._terms(piece)
            for index, term in enumerate(terms):
                loss = term(piece, step, part * train.batch_size + start)
                if piece is not batch:
                    loss = loss * (len(piece.indices) / num)
                losses.append(loss.detach())
                last = start + at_once >= num and part == train.gradient_accumulation - 1 and index == len(terms) - 1
                if self.fused and last:
                    self.fused.arm(self.guard.judge(step, torch.stack(losses).sum()), self.before_update)
                scaled = loss / train.gradient_accumulation if train.gradient_accumulation > 1 else loss
                (self.scaler.scale(scaled) if self.scaler else scaled).backward()  # type: ignore[no-untyped-call]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def set_rates(self, step: int) -> None:
        """Set the learning rates of the step that follows `step` finished ones."""
        set_learning_rates(self.optimizer, lr_factor(self.config.schedule, step, self.config.train.steps))

    def _terms(self, piece: Batch) -> list[Callable[[Batch, int, int], Tensor]]:
        """Return the parts of the loss; each goes back through the network before the next, so memory holds one."""
        keeps = any(prompt is not None for prompt in piece.preserved)
        return [self.batch_loss, self.preservation_loss] if keeps else [self.batch_loss]

    def batch_loss(self, batch: Batch, step: int, first: int) -> Tensor:
        """Return the loss of one micro-batch; `first` is the place of its first picture among those of the step."""
        noisy = self._noisy(batch, step, first)
        conditioning = self.family.collate(self._conditionings(batch.captions))
        prediction = self.family.predict(noisy.noisy.to(self.family.dtype), noisy.timesteps, conditioning)
        return self.objective.loss(prediction, noisy)

    def preservation_loss(self, batch: Batch, step: int, first: int) -> Tensor:
        """Return what the prompts add whose effect is to stay the base model's, with the same noise as `batch_loss`.

        A mean over all pictures of the batch, of which those without such a prompt add nothing.
        """
        kept = {place: prompt for place, prompt in enumerate(batch.preserved) if prompt is not None}
        noisy = chosen_pictures(self._noisy(batch, step, first), list(kept))
        difference = preservation_loss(self.family, self.adapter, noisy, self._conditionings(list(kept.values())))
        return difference * (self.config.objective.preserve_weight * len(kept) / len(batch.captions))

    def _noisy(self, batch: Batch, step: int, first: int) -> NoisyBatch:
        device = self.family.device
        latents = batch.latents.to(device, torch.float32, non_blocking=True)
        weights = batch.weights.to(device, non_blocking=True)
        pixels = None if batch.pixel_weights is None else batch.pixel_weights.to(device, non_blocking=True)
        return self.objective.prepare(latents, weights, step, first, pixels)

    def state(self, *, copy: bool = True) -> tuple[TensorGroups, dict[str, Any]]:
        """Return what a resume needs: tensors on the CPU by the names of `group_names`, and a JSON-ready rest.

        Without `copy` the tensors are the very ones that are trained, where they are: write them before the next step.
        """
        self.guard.settle()
        tensors, rest = optimizer_tensors(self.optimizer, copy=copy)
        groups = {"adapter": self.adapter.state_dict(copy=copy), "optimizer": tensors}
        if self.average:
            with self.average.in_place():
                groups["ema"] = self.adapter.state_dict(copy=copy)
        scaler = self.scaler.state_dict() if self.scaler else None
        return groups, {"optimizer": rest, "scaler": scaler, "memory": dict(self.memory)}

    def group_names(self) -> tuple[str, ...]:
        """Return the names of the groups of tensors in `state`."""
        return ("adapter", "optimizer", "ema") if self.average else ("adapter", "optimizer")

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], rest: Mapping[str, Any]) -> None:
        """Continue from what `state` returned; raises CheckpointError where it belongs to another run.

        Checkpoints of older versions lack the newer parts of the rest.
        """
        self.adapter.load_state_dict(tensors["adapter"])
        if self.average:
            with self.average.in_place():
                self.adapter.load_state_dict(tensors["ema"])
        load_optimizer(self.optimizer, tensors["optimizer"], rest["optimizer"])
        if self.scaler and rest["scaler"]:
            self.scaler.load_state_dict(rest["scaler"])

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the adapter hold its averaged weights inside, for previews and export; nothing without an average.

        Afterwards it holds the raw ones again, bit for bit.
        """
        with self.average.in_place() if self.average else contextlib.nullcontext():
            yield

    def all_finite(self) -> bool:
        """Tell whether no weight, raw or averaged, is NaN or infinite; waits for the device."""
        if not self.adapter.all_finite():
            return False
        with self.averaged():
            return self.adapter.all_finite()

    def close(self) -> None:
        """End the threads that prepare batches."""
        self.batches.close()

    def learning_rate(self) -> float:
        """Return the rate of the last step's first parameter group."""
        return effective_rate(self.optimizer)

    def _conditionings(self, captions: list[str]) -> list[Conditioning]:
        if self.conditionings is None:
            with torch.set_grad_enabled(self.config.adapter.text_encoder):
                return self.family.encode_prompts(captions)
        return [self.conditionings[caption] for caption in captions]

    def _update(self, step: int, loss: Tensor) -> Tensor:
        """Clip, step and clear the gradients; returns their norm before clipping."""
        if self.fused:
            norm = self.fused.finish()
            # Judged once more: a gradient that is no number comes too late to be left out, but it counts.
            self._follow(step, self.guard.judge(step, loss + norm))
            return norm
        parameters = self.adapter.parameters()
        if self.before_update:
            self.before_update()
        if self.scaler:
            # It meets infinite gradients on purpose and leaves their steps out by itself; a loss is another matter.
            left_out = self.guard.judge(step, loss)
            spoil(parameters, left_out)
            self.scaler.unscale_(self.optimizer)
        limit = self.config.optimizer.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            left_out = self.guard.judge(step, loss + norm)
            self.guard.apply(left_out)
        self._follow(step, left_out)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _follow(self, step: int, left_out: Tensor) -> None:
        """Do what follows each update of the weights."""
        self.adapter.after_step()
        if self.average:
            self.average.update(step, left_out)


def build_learner(
    family: Family,
    adapter: Adapter,
    loader: Loader,
    conditionings: Mapping[str, Conditioning] | None,
    config: RunConfig,
) -> Learner:
    """Put together the objective, optimizer and scaler that `config` asks for; dropout is switched on."""
    tell_family(family, config.objective)
    checkpointed = enable_checkpointing(family, config) if config.train.gradient_checkpointing else None
    adapter.train()
    scaler = build_scaler(family.device, family.dtype)
    if scaler and config.optimizer.fused_backward:
        raise ConfigError(
            "optimizer.fused_backward cannot be used here: this device computes in fp16.",
            why="fp16 needs all gradients at once, to tell which of them overflowed.",
            fix="Set train.precision to fp32, or optimizer.fused_backward to false.",
        )
    optimizer = build_optimizer(adapter, config.optimizer, config.adapter)
    return Learner(
        family=family,
        adapter=adapter,
        objective=build_objective(family, config.objective, config.run.seed),
        optimizer=optimizer,
        loader=loader,
        conditionings=conditionings,
        config=config,
        scaler=scaler,
        average=_build_average(optimizer, adapter, config),
        fused=FusedBackward(optimizer, adapter.parameters()) if config.optimizer.fused_backward else None,
        checkpointed=checkpointed,
    )


def _build_average(
    optimizer: Optimizer, adapter: Adapter, config: RunConfig
) -> WeightAverage | ScheduleFreeAverage | None:
    if config.optimizer.name in SCHEDULE_FREE:
        return ScheduleFreeAverage(optimizer, adapter.parameters())
    decay = config.train.ema_decay
    return WeightAverage(adapter.parameters(), decay) if decay else None


def enable_checkpointing(family: Family, config: RunConfig) -> CheckpointedBlocks:
    """Keep only some activations of the trained networks, and compute the others again in the backward pass."""
    checkpointed = checkpoint_blocks(family, config.memory.checkpoint_share, config.memory.offload_activations)
    if config.adapter.text_encoder:
        for encoder in family.text_encoders.values():
            encoder_any: Any = encoder
            encoder_any.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # transformers checkpoints in train mode only; these encoders have no dropout of their own.
            encoder.train()
    return checkpointed
