"""A machine that is short of memory: the networks of the tiny model refuse what would be too large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.engine.block_checkpointing import is_checkpointed

GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.12 GiB is free."
)
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"  # noqa: E501
ERRORS: dict[str, Callable[[], BaseException]] = {
    "gpu": lambda: torch.OutOfMemoryError(GPU),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "processor": lambda: RuntimeError(CPU),
    "python": MemoryError,
}


class Shortage:
    """Counts how often memory ran out; `kind` is one of `ERRORS`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str = "gpu") -> None:
        self._monkeypatch = monkeypatch
        self.kind = kind
        self.times = 0

    def refuse(self, owner: Any, name: str, too_large: Callable[..., bool]) -> Shortage:
        """Let `owner.name` run out of memory in every call for which `too_large`, with its arguments, says so."""
        original = getattr(owner, name)

        def limited(*arguments: Any, **named: Any) -> Any:
            if too_large(*arguments, **named):
                self.fail()
            return original(*arguments, **named)

        self._monkeypatch.setattr(owner, name, limited)
        return self

    def refuse_first(self, owner: Any, name: str, times: int) -> Shortage:
        """Let the first `times` calls of `owner.name` run out of memory."""
        left = iter(range(times))
        return self.refuse(owner, name, lambda *_, **__: next(left, None) is not None)

    def fail(self) -> None:
        self.times += 1
        raise ERRORS[self.kind]()

    def steps(self, *, most: int = 99, checkpointed: bool = False, backward: bool = False) -> Shortage:
        """Let training steps take `most` pictures at once, and none where checkpointing is wanted but off."""
        from diffusers import UNet2DConditionModel

        def too_large(unet: Any, noisy: torch.Tensor, *_: Any, **__: Any) -> bool:
            if not torch.is_grad_enabled():
                return False
            return len(noisy) > most or (checkpointed and not any(is_checkpointed(block) for block in unet.modules()))

        if not backward:
            return self.refuse(UNet2DConditionModel, "forward", too_large)
        original = UNet2DConditionModel.forward

        def spoilt(unet: Any, noisy: torch.Tensor, *rest: Any, **named: Any) -> Any:
            (prediction,) = original(unet, noisy, *rest, **named)
            if too_large(unet, noisy):
                prediction.register_hook(lambda _: self.fail())
            return (prediction,)

        self._monkeypatch.setattr(UNet2DConditionModel, "forward", spoilt)
        return self

    def drawing(self, most: int) -> Shortage:
        """Let previews take `most` pictures at once; guidance doubles them in the network."""
        from diffusers import UNet2DConditionModel

        return self.refuse(
            UNet2DConditionModel,
            "forward",
            lambda _, noisy, *__, **___: not torch.is_grad_enabled() and len(noisy) > 2 * most,
        )

    def image_encoder(self, *, most: int = 99, pixels: int = 1 << 30) -> Shortage:
        from diffusers.models.autoencoders.vae import Encoder

        return self.refuse(Encoder, "forward", lambda _, x: len(x) > most or x.shape[-1] * x.shape[-2] > pixels)

    def image_decoder(self, latents: int) -> Shortage:
        from diffusers.models.autoencoders.vae import Decoder

        return self.refuse(Decoder, "forward", lambda _, x, *__: x.shape[-1] * x.shape[-2] > latents)

    def text_encoder(self, most: int) -> Shortage:
        from transformers import CLIPTextModel

        return self.refuse(CLIPTextModel, "forward", lambda _, ids, *__, **___: len(ids) > most)


class FailAt(TorchDispatchMode):
    """Runs out of memory instead of doing torch's `at`-th operation inside, counted from 1; 0 only counts."""

    def __init__(self, at: int = 0, kind: str = "gpu") -> None:
        super().__init__()
        self.at, self.kind, self.count = at, kind, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise ERRORS[self.kind]()
        return func(*args, **(kwargs or {}))
