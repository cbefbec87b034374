"""The proof of an exported LoRA: the file is opened again and read as other programs read it.

Three steps, each able to refuse the file:
1. every key is one that the family's readers know, none is missing, none is left over;
2. the weight changes, by the rules of ComfyUI and from nothing but the tensors, equal the trained ones;
3. diffusers loads the file into a copy of the base model without weights, says nothing, and ends with the same changes.

Changes are compared as the products that they are: a LoCon's changes written out take 3 GB for Stable Diffusion 1.5.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorasmith.engine.errors import ExportError

if TYPE_CHECKING:
    from lorasmith.engine.adapters import Adapter, AdapterModule
    from lorasmith.engine.families import Component, Family, FamilyModule

KOHYA, DIFFUSERS = "kohya", "diffusers"
SUFFIXES = {KOHYA: (".lora_down.weight", ".lora_up.weight"), DIFFUSERS: (".lora_A.weight", ".lora_B.weight")}
"""Suffixes of the down (rank, in, …) and up (out, rank, …) matrices in each layout."""
ALPHA = ".alpha"
TOLERANCE = 1e-3
BF16_TOLERANCE = 8e-3
"""bf16 keeps 8 bits: each of the two matrices is off by up to 2**-9, more than TOLERANCE."""
_LIBRARIES = ("diffusers", "transformers", "peft")


@dataclass(frozen=True)
class Change:
    """A weight change as a product: scale × up (out, rank, …) @ down (rank, in, …)."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that is changed."""
        return (self.up.shape[0], *self.down.shape[1:])

    def written_out(self) -> torch.Tensor:
        """Return the change in fp32, in the shape of the weight."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1)).reshape(self.shape)

    def distance(self, other: Change | None = None) -> float:
        """Return the Frobenius norm of this change less the other.

        ‖U D‖² = tr(UᵀU · DDᵀ), with both changes side by side in U and D; in 64 bits, where cancellation costs nothing.
        """
        changes = [(self, 1.0)] + ([(other, -1.0)] if other is not None else [])
        up = torch.cat([sign * change.scale * change.up.flatten(1).double() for change, sign in changes], dim=1)
        down = torch.cat([change.down.flatten(1).double() for change, _ in changes])
        # A clamp keeps NaN, which max() would not.
        return float(torch.sum((up.T @ up) * (down @ down.T)).clamp(min=0).sqrt())


@dataclass(frozen=True)
class Proof:
    """What was proved: the number of keys, and the modules (`component:path`) whose weight change is zero."""

    keys: int
    unchanged: tuple[str, ...]


def verify_export(path: Path, layout: str, family: Family, adapter: Adapter, *, allow_untrained: bool = False) -> int:
    """Prove that the file at `path` holds `adapter` in `layout`, and return the number of its keys.

    Raises ExportError that names the key or module, also for an adapter that changes nothing unless
    `allow_untrained`. The file is left as it is.
    """
    return prove(path, layout, family, adapter, allow_untrained=allow_untrained).keys


def prove(path: Path, layout: str, family: Family, adapter: Adapter, *, allow_untrained: bool = False) -> Proof:
    """Do the three steps of the module's docstring; see `verify_export`."""
    tensors = _read(path)
    names = module_names(family, adapter, layout)
    _check_keys(path, tensors, layout, names, known_names(family, layout))
    tolerance = BF16_TOLERANCE if any(t.dtype == torch.bfloat16 for t in tensors.values()) else TOLERANCE
    rebuilt = read_changes(tensors)
    loaded = _load_with_diffusers(path, family, names)
    unchanged = []
    for name, module in names.items():
        trained = Change(module.down.detach().cpu(), module.up.detach().cpu(), module.scale)
        size = trained.distance()
        _check_change(path, name, trained, size, rebuilt[name], "ComfyUI's rules give", tolerance)
        _check_change(path, name, trained, size, loaded[name], "diffusers loads", tolerance)
        if size == 0:
            unchanged.append(f"{module.component}:{module.path}")
    if len(unchanged) == len(names) and not allow_untrained:
        raise ExportError(
            f"{path.name} would change nothing: all {len(names)} modules are as they were before training.",
            why="Every up matrix is still zero.",
            fix="Train for more steps, or raise optimizer.learning_rate.",
        )
    return Proof(len(tensors), tuple(unchanged))


def module_names(family: Family, adapter: Adapter, layout: str) -> dict[str, AdapterModule]:
    """Return the trained modules by their name in `layout`; raises ExportError where two share a name."""
    export_name = family_module(family).export_name
    names = {str(export_name(layout, module.component, module.path)): module for module in adapter.modules}
    if len(names) != len(adapter.modules):
        raise ExportError(f"Two modules have the same name in the {layout} layout.", why="The key map is wrong.")
    return names


def known_names(family: Family, layout: str) -> set[str]:
    """Return the name in `layout` of every linear and convolution layer of the parts that are in memory."""
    export_name = family_module(family).export_name
    components = {"denoiser": family.denoiser, **family.text_encoders}
    return {
        str(export_name(layout, component, path))
        for component, module in components.items()
        for path in adaptable_modules(module)
    }


def adaptable_modules(module: torch.nn.Module) -> Iterator[str]:
    """Yield the dotted path of each linear and convolution layer, adapted or not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: tuple[str, ...] = ()
    for path, child in module.named_modules():
        if isinstance(child, BaseTunerLayer):
            inside += (f"{path}.",)
            yield path
        elif isinstance(child, torch.nn.Linear | torch.nn.Conv2d) and not path.startswith(inside):
            yield path


def family_module(family: Family) -> FamilyModule:
    """Return the module that a loaded family belongs to."""
    from lorasmith.engine.families import families

    return families()[family.spec.name]


def read_changes(tensors: dict[str, torch.Tensor]) -> dict[str, Change]:
    """Return each module's weight change as ComfyUI reads it: times alpha / rank where `.alpha` is, else times 1.

    Knows nothing of families and headers (comfy/weight_adapter/lora.py).
    """
    changes = {}
    for down_suffix, up_suffix in SUFFIXES.values():
        for key in [key for key in tensors if key.endswith(up_suffix)]:
            name = key.removesuffix(up_suffix)
            down, alpha = tensors[name + down_suffix], tensors.get(name + ALPHA)
            changes[name] = Change(down, tensors[key], 1.0 if alpha is None else float(alpha) / down.shape[0])
    return changes


def _read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is what torch raises where it opens the file
        raise ExportError(f"Cannot read {path.name} again.", why=str(error), fix="Check the disk.") from error


def _check_keys(path: Path, tensors: dict[str, torch.Tensor], layout: str, names: Any, known: set[str]) -> None:
    suffixes = (*SUFFIXES[layout], *([ALPHA] if layout == KOHYA else []))
    unknown_modules = sorted(set(names) - known)
    if unknown_modules:
        raise ExportError(f"{path.name}: {unknown_modules[0]} is no name that this base model's readers know.")
    expected = {name + suffix for name in names for suffix in suffixes}
    left_over, missing = sorted(set(tensors) - expected), sorted(expected - set(tensors))
    if left_over:
        raise ExportError(
            f"{path.name} has the unknown key {left_over[0]} ({len(left_over)} in all).",
            why=f"{missing[0]} is missing." if missing else "No trained module has that name.",
        )
    if missing:
        raise ExportError(f"{path.name} lacks the key {missing[0]} ({len(missing)} in all).")


def _check_change(
    path: Path, name: str, trained: Change, size: float, found: Change, reader: str, tolerance: float
) -> None:
    if trained.shape != found.shape:
        raise ExportError(f"{path.name}: {name} has shape {found.shape}, trained {trained.shape}.")
    gap = trained.distance(found)
    error = gap / size if size else (math.inf if gap else 0.0)
    # Written so that NaN fails too.
    if not error <= tolerance:
        raise ExportError(
            f"{path.name}: {reader} another weight change for {name} than was trained.",
            why=f"They differ by {error:.2g} of its size; {tolerance:.0e} is allowed.",
            fix="Set export.precision to fp32; if that does not help, please report it.",
        )


def _load_with_diffusers(path: Path, family: Family, names: dict[str, AdapterModule]) -> dict[str, Change]:
    components = {"denoiser": family.denoiser, **family.text_encoders}
    used = dict.fromkeys(module.component for module in names.values())
    copies: dict[Component, torch.nn.Module] = {name: _without_weights(components[name]) for name in used}
    with _complaints() as complaints:
        try:
            # Loading into nothing first: at their first use the libraries complain of what is not installed, which says
            # nothing about this file.
            family_module(family).load_lora(path, {})
            complaints.clear()
            family_module(family).load_lora(path, copies)
        except Exception as error:  # any failure of a reader is the answer that the proof looks for
            raise ExportError(f"diffusers cannot load {path.name}.", why=f"{type(error).__name__}: {error}") from error
    if complaints:
        raise ExportError(f"diffusers loads {path.name} with a warning.", why=complaints[0])
    found = {(name, layer): change for name, copy in copies.items() for layer, change in _loaded_changes(copy)}
    expected = {(module.component, module.path): name for name, module in names.items()}
    if set(found) != set(expected):
        component, layer = sorted(set(found) ^ set(expected))[0]
        raise ExportError(f"diffusers loads {path.name} into other modules than were trained: {component}:{layer}.")
    return {name: found[place] for place, name in expected.items()}


def _loaded_changes(module: torch.nn.Module) -> Iterator[tuple[str, Change]]:
    from peft.tuners.lora import LoraLayer

    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            for name, down in layer.lora_A.items():
                yield path, Change(down.weight.detach(), layer.lora_B[name].weight.detach(), layer.scaling[name])


def _without_weights(module: Any) -> torch.nn.Module:
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
