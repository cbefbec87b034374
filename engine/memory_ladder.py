"""What a training does when memory runs out: the same work again with less, rung by rung, until it fits.

No picture is ever left out: a step is repeated with the same pictures, noise, timesteps and captions, and a micro-batch
in pieces has the loss and the gradient of the whole one, to rounding. LoRA dropout is drawn anew for each piece, by a
key of its place. What loads the base and encodes has its rungs in `run_setup`, `dataset.cache` and `previews`; how the
rungs are climbed down is in `out_of_memory`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorasmith.engine.block_checkpointing import denoiser_blocks
from lorasmith.engine.block_swap import BlockSwap, frozen_tensors, swap_blocks
from lorasmith.engine.config import RunConfig
from lorasmith.engine.errors import HardwareError
from lorasmith.engine.learner import TensorGroups, enable_checkpointing
from lorasmith.engine.out_of_memory import FREE_CACHE, Rung
from lorasmith.engine.parking import available_bytes
from lorasmith.engine.step_undo import StepUndo, prove_room, room_beside
from lorasmith.engine.tensor_file import OneByOne
from lorasmith.engine.training_parts import TrainingParts

SAVE_FIX = "Close other programs, or lower adapter.rank for a new run; then resume: the newest checkpoint is intact."


class MemoryLadder:
    """Runs the steps of one training; costs nothing but one small allocation a step until memory runs out."""

    def __init__(self, parts: TrainingParts) -> None:
        """Take again the rungs that a resumed run had taken."""
        self._parts = parts
        self._learner = parts.learner
        self._parameters = self._learner.adapter.parameters()
        self._room = room_beside(self._parameters)
        self._fix = _fix(self._learner.config)
        self._learner.memory = parts.rungs.shared
        self._learner.before_update = self._secure
        self._rungs = self._step_rungs()
        self._undo: StepUndo | None = None
        self._changing = False
        self._careful = True
        parts.rungs.retake("step", self._rungs)

    def run_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Do the step that follows `step` finished ones, as `Learner.run_step`, with less memory where it must be.

        Raises HardwareError in words when no rung is left.
        """
        result = self._parts.rungs.attempt(
            "step", lambda: self._learner.run_step(step), self._rungs, fix=self._fix, clean=self._clean
        )
        self._undo, self._changing, self._careful = None, False, False
        return result

    def _secure(self) -> None:
        """See to it that the change of weights that follows cannot stay half-done."""
        learner = self._learner
        prove_room(self._room, learner.family.device)
        if self._careful:
            shadow = learner.average.shadow if learner.average else ()
            self._undo = StepUndo(self._parameters, learner.optimizer, shadow)
        self._changing = True

    def _clean(self) -> None:
        """Clear what a failed step left: gradients, half-made changes, and a scaler that has seen the gradients."""
        learner, undo = self._learner, self._undo
        half_done = self._changing and undo is None
        self._undo, self._changing, self._careful = None, False, True
        if half_done:
            raise HardwareError(
                f"Memory ran out while step {self._parts.step + 1} changed the weights.",
                why="They are half changed and not saved; the checkpoints are intact.",
                fix="Resume the run: it goes on from its newest checkpoint. " + self._fix,
            )
        if undo is not None:
            undo.put_back()
        if learner.family.swapped is not None:
            learner.family.swapped.release()
        if learner.checkpointed is not None and learner.checkpointed.offloader is not None:
            learner.checkpointed.offloader.reset()
        if learner.fused:
            learner.fused.cancel()
        learner.guard.settle()
        learner.optimizer.zero_grad(set_to_none=True)
        if learner.scaler is not None:
            # It refuses to unscale twice before an update, which this step never reached.
            scaler: Any = learner.scaler
            scaler._per_optimizer_states.clear()

    def _step_rungs(self) -> list[Rung]:
        """Return the rungs of a step in their order: what costs nothing, then time, then most time."""
        learner, family = self._learner, self._learner.family
        rungs = [
            FREE_CACHE,
            Rung("apart", "encoders wait in main memory", lambda: family.save_memory("apart")),
            Rung("checkpointing", "gradient checkpointing is on for all blocks", self._checkpoint_all),
        ]
        size = learner.config.train.batch_size
        while size > 1:
            size = (size + 1) // 2
            rungs.append(self._split(size))
        words = "what checkpointed blocks keep waits in main memory"
        rungs.append(Rung("offload", words, self._offload))
        blocks = len(denoiser_blocks(family))
        rungs += [self._swap(count, blocks) for count in sorted({blocks // 4, blocks // 2, blocks} - {0})]
        return rungs

    def _split(self, size: int) -> Rung:
        def take() -> bool:
            self._learner.pictures_at_once = size
            return True

        words = f"{size} pictures are" if size > 1 else "one picture is"
        whole = self._learner.config.train.batch_size
        return Rung(f"pictures {size}", f"{words} taken at a time instead of {whole}, with the same result", take)

    def _checkpoint_all(self) -> bool:
        before = self._learner.checkpointed
        if before is not None and len(before.names) == before.total:
            return False
        self._checkpoint(offload=before is not None and before.offloader is not None)
        return True

    def _offload(self) -> bool:
        before = self._learner.checkpointed
        if not has_own_memory(self._learner.family.device) or (before is not None and before.offloader is not None):
            return False
        self._checkpoint(offload=True)
        return True

    def _checkpoint(self, *, offload: bool) -> None:
        memory = self._learner.config.memory.model_copy(
            update={"checkpoint_share": 1.0, "offload_activations": offload}
        )
        config = self._learner.config.model_copy(update={"memory": memory})
        self._learner.checkpointed = enable_checkpointing(self._learner.family, config)

    def _swap(self, count: int, blocks: int) -> Rung:
        family = self._learner.family

        def take() -> bool:
            swapped = family.swapped.blocks if isinstance(family.swapped, BlockSwap) else []
            if not has_own_memory(family.device) or len(swapped) >= count:
                return False
            room = sum(tensor.nbytes for _, block in denoiser_blocks(family) for tensor in frozen_tensors(block))
            if room * count / blocks > available_bytes():
                return False
            swap_blocks(family, count)
            return True

        return Rung(f"swap {count}", f"the weights of {count} of {blocks} blocks wait in main memory", take)


def has_own_memory(device: torch.device) -> bool:
    """Tell whether what is moved to main memory leaves the device's memory."""
    return device.type != "cpu"


def _fix(config: RunConfig) -> str:
    return (
        f"Lower dataset.resolution (now {config.dataset.resolution}) or adapter.rank (now {config.adapter.rank}), or "
        "set memory.quantize to fp8 or nf4, in a new run. Or close other programs that use this memory, then resume."
    )


def state_to_save(parts: TrainingParts) -> tuple[TensorGroups, dict[str, Any]]:
    """Return `Learner.state`; without copies in main memory once they did not fit."""
    copy = not parts.rungs.taken("save")
    groups, rest = parts.learner.state(copy=copy)
    return (groups if copy else {name: OneByOne(group) for name, group in groups.items()}), rest


def save_rungs() -> list[Rung]:
    """Return the rungs of a save in their order."""
    words = "the state is written tensor by tensor instead of copied as a whole"
    return [FREE_CACHE, Rung("one by one", words, lambda: True)]
