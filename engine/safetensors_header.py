"""Reading the headers of safetensors files without torch, and saying what another file is instead."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from lorasmith.engine.errors import BaseModelError

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library refuses longer headers too."""
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
PICKLE_FIX = "Take the .safetensors version of the model, or convert it to safetensors first."
_AGAIN = "Download the file again."
_FORMATS = {"F32": ("f", 4), "F16": ("e", 2), "F64": ("d", 8)}
_UNITS = ((10**8, 10**9, "GB"), (10**5, 10**6, "MB"), (0, 1, "bytes"))
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a pickle (a PyTorch archive); opening one can run code", PICKLE_FIX),
    (b"\x80", "a pickle; opening one can run code", PICKLE_FIX),
    (b"GGUF", "a quantized GGUF file, which cannot be trained on", "Take the .safetensors version of the model."),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file itself", "Fetch it with: git lfs pull"),
    (b"<", "a web page instead of the model", "Download it again; the site may ask you to sign in first."),
)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a safetensors header describes it, e.g. `F16` and (320, 4, 3, 3)."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file without reading its weights.

    Raises BaseModelError where the file is truncated, damaged, a pickle or of another format, and says which. The last
    few headers are remembered, since every family looks at a file to know whether it is its own.
    """
    try:
        status = path.stat()
    except OSError:
        tensors, metadata = _read_header(path, 0, 0)
    else:
        tensors, metadata = _read_header(path, status.st_size, status.st_mtime_ns)
    return dict(tensors), dict(metadata)


@lru_cache(maxsize=16)
def _read_header(path: Path, size: int, changed: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    header, _ = _parse(path)
    metadata = header.pop("__metadata__", {})
    tensors = {name: TensorInfo(str(item["dtype"]), tuple(item["shape"])) for name, item in header.items()}
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def read_values(path: Path, name: str) -> list[float]:
    """Return the numbers of one small tensor of a safetensors file; for the few facts that only weights tell."""
    header, start = _parse(path)
    begin, end = header[name]["data_offsets"]
    with path.open("rb") as file:
        file.seek(start + begin)
        data = file.read(end - begin)
    dtype = header[name]["dtype"]
    if dtype == "BF16":  # the upper half of a float32
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
        dtype = "F32"
    if dtype not in _FORMATS:
        raise BaseModelError(f"Tensor {name} of {path.name} has the unknown format {dtype}.")
    letter, size = _FORMATS[dtype]
    return list(struct.unpack(f"<{len(data) // size}{letter}", data))


def _parse(path: Path) -> tuple[dict[str, Any], int]:
    """Return the raw header and the offset at which the weights begin."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > MAX_HEADER_BYTES:
                refuse_format(path)
            raw = file.read(length)
    except OSError as error:
        raise BaseModelError(f"Cannot read {path}.", why=str(error), fix="Check the file and its rights.") from None
    if raw[:1] != b"{":
        refuse_format(path)
    if len(raw) < length:
        raise _truncated(path, size, 8 + length)
    try:
        header = json.loads(raw)
        ends = [int(item["data_offsets"][1]) for name, item in header.items() if name != "__metadata__"]
        [(str(item["dtype"]), tuple(item["shape"])) for name, item in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise BaseModelError(f"The header of {path.name} is damaged.", why=str(error), fix=_AGAIN) from None
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise _truncated(path, size, expected)
    if size > expected:
        raise BaseModelError(f"{path.name} is longer than its header says, so it is damaged.", fix=_AGAIN)
    return header, 8 + length


def _truncated(path: Path, size: int, expected: int) -> BaseModelError:
    unit, letter = next((unit, letter) for least, unit, letter in _UNITS if expected >= least)
    have, need = f"{size / unit:.1f}", f"{expected / unit:.1f}"
    if have == need or unit == 1:
        have, need, letter = str(size), str(expected), "bytes"
    return BaseModelError(f"{path.name} is truncated: it is {have} of {need} {letter}.", fix=_AGAIN)


def refuse_format(path: Path) -> NoReturn:
    """Raise BaseModelError that says what a file is that is no safetensors file."""
    with path.open("rb") as file:
        head = file.read(64)
    for magic, words, fix in _MAGIC:
        if head.lstrip().startswith(magic):
            raise BaseModelError(f"{path.name} is {words}.", fix=fix)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise BaseModelError(f"{path.name} is a pickle; opening one can run code.", fix=PICKLE_FIX)
    what = "empty" if not head else "no safetensors file"
    raise BaseModelError(f"{path.name} is {what}.", fix="Give a .safetensors file, a diffusers folder or a Hub id.")
