"""What the commands print: safe text, errors in three parts, one JSON document, a log for the unexpected."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import tempfile
import time
import traceback
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasmith.engine.errors import LorasmithError
from lorasmith.engine.run_log import plain_text

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = {"\u200c", "\u200d", "\ufeff"}


def visible(value: object) -> str:
    """Return text with control, bidirectional and unpaired surrogate characters spelled out, and tokens taken out.

    File names, captions and foreign exceptions may hold any of these; printed raw they could move the cursor, recolor
    the terminal or reorder what follows. Line breaks stay and are indented, so that no foreign line starts a message.
    """
    return "".join(_visible_character(character) for character in plain_text(str(value))).replace("\n", "\n  ")


def _visible_character(character: str) -> str:
    if character == "\n" or unicodedata.category(character) not in _HIDDEN or character in _JOINERS:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def make_streams_safe() -> None:
    """Let stdout and stderr spell out what the terminal's encoding lacks, where they would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: object = "", *, to_stderr: bool = False) -> None:
    """Print one message at once; foreign text in it is made visible."""
    print(visible(text), file=sys.stderr if to_stderr else sys.stdout, flush=True)


def say_json(document: Any) -> None:
    """Print one JSON document on stdout; paths become strings, records dictionaries."""
    print(json.dumps(document, ensure_ascii=True, indent=2, default=plain), flush=True)


def plain(value: Any) -> Any:
    """Return what JSON can hold for a path, dataclass, mapping or any other sequence."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, str):
        return list(value)
    return str(value)


def fail(error: LorasmithError, *, as_json: bool = False) -> None:
    """Print what happened, why and what to do on stderr; with `as_json` also as the document on stdout."""
    if as_json:
        say_json({"error": error_parts(error, error.exit_code)})
    for label, text in (("Error", error.what), ("Why", error.why), ("Fix", error.fix)):
        if text:
            say(f"{label}: {text}", to_stderr=True)


def error_parts(error: LorasmithError, exit_code: int) -> dict[str, Any]:
    """Return an error as a script reads it."""
    return {"what": error.what, "why": error.why, "fix": error.fix, "exit_code": exit_code}


def write_crash_log(error: Exception) -> LorasmithError:
    """Write the traceback of an unexpected exception to a file and return the error that names it."""
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    text = plain_text("".join(traceback.format_exception(error)))
    path = _write_first(_log_folders(), name, text)
    return LorasmithError(
        f"Unexpected {type(error).__name__}: {error}",
        why="This is a fault in lorasmith, or in a library that it uses.",
        fix=f"The details are in {path}." if path else f"The details could not be saved anywhere: {text}",
    )


def _log_folders() -> Iterable[Path]:
    import platformdirs

    yield Path(platformdirs.user_log_dir("lorasmith"))
    yield Path(tempfile.gettempdir())


def _write_first(folders: Iterable[Path], name: str, text: str) -> Path | None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        return folder / name
    return None


def columns(rows: Sequence[Sequence[object]], indent: str = "  ") -> list[str]:
    """Return `rows` as lines with aligned columns; the last column is not padded."""
    from rich.cells import cell_len

    texts = [[visible(cell) for cell in row] for row in rows]
    if not texts:
        return []
    # Cells and not characters: those of East Asian scripts are two cells wide.
    widths = [max(cell_len(row[index]) for row in texts) for index in range(len(texts[0]))]
    return [
        indent
        + "  ".join(text + " " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in texts
    ]
