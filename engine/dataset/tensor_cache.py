"""Tensors on disk under the hash of everything that they depend on; never stale, never torn."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lorasmith.engine.out_of_memory import is_out_of_memory
from lorasmith.engine.storage import cache_folder

_log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


class TensorCache:
    """Named tensors on disk, one safetensors file for each key; keys are plain values by name."""

    def __init__(self, kind: str, folder: Path | None = None, *, writes: bool = True) -> None:
        """Keep entries of `kind` (a folder name) below `folder` or `cache_folder()`; without `writes` only read."""
        self._folder = (folder or cache_folder()) / kind
        self._writes = writes
        self.problem = ""
        """Why an entry could not be written, with the path; empty while all is well."""

    def path(self, key: Mapping[str, str]) -> Path:
        """Return where the entry of `key` lies, whether it exists or not."""
        name = hashlib.sha256(_key_text(key).encode("utf-8", "surrogatepass")).hexdigest()
        return self._folder / name[:2] / f"{name}.safetensors"

    def has(self, key: Mapping[str, str]) -> bool:
        """Say whether there is a file for `key`, without reading it: a torn one counts."""
        return self.path(key).is_file()

    def load(self, key: Mapping[str, str]) -> Tensors | None:
        """Return the tensors of `key`; None where there are none, or the file is torn or holds something else."""
        try:
            with safe_open(self.path(key), framework="pt", device="cpu") as file:
                facts = file.metadata() or {}
                tensors = {name: own_copy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return None
        intact = facts.get("key") == key_digest(key) and facts.get("crc32") == _checksum(tensors)
        return tensors if intact else None

    def store(self, key: Mapping[str, str], tensors: Tensors) -> None:
        """Write the entry in one step, so that other processes see all of it or nothing.

        A full or read-only disk costs the next run time, not this one its life: it is logged once.
        """
        if not self._writes:
            return
        path = self.path(key)
        data = save(tensors, {"key": key_digest(key), "crc32": _checksum(tensors)})
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            if not self.problem:
                _log.warning("Cannot write the cache in %s (%s); it is computed again next time.", self._folder, error)
            self.problem = f"{self._folder}: {error.strerror or error}"


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the CPU in memory of its own, without a gradient."""
    # A view would keep its whole batch in memory, and a loaded tensor its file open.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _key_text(key: Mapping[str, str]) -> str:
    return json.dumps(dict(key), sort_keys=True, ensure_ascii=True)


def key_digest(key: Mapping[str, str]) -> str:
    """Return the sha256 of a key as hexadecimal digits."""
    return hashlib.sha256(_key_text(key).encode()).hexdigest()


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    # The files are not synced: after a power cut one may have its length and header, but zeros for data.
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), crc)
    return f"{crc:08x}"
