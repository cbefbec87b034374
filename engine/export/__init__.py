"""The shareable LoRA file: written beside its place, proved by `proof`, and only then given its name.

Two key layouts (names come from the family):

    kohya       lora_unet_down_blocks_0_….lora_down.weight   .lora_up.weight   .alpha     strength = alpha / rank
    diffusers   unet.down_blocks.0.….lora_A.weight           .lora_B.weight               strength = 1: folded into B

No reader needs the header: ComfyUI and Forge ignore it, so alpha is in the tensors of both layouts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorasmith.engine.compatibility import chosen_layouts
from lorasmith.engine.export.proof import ALPHA, DIFFUSERS, KOHYA, SUFFIXES, module_names, prove, verify_export
from lorasmith.engine.lora_metadata import DatasetFacts, build_metadata, with_hashes
from lorasmith.engine.storage import fsync_folder, storage_error

if TYPE_CHECKING:
    from lorasmith.engine.adapters import Adapter, AdapterModule
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.families import Family

__all__ = ["DatasetFacts", "ExportResult", "build_metadata", "export_file_name", "export_lora", "verify_export"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_NAME_BYTES = 180
_ROUNDING_LOSS = 4e-4
"""Share of a matrix that fp16 may lose; its half unit in the last place is 2**-11 = 4.9e-4."""


@dataclass(frozen=True)
class ExportResult:
    """A proved LoRA file: its keys, and the modules (`component:path`) that training left unchanged."""

    path: Path
    layout: str
    step: int
    keys: int
    bytes: int
    unchanged: tuple[str, ...] = ()


def export_lora(
    family: Family,
    adapter: Adapter,
    config: RunConfig,
    folder: Path,
    name: str,
    metadata: Mapping[str, str],
    step: int,
) -> list[ExportResult]:
    """Write one file for each layout in `config.export`, prove each, and return what was written.

    An older file of that name is replaced only by a proved one. Raises ExportError where a proof fails and
    StorageError where the disk refuses; neither leaves a new file behind.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, 0, error) from error
    results = []
    for layout in chosen_layouts(config.export, family.spec):
        path = folder / export_file_name(name, layout)
        tensors = build_tensors(family, adapter, layout, DTYPES[config.export.precision])
        header = {"format": "pt"} | dict(metadata) | {"ss_steps": str(step), "ss_output_name": path.stem}
        if layout == DIFFUSERS:
            header["lora_adapter_metadata"] = _adapter_metadata(family, adapter)
        data = _serialize(tensors, header)
        with _proved_write(path, data) as temporary:
            proof = prove(temporary, layout, family, adapter)
        results.append(ExportResult(path, layout, step, proof.keys, len(data), proof.unchanged))
    return results


def export_file_name(name: str, layout: str = KOHYA) -> str:
    """Return the file name of run `name` in `layout`: NAME.safetensors, or NAME-LAYOUT.safetensors for other layouts.

    Characters that end or leave a folder become `_`; letters of any script stay.
    """
    stem = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]+', "_", name).strip(" .") or "lora"
    stem = stem.encode("utf-8", "replace")[:MAX_NAME_BYTES].decode("utf-8", "ignore")
    return f"{stem}.safetensors" if layout == KOHYA else f"{stem}-{layout}.safetensors"


def build_tensors(family: Family, adapter: Adapter, layout: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors of a file in `layout` on the CPU; `.alpha` scalars are always fp32."""
    down_suffix, up_suffix = SUFFIXES[layout]
    tensors: dict[str, torch.Tensor] = {}
    for name, module in module_names(family, adapter, layout).items():
        down, up = module.down.detach().float().cpu(), module.up.detach().float().cpu()
        if layout == DIFFUSERS:
            up = up * module.scale
        else:
            tensors[name + ALPHA] = torch.tensor(float(module.alpha))
        down, up = _rounded(down, up, dtype)
        tensors[name + down_suffix], tensors[name + up_suffix] = down.contiguous(), up.contiguous()
    return tensors


def _rounded(down: torch.Tensor, up: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    plain = down.to(dtype), up.to(dtype)
    if dtype != torch.float16 or max(_loss(down, plain[0]), _loss(up, plain[1])) <= _ROUNDING_LOSS:
        return plain
    # A barely trained up matrix lies below fp16's range. Moving a power of two between the two keeps their product
    # exactly and brings both into range.
    ratio = float(down.abs().max()) / max(float(up.abs().max()), 1e-38)
    factor = 2.0 ** round(math.log2(max(ratio, 1e-38)) / 2)
    return (down / factor).to(dtype), (up * factor).to(dtype)


def _loss(exact: torch.Tensor, rounded: torch.Tensor) -> float:
    norm = float(exact.norm())
    return float((exact - rounded.float()).norm()) / norm if norm > 0 else 0.0


def _adapter_metadata(family: Family, adapter: Adapter) -> str:
    # What peft needs to rebuild the adapter; alpha equals rank because the strength is already in lora_B.
    groups: dict[str, list[AdapterModule]] = {}
    for name, module in module_names(family, adapter, DIFFUSERS).items():
        groups.setdefault(name.partition(".")[0], []).append(module)
    values: dict[str, object] = {}
    for prefix, modules in groups.items():
        ranks = [module.rank for module in modules]
        usual = max(set(ranks), key=ranks.count)
        pattern = {f"^{module.path}": module.rank for module in modules if module.rank != usual}
        values |= {
            f"{prefix}.peft_type": "LORA",
            f"{prefix}.r": usual,
            f"{prefix}.lora_alpha": usual,
            f"{prefix}.rank_pattern": pattern,
            f"{prefix}.alpha_pattern": pattern,
            f"{prefix}.target_modules": sorted(module.path for module in modules),
        }
    return json.dumps(values, sort_keys=True)


def _serialize(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> bytes:
    from safetensors.torch import save

    return save(tensors, metadata=with_hashes(header, save(tensors, metadata={"format": "pt"})))


@contextlib.contextmanager
def _proved_write(path: Path, data: bytes) -> Iterator[Path]:
    """Write `data` beside `path`, let the caller prove it, then give it its name; on any error remove it."""
    temporary = path.with_name(f".proving-{secrets.token_hex(4)}.safetensors")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(path, len(data), error) from error
        yield temporary
        try:
            temporary.replace(path)
            fsync_folder(path.parent)
        except OSError as error:
            raise storage_error(path, len(data), error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
