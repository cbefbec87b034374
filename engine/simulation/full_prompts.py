"""What text encoders take for prompts of their full length, without tokenizers and without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.engine.families import Component, Family
from lorasmith.engine.memory.constants import MIB
from lorasmith.engine.simulation.card_kernels import fused_kernels
from lorasmith.engine.simulation.live_bytes import LiveBytes

TEMPLATE = "a prompt as long as it may be"


class FullLength:
    """Stands for any tokenizer: every prompt fills the length that is asked for, and all its tokens are the same."""

    chat_template = "{{ messages }}"
    eos_token = pad_token = bos_token = ""
    padding_side = "right"

    def __init__(self, limit: int) -> None:
        self.model_max_length = limit

    def __call__(self, prompts: Any, **options: Any) -> Any:
        """Return ids and a mask as tokenizers do: tensors where `return_tensors` is given, else lists.

        A text that is no list of prompts and has no length is the end of a template, a token long.
        """
        from transformers import BatchEncoding

        whole = options.get("max_length") or (self.model_max_length if isinstance(prompts, list) else 1)
        row = [1] * int(whole)
        if not isinstance(prompts, list) and not options.get("return_tensors"):
            return BatchEncoding({"input_ids": row, "attention_mask": row})
        rows = [row] * (len(prompts) if isinstance(prompts, list) else 1)
        tensors = "pt" if options.get("return_tensors") else None
        return BatchEncoding({"input_ids": rows, "attention_mask": rows}, tensor_type=tensors)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        """Return the words of a conversation, or its tokens where they are asked for."""
        if not options.get("tokenize", True):
            return TEMPLATE
        return self([TEMPLATE] * len(messages), **options)


class _MeasuredError(Exception):
    """Every text encoder has run; what is made of its results is not counted."""


def text_encoder_work(family: Family, prompts: int) -> dict[Component, float]:
    """Return the MiB that each text encoder of a skeleton takes while it reads `prompts` full prompts at once."""
    found: dict[Component, float] = {}
    encoders = dict(family.text_encoders)
    stand_in: Any = family
    stand_in.tokenizers = [FullLength(_limit(encoder, family)) for encoder in encoders.values()]
    free: list[Tensor] = [tensor for encoder in encoders.values() for tensor in _held(encoder)]
    with torch.no_grad(), fused_kernels(), LiveBytes(family.device, free) as tracker:
        hooks = [_watch(name, encoder, tracker, found, len(encoders)) for name, encoder in encoders.items()]
        try:
            family.encode_prompts([TEMPLATE] * prompts)
        except _MeasuredError:
            pass
        finally:
            for pair in hooks:
                for hook in pair:
                    hook.remove()
            stand_in.tokenizers = []
    return found


def _watch(name: Component, encoder: nn.Module, tracker: LiveBytes, found: dict[Component, float], count: int) -> Any:
    before = 0

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal before
        before = tracker.peak = tracker.live

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        found[name] = (tracker.peak - before) / MIB
        if len(found) == count:
            raise _MeasuredError

    return encoder.register_forward_pre_hook(enter), encoder.register_forward_hook(leave)


def _held(encoder: nn.Module) -> Sequence[Tensor]:
    return [*encoder.parameters(), *encoder.buffers()]


def _limit(encoder: Any, family: Family) -> int:
    """Return how many tokens a tokenizer without a word from its caller fills: CLIP's places, or the family's limit."""
    places = int(getattr(encoder.config, "max_position_embeddings", 0) or family.spec.token_limit)
    return min(places, family.spec.token_limit)
