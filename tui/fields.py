"""Settings as text: what a form shows for a value, and what a typed text means. Pure; no screen."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Kind = Literal["switch", "choice", "whole", "number", "text", "texts", "wholes", "numbers", "choices"]
SEPARATOR = "|"
"""Between the items of a list; captions and prompts hold commas."""

_LABELS = {
    "run.name": "Name of the run",
    "run.output_folder": "Output folder",
    "train.steps": "Steps",
    "train.batch_size": "Batch size",
    "adapter.kind": "Adapter",
    "optimizer.name": "Optimizer",
    "schedule.name": "Schedule",
    "dataset.resolution": "Resolution",
    "previews.every": "Preview every",
    "checkpoints.every": "Checkpoint every",
    "checkpoints.keep": "Checkpoints kept",
    "optimizer.learning_rate": "Learning rate",
    "base.model": "Base model",
    "dataset.folder": "Folder with pictures",
    "dataset.more_folders": "Further datasets",
    "dataset.weights": "Weights of datasets",
    "dataset.alpha_background": "Behind transparency",
    "dataset.overlay": "Edited captions",
    "captions.trigger": "Trigger word",
}
_PAGES = {
    "base": "base_model",
    "dataset.folder": "dataset",
    "dataset.more_folders": "dataset",
    "dataset.weights": "dataset",
    "dataset.regularization_folder": "dataset",
    "dataset.overlay": "dataset",
    "dataset.alpha_background": "dataset",
    "dataset.masks": "dataset",
    "dataset.missing_captions": "dataset",
    "captions.trigger": "trigger",
}


@cache
def settings() -> dict[str, FieldInfo]:
    """Return every setting by its dotted key, in the order of the run file; without the file's own version."""
    # Imported late: pydantic is not needed before the first page is painted.
    from lorasmith.engine.run_file import setting_fields

    return {key: info for key, info in setting_fields() if key != "version"}


@cache
def kind_of(key: str) -> Kind:
    """Return which control fits the setting."""
    return kind_of_type(settings()[key].annotation)


def kind_of_type(annotation: Any) -> Kind:
    """Return which control fits values of this type."""
    if typing.get_origin(annotation) is Literal:
        return "choice"
    if typing.get_origin(annotation) is list:
        item = _plain(typing.get_args(annotation)[0])
        kinds: dict[Any, Kind] = {int: "wholes", float: "numbers"}
        return "choices" if typing.get_origin(item) is Literal else kinds.get(item, "texts")
    plain: dict[Any, Kind] = {bool: "switch", int: "whole", float: "number"}
    return plain.get(annotation, "text")


def choices_of(key: str) -> tuple[str, ...]:
    """Return the allowed words of a choice; "off" and "on" for a switch."""
    if kind_of(key) == "switch":
        return ("off", "on")
    annotation = settings()[key].annotation
    if kind_of(key) == "choices":
        annotation = _plain(typing.get_args(annotation)[0])
    return tuple(str(value) for value in typing.get_args(annotation))


def label_of(key: str) -> str:
    """Return the setting's name as a person reads it."""
    section, _, name = key.rpartition(".")
    words = name.replace("_", " ")
    crowded = sum(1 for other in settings() if other.endswith(f".{name}")) > 1
    return _LABELS.get(key) or (f"{section.capitalize()}: {words}" if crowded else words.capitalize())


def help_of(key: str) -> str:
    """Return what the setting does, from its own declaration."""
    return " ".join((settings()[key].description or "").split())


def page_of(key: str) -> str:
    """Return the wizard page on which the setting is asked."""
    return _PAGES.get(key) or _PAGES.get(key.split(".")[0], "settings")


@cache
def bounds_of(key: str) -> str:
    """Return the allowed range in words, "" where anything goes."""
    if kind_of(key) in ("choice", "choices"):
        return ", ".join(choices_of(key))
    return bounds_in(settings()[key].metadata)


def bounds_in(metadata: Sequence[Any]) -> str:
    """Return in words the range that a field's metadata declare, "" where there is none."""
    limits: dict[str, Any] = {}
    for item in metadata:
        limits |= {
            name: value for name in ("ge", "gt", "le", "lt", "multiple_of") if (value := _limit(item, name)) is not None
        }
    words = []
    if "ge" in limits or "gt" in limits:
        words.append(f"from {limits['ge']:g}" if "ge" in limits else f"above {limits['gt']:g}")
    if "le" in limits or "lt" in limits:
        words.append(f"to {_plainly(limits['le'])}" if "le" in limits else f"below {_plainly(limits['lt'])}")
    if "multiple_of" in limits:
        words.append(f"in steps of {limits['multiple_of']}")
    return " ".join(words)


def write_text(key: str, value: Any) -> str:
    """Return a value as the form shows it; `read_text` is the way back."""
    return write_as(kind_of(key), value)


def write_as(kind: Kind, value: Any) -> str:
    """Return a value of this kind as a form shows it."""
    if kind == "switch":
        return "on" if value else "off"
    if kind == "number":
        return f"{value:.12g}"
    if isinstance(value, list | tuple):
        return f" {SEPARATOR} ".join(str(item) for item in value)
    return str(value)


def read_text(key: str, text: str) -> Any:
    """Return the value that a typed text means; raises ValueError with the reason in words."""
    from lorasmith.engine.run_file import check_setting

    value = read_as(kind_of(key), text)
    problem = check_setting(key, value)
    if problem:
        raise ValueError(f"{label_of(key)} {problem}.")
    return value


def read_as(kind: Kind, text: str) -> Any:
    """Return what a typed text means as a value of this kind; raises ValueError with the reason in words."""
    if kind == "switch":
        return text == "on"
    if kind in ("texts", "choices", "wholes", "numbers"):
        items = [item.strip() for item in text.split(SEPARATOR) if item.strip()]
        read = {"wholes": _whole, "numbers": _number}.get(kind, str)
        return [read(item) for item in items]
    if kind == "whole":
        return _whole(text)
    return _number(text) if kind == "number" else text


def _number(text: str) -> float:
    try:
        return float(text.replace("_", ""))
    except ValueError:
        raise ValueError(f"“{text}” is not a number; write it like 0.0001 or 1e-4.") from None


def _whole(text: str) -> int:
    try:
        return int(text.strip().replace("_", ""))
    except ValueError:
        raise ValueError(f"“{text}” is not a whole number.") from None


def _plain(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _limit(item: Any, name: str) -> Any:
    return getattr(item, name, None)


def _plainly(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) else f"{number:g}"
