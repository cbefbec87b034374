"""What one picture file tells, worked out in a child process.

`python -m lorasmith.engine.dataset.examine` is that child: it reads one JSON object a line on its standard input, and
writes one answer a line on its standard output, in the same order. Whatever a decoder prints goes nowhere, and a file
that brings the child down brings down nothing else; `workers.py` is the other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from lorasmith.engine.dataset.images import read_picture
from lorasmith.engine.dataset.items import Measures, PictureFacts
from lorasmith.engine.dataset.measures import MEASURED_SIDE, measure_picture
from lorasmith.engine.errors import DatasetError

ORPHAN_SECONDS = 60
"""A child that is still at one file after this time has lost its parent, which would have ended it, and ends itself."""
_SIMPLE_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "DIB", "PPM", "QOI")


class TooLittleMemoryError(Exception):
    """The picture may need more memory than this child has; it is no fault of the file."""


def examine_picture(path: Path, memory_bytes: int | None = None) -> PictureFacts:
    """Decode and measure a picture.

    Raises DatasetError whose `why` is the reason it cannot be used; with `memory_bytes`, TooLittleMemoryError where
    decoding may need more than that, or fails in a way that may have come from it.
    """
    needed = 0

    def admit(picture: Image.Image) -> None:
        nonlocal needed
        needed = _memory_need(picture)
        if memory_bytes is not None and needed > memory_bytes:
            raise TooLittleMemoryError

    try:
        picture = read_picture(path, longest=MEASURED_SIDE, admit=admit, luma=True)
    except DatasetError as error:
        # Decoders report failed allocations in many ways, some of them as damage to the file.
        if memory_bytes is not None and (needed * 4 > memory_bytes or "memory" in error.why):
            raise TooLittleMemoryError from None
        raise
    return PictureFacts(
        sha256=picture.sha256,
        width=picture.full_size[0],
        height=picture.full_size[1],
        format=picture.format,
        transparent=picture.transparent,
        notes=picture.notes,
        measures=measure_picture(picture.image, picture.jpeg_tables),
    )


def _memory_need(picture: Image.Image) -> int:
    """Return about how many bytes it takes to decode and reduce the opened picture."""
    plain = picture.format in _SIMPLE_FORMATS and picture.mode in ("1", "L", "RGB", "CMYK")
    per_pixel = 5 if plain and "transparency" not in picture.info else 14
    if picture.info.get("progressive"):
        per_pixel += 6  # libjpeg keeps the coefficients of the whole picture, two bytes each
    return picture.width * picture.height * per_pixel


def facts_to_json(facts: PictureFacts) -> dict[str, Any]:
    """Return the facts as plain values for JSON."""
    return asdict(facts)


def facts_from_json(record: Mapping[str, Any]) -> PictureFacts:
    """Return the facts that `facts_to_json` wrote; raises KeyError, TypeError or ValueError for anything else."""
    measured = record["measures"]
    quality = measured["jpeg_quality"]
    return PictureFacts(
        sha256=str(record["sha256"]),
        width=int(record["width"]),
        height=int(record["height"]),
        format=str(record["format"]),
        transparent=bool(record["transparent"]),
        notes=tuple(str(note) for note in record["notes"]),
        measures=Measures(
            perceptual_hash=int(measured["perceptual_hash"]),
            sharpness=float(measured["sharpness"]),
            brightness=float(measured["brightness"]),
            contrast=float(measured["contrast"]),
            border=float(measured["border"]),
            jpeg_quality=None if quality is None else int(quality),
        ),
    )


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the child says to `{"path", "memory", "last"}`: `facts`, `refused` or `memory`.

    `lost` beside `refused` means that another time may go better. In the request, `memory` is what pictures may take,
    in bytes; `last` says that no later try will have more.
    """
    try:
        facts = examine_picture(Path(request["path"]), None if request["last"] else int(request["memory"]))
    except TooLittleMemoryError:
        return {"memory": True}
    except DatasetError as error:
        return {"refused": error.why} | ({"lost": True} if _may_pass(error) else {})
    except Exception as error:  # whatever it is, it concerns this file alone
        return {"refused": f"damaged ({type(error).__name__})", "lost": True}
    return {"facts": facts_to_json(facts)}


def _may_pass(error: DatasetError) -> bool:
    """Say whether the reason lies with the disk or the memory, and not with what is in the file."""
    cause = error.__context__
    return isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno is not None)


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "r+b") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    # What libraries load and set aside at their first use is not to count as memory for a picture.
    Image.init()
    measure_picture(Image.new("RGB", (16, 16)))
    taken, allowed = _memory_taken(), None
    answers.write(b"{}\n")  # ready: what loading takes is not counted as time for the first file
    answers.flush()
    for line in sys.stdin.buffer:
        signal.alarm(ORPHAN_SECONDS)
        request = json.loads(line)
        if request["memory"] != allowed:
            allowed = request["memory"]
            _limit_memory(taken + int(allowed))
        answers.write(json.dumps(answer(request)).encode() + b"\n")
        answers.flush()
        signal.alarm(0)


def _memory_taken() -> int:
    """Return the bytes that this process may write to, 0 where that is unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _limit_memory(num_bytes: int) -> None:
    """Have allocations fail beyond `num_bytes`; RLIMIT_DATA counts what was really given out, as RLIMIT_AS does not."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))


if __name__ == "__main__":
    main()
