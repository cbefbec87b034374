"""The second reader of an exported LoRA: diffusers' own loader, into a copy of the base model without weights."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorasmith.engine.errors import ExportError
from lorasmith.engine.export.changes import AnyChange, Change, WholeChange, base_weight
from lorasmith.engine.export.layouts import family_module, family_parts, layer_of
from lorasmith.engine.export.rules import Stored, change_of
from lorasmith.engine.inspect_file import names as spelled

if TYPE_CHECKING:
    from lorasmith.engine.families import Component, Family

_LIBRARIES = ("diffusers", "transformers", "peft")
Place = tuple["Component", str]
"""Component and dotted path of a layer."""


def load_with_diffusers(path: Path, family: Family, components: set[Component]) -> dict[Place, AnyChange]:
    """Return the weight change of each layer that diffusers loads the file into.

    Raises ExportError where it fails, or says a word of warning: both mean a LoRA that works in part at best.
    """
    roots = family_parts(family)
    copies: dict[Component, torch.nn.Module] = {name: without_weights(roots[name]) for name in sorted(components)}
    with _complaints() as complaints:
        try:
            # Loading into nothing first: at their first use the libraries complain of what is not installed, which says
            # nothing about this file.
            with contextlib.suppress(Exception):
                family_module(family).load_lora(path, {})
            complaints.clear()
            family_module(family).load_lora(path, copies)
        except Exception as error:  # any failure of a reader is the answer that the proof looks for
            raise ExportError(f"diffusers cannot load {path.name}.", why=f"{type(error).__name__}: {error}") from error
    if complaints:
        raise ExportError(f"diffusers loads {path.name} with a warning.", why=complaints[0])
    return {
        (name, layer): change for name, copy in copies.items() for layer, change in _loaded_changes(family, name, copy)
    }


def _loaded_changes(family: Family, component: Component, copy: torch.nn.Module) -> Iterator[tuple[str, AnyChange]]:
    from peft.tuners.lokr import LoKrLayer
    from peft.tuners.lora import LoraLayer

    for path, layer in copy.named_modules():
        if isinstance(layer, LoraLayer):
            for name, down in layer.lora_A.items():
                up, strength = layer.lora_B[name].weight.detach(), layer.scaling[name]
                if layer.use_dora.get(name):
                    yield path, _stretched(family, component, path, layer, name)
                else:
                    yield path, Change(down.weight.detach(), up, strength)
        elif isinstance(layer, LoKrLayer):
            for name in layer._available_adapters:
                yield path, WholeChange(layer.get_delta_weight(name).detach())


def _stretched(family: Family, component: Component, path: str, layer: Any, name: str) -> AnyChange:
    """Return what a loaded DoRA does to the real weight, which the copy does not have."""
    tensors = {
        spelled.DOWN: layer.lora_A[name].weight.detach(),
        spelled.UP: layer.lora_B[name].weight.detach() * layer.scaling[name],
        spelled.MAGNITUDE: layer.lora_magnitude_vector[name].weight.detach(),
    }
    return change_of(Stored(path, tensors), base_weight(layer_of(family, component, path)))


def without_weights(module: Any) -> torch.nn.Module:
    """Return a new module of the same configuration whose weights are one zero each, seen in the full shape.

    Meta tensors would do, but diffusers moves the LoRA to the device of the weights.
    """
    with torch.device("meta"):
        kind = type(module)
        copy: torch.nn.Module = kind.from_config(module.config) if hasattr(kind, "from_config") else kind(module.config)
    for child in copy.modules():
        for name, weight in child._parameters.items():
            if weight is not None:
                zero = torch.zeros((), dtype=torch.float32).expand(weight.shape)
                child._parameters[name] = torch.nn.Parameter(zero, requires_grad=False)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return copy


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """Collect, instead of printing, what the libraries warn about in this thread."""
    collected: list[str] = []
    thread = threading.get_ident()

    class _Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                collected.append(record.getMessage())

    def show(message: Warning | str, *rest: Any, **named: Any) -> None:
        if threading.get_ident() == thread:
            collected.append(str(message))

    collector = _Collector(logging.WARNING)
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = show
        for logger in loggers:
            logger.handlers, logger.propagate = [collector], False
            logger.setLevel(logging.WARNING)
        try:
            yield collected
        finally:
            for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
                logger.setLevel(level)
