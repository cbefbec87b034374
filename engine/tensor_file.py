"""Writing a safetensors file tensor by tensor, for a machine whose memory does not take all of them at once.

The format (huggingface/safetensors, README): eight bytes with the header's length, a JSON header with type, shape and
place of each tensor, then the tensors' bytes one after another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""The format's names of torch's types."""


class OneByOne(dict[str, "Tensor"]):
    """Tensors still where they are trained, to be brought to main memory one by one while they are written."""


def write_one_by_one(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors`, wherever they are, as safetensors; main memory holds one of them at a time.

    Raises OSError where the disk refuses.
    """
    import torch

    # Wide types first, as safetensors itself orders them, so that each tensor lies at a multiple of its type's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    place = 0
    for name in names:
        tensor = tensors[name]
        end = place + tensor.numel() * tensor.element_size()
        kind = _TYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            content = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(content.view(torch.uint8).numpy().data)
