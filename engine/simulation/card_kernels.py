"""Operations for which a card has one fused kernel and the meta device has none: the same outputs, kept alike.

On meta tensors torch writes attention, RMS norm and dropout out in many operations, which would count a score matrix of
tokens x tokens that no card ever makes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

Kernels = Literal["card", "processor"]
"""Whose kernels a simulation stands for."""
_HALF = (torch.float16, torch.bfloat16)
_FLASH_HEAD, _FLASH_ALIGNMENT, _MASK_ALIGNMENT = 256, 8, 16
"""The widest head of the flash kernel, and what its heads and the efficient kernel's masks are padded to (torch's
aten/src/ATen/native/transformers/attention.cpp and sdp_utils.cpp)."""
_ONE_AT_A_TIME = threading.RLock()
"""What an operation means on the meta device is the process's own."""


@contextmanager
def fused_kernels(kernels: Kernels = "card") -> Iterator[None]:
    """Let meta tensors keep what the fused kernels of a card, or those of a processor, would keep.

    Attention keeps its inputs, its output and the log-sum-exp of each row: flash without a mask in 16 bits, else the
    memory-efficient kernel, as torch chooses on a card. Real tensors are left alone, in other threads too. Masks on the
    meta device have no values: where a model counts the tokens of a mask, all of them count.
    """
    # Not a TorchFunctionMode: autograd runs checkpointed blocks once more without it.
    with _ONE_AT_A_TIME, FullMasks():
        library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        try:
            for name, kernel in _SUBSTITUTES[kernels].items():
                library.impl(name, kernel, "AutogradMeta")  # type: ignore[no-untyped-call]
            yield
        finally:
            library._destroy()  # type: ignore[no-untyped-call]


class FullMasks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what a model asks of a mask (B, tokens) on the meta device, which has no values.

    All of its tokens count; but where it asks whether something holds, as whether a mask may be left out, nothing does:
    masks of prompts that differ in length are needed, and take the most memory.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lengths: Any = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, or answer for it."""
        named = kwargs or {}
        if func is _ITEM and args[0].is_meta and args[0].dtype is torch.bool:
            return False
        if func is _COPY and args[0] in self._lengths and named.get("device") == torch.device("cpu"):
            return torch.full(args[0].shape, self._lengths[args[0]])
        result = func(*args, **named)
        if func is _SUM and args[0].is_meta and args[0].dim() == 2 and not args[0].is_floating_point():
            self._lengths[result] = args[0].shape[1]
        return result


_COPY, _ITEM = torch.ops.aten._to_copy.default, torch.ops.aten._local_scalar_dense.default
_SUM = torch.ops.aten.sum.dim_IntList


def _attend_on_card(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if attn_mask is None and query.dtype in _HALF and width <= _FLASH_HEAD:
        missing = -width % _FLASH_ALIGNMENT
        padded = [functional.pad(part, (0, missing)) if missing else part for part in (query, key, value)]
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        whole: Tensor = flash(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return whole[..., :width]
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    wants_gradients = any(part.requires_grad for part in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    result: Tensor = efficient(query, key, value, bias, wants_gradients, dropout_p, is_causal, scale=scale)[0]
    return result


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return what a mask adds to the scores, (B, heads, queries, keys), its rows aligned as the kernel wants them."""
    if mask.dtype is torch.bool:
        mask = torch.where(mask, 0.0, float("-inf")).to(query.dtype)
    count = key.shape[-2]
    if mask.shape[-1] == 1:
        mask = mask.expand(*mask.shape[:-1], count)
    if count % _MASK_ALIGNMENT:
        mask = functional.pad(mask, (0, -count % _MASK_ALIGNMENT))[..., :count]
    return mask.expand(*query.shape[:-1], count)


def _attend_on_processor(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    # The card's kernel keeps its input and one number a row, layer norm two: the nearest that the meta device has.
    return functional.layer_norm(input, list(normalized_shape), weight, None, 1e-6 if eps is None else eps)


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    # The card keeps a byte of mask a number; other devices, whose way the meta device goes, a number.
    dropped: Tensor = torch.ops.aten.native_dropout(input, p, True)[0] if train and 0.0 < p < 1.0 else input.clone()
    return dropped


_SUBSTITUTES: Mapping[Kernels, Mapping[str, Callable[..., Tensor]]] = {
    "card": {"scaled_dot_product_attention": _attend_on_card, "rms_norm": _rms_norm, "dropout": _dropout},
    "processor": {"scaled_dot_product_attention": _attend_on_processor},
}
