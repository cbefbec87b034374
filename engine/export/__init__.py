"""The shareable LoRA file: written beside its place, proved by `proof`, and only then given its name.

What is in it is in `layouts`, what readers make of it in `rules`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorasmith.engine.compatibility import chosen_layouts
from lorasmith.engine.errors import ConfigError, ExportError
from lorasmith.engine.export.layouts import DIFFUSERS, build_tensors, entries
from lorasmith.engine.export.proof import prove, verify_export
from lorasmith.engine.lora_metadata import DatasetFacts, build_metadata, with_hashes
from lorasmith.engine.storage import fsync_folder, storage_error

if TYPE_CHECKING:
    from lorasmith.engine.adapters import Adapter, AdapterModule
    from lorasmith.engine.config import RunConfig
    from lorasmith.engine.families import Family

__all__ = ["DatasetFacts", "ExportResult", "build_metadata", "export_file_name", "export_lora", "verify_export"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_NAME_BYTES = 180
MAX_HEADER_BYTES = 1 << 20
"""ComfyUI shows no metadata of files with longer headers."""
_LARGE_METADATA = ("ss_tag_frequency", "ss_bucket_info", "lora_adapter_metadata")
"""What is left out, in this order, where the header would be too long; no program needs it to load the file."""


@dataclass(frozen=True)
class ExportResult:
    """A proved LoRA file: its keys, and the modules (`component:path`) that training left unchanged.

    `readers` says in words whose rules it was read by.
    """

    path: Path
    layout: str
    step: int
    keys: int
    bytes: int
    unchanged: tuple[str, ...] = ()
    readers: str = ""


def export_lora(
    family: Family,
    adapter: Adapter,
    config: RunConfig,
    folder: Path,
    name: str,
    metadata: Mapping[str, str],
    step: int,
    *,
    plain_layout: str = "",
) -> list[ExportResult]:
    """Write one file for each layout in `config.export`, prove each, and return what was written.

    The first layout's file, or that of `plain_layout`, has the plain name. An older file of a name is replaced only by
    a proved one. Raises ExportError where a proof fails and StorageError where the disk refuses; neither leaves a new
    file behind.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, 0, error) from error
    results = []
    layouts = chosen_layouts(config.export, family.spec)
    for layout in layouts:
        path = folder / export_file_name(name, "" if layout == (plain_layout or layouts[0]) else layout)
        tensors = build_tensors(family, adapter, layout, DTYPES[config.export.precision])
        header = {"format": "pt"} | dict(metadata) | {"ss_steps": str(step), "ss_output_name": path.stem}
        if layout == DIFFUSERS:
            header |= _adapter_metadata(family, adapter)
        data = _serialize(tensors, header)
        with _proved_write(path, data) as temporary:
            proof = prove(temporary, layout, family, adapter)
        results.append(ExportResult(path, layout, step, proof.keys, len(data), proof.unchanged, proof.readers))
    return results


def require_exportable(family: Family, adapter: Adapter, config: RunConfig) -> None:
    """Refuse, before anything is trained, an adapter that a chosen layout cannot hold; raises ConfigError."""
    for layout in chosen_layouts(config.export, family.spec):
        try:
            entries(family, adapter, layout)
        except ExportError as error:
            raise ConfigError(error.what, why=error.why, fix=error.fix) from error


def export_file_name(name: str, layout: str = "") -> str:
    """Return the file name of run `name`: NAME.safetensors, or NAME-LAYOUT.safetensors for a further layout.

    Characters that end or leave a folder become `_`; letters of any script stay.
    """
    stem = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]+', "_", name).strip(" .") or "lora"
    stem = stem.encode("utf-8", "replace")[:MAX_NAME_BYTES].decode("utf-8", "ignore")
    return f"{stem}-{layout}.safetensors" if layout else f"{stem}.safetensors"


def _adapter_metadata(family: Family, adapter: Adapter) -> dict[str, str]:
    """Return what peft needs to rebuild a LoRA or DoRA; alpha equals rank, since the strength is in lora_B already.

    Other kinds are rebuilt from their shapes.
    """
    groups: dict[str, list[AdapterModule]] = {}
    for entry in entries(family, adapter, DIFFUSERS):
        if entry.fused or entry.module.kind not in ("lora", "dora"):
            return {}
        groups.setdefault(entry.name.partition(".")[0], []).append(entry.module)
    values: dict[str, object] = {}
    for prefix, modules in groups.items():
        ranks = [module.down.shape[0] * (2 if module.start else 1) for module in modules]
        usual = max(set(ranks), key=ranks.count)
        pattern = {f"^{module.path}": rank for module, rank in zip(modules, ranks, strict=True) if rank != usual}
        values |= {
            f"{prefix}.peft_type": "LORA",
            f"{prefix}.r": usual,
            f"{prefix}.lora_alpha": usual,
            f"{prefix}.rank_pattern": pattern,
            f"{prefix}.alpha_pattern": pattern,
            f"{prefix}.target_modules": sorted(module.path for module in modules),
        }
        if any(module.kind == "dora" for module in modules):
            values[f"{prefix}.use_dora"] = True
    return {"lora_adapter_metadata": json.dumps(values, sort_keys=True)}


def _serialize(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> bytes:
    from safetensors.torch import save

    plain = save(tensors, metadata={"format": "pt"})
    waiting = [key for key in _LARGE_METADATA if key in header]
    while True:
        data = save(tensors, metadata=with_hashes(header, plain))
        if not waiting or int.from_bytes(data[:8], "little") <= MAX_HEADER_BYTES:
            return data
        del header[waiting.pop(0)]


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
