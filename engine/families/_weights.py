"""Weights from single `.safetensors` files: finding the one that holds a part, reading it, and filling a module.

Files come as people have them: all parts in one (original layout), one part each (ComfyUI's split files), in fp8 with
or without scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.engine.errors import BaseModelError
from lorasmith.engine.families._loading import builds_skeletons, first_line, freeze, without_weights
from lorasmith.engine.out_of_memory import is_out_of_memory
from lorasmith.engine.safetensors_header import TensorInfo, read_header

if TYPE_CHECKING:
    import torch

    from lorasmith.engine.sources import BaseFiles

_SCALES = (".scale_weight", ".weight_scale")
"""ComfyUI's two spellings of what an fp8 weight is multiplied by."""
_UNREAD = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}

Matches = Callable[[Mapping[str, TensorInfo]], bool]
"""Tells from tensor names without prefix whether they are those of a part."""


@dataclass(frozen=True)
class FoundWeights:
    """A part of a base model inside a file: its tensors are those whose names begin with `prefix`."""

    path: Path
    prefix: str
    tensors: Mapping[str, TensorInfo]
    """The header of the part alone, names without the prefix."""


def find_weights(paths: Sequence[Path], prefixes: Sequence[str], matches: Matches) -> FoundWeights | None:
    """Return the first file and prefix ("" for a file of its own) under which `matches` knows the tensors; torch-free.

    Longer prefixes should come first.
    """
    for path in paths:
        header = read_header(path)[0]
        for prefix in prefixes:
            inside = {name[len(prefix) :]: info for name, info in header.items() if name.startswith(prefix)}
            if inside and matches(inside):
                return FoundWeights(path, prefix, inside)
    return None


def part_paths(files: BaseFiles) -> list[Path]:
    """Return the files in which a part of a single-file base may be: those given apart first, then the base itself."""
    apart = [*files.encoder_files, *([files.vae_file] if files.vae_file else [])]
    return apart + ([files.path] if files.kind == "single_file" else [])


def read_weights(found: FoundWeights, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Read a part's tensors in main memory as `dtype`, names without the prefix; fp8 weights are scaled back.

    For a skeleton they are tensors of the same shapes on the meta device, and nothing but the header is read.
    """
    from safetensors import safe_open

    if builds_skeletons():
        return _shapes_alone(found, dtype)
    weights: dict[str, torch.Tensor] = {}
    with safe_open(found.path, framework="pt") as source:
        for name in found.tensors:
            if name.endswith((*_SCALES, *_UNREAD)):
                continue
            value = source.get_tensor(found.prefix + name)
            if value.is_floating_point():
                value = value.to(dtype)
                scale = _scale_name(found, name)
                if scale:
                    value = (value.float() * source.get_tensor(found.prefix + scale).float()).to(dtype)
            weights[name] = value
    return weights


def _shapes_alone(found: FoundWeights, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    import torch

    return {
        name: torch.empty(info.shape, dtype=dtype if info.dtype in PRECISIONS else torch.int64, device="meta")
        for name, info in found.tensors.items()
        if not name.endswith((*_SCALES, *_UNREAD))
    }


def stored_precision(tensors: Mapping[str, TensorInfo]) -> str:
    """Return the number format that most of the weights are stored in, e.g. `bf16`; `unknown` without any."""
    import math

    counts: dict[str, int] = {}
    for info in tensors.values():
        counts[info.dtype] = counts.get(info.dtype, 0) + math.prod(info.shape)
    if not counts:
        return "unknown"
    stored = max(counts, key=lambda name: counts[name])
    return PRECISIONS.get(stored, stored.lower())


def fill_module(
    files: BaseFiles,
    part: str,
    kind: Callable[..., Any],
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> Any:
    """Build `kind(**config)` without spending time on random weights, and put `weights` in; every one must fit.

    Frozen and in eval mode; a skeleton takes the tensors of `read_weights` too, so that their shapes must fit. Raises
    BaseModelError naming the part where a weight is missing, left over or of another
    shape.
    """
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            module = kind(**config)
        module.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, strict=True, assign=True)
    except (RuntimeError, ValueError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        detail = " ".join(str(error).split())[:300] or first_line(error)
        raise BaseModelError(
            f"The {part} of {files.origin} does not fit its kind of model.",
            why=detail,
            fix="Download it again, or choose another base model.",
        ) from error
    return without_weights(module.to(dtype), dtype) if builds_skeletons() else freeze(module.to(dtype))


def _scale_name(found: FoundWeights, name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem == name:
        return ""
    return next((stem + suffix for suffix in _SCALES if stem + suffix in found.tensors), "")
