"""Finding a captioner's model on this machine or on the Hub, and refusing what is incomplete before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasmith.engine.captioners import CaptionerSpec, OnProgress
from lorasmith.engine.errors import BaseModelError, CaptionerError
from lorasmith.engine.safetensors_header import TensorInfo, read_header
from lorasmith.engine.sources import BaseFiles, is_hub_id

_INDEX = "model.safetensors.index.json"
_AGAIN = "Download the model again, or choose another one."


def locate_model(spec: CaptionerSpec, model: str = "", on_progress: OnProgress | None = None) -> Path:
    """Return the complete folder of a captioner's model: `model` is a folder, or a Hub id that is downloaded.

    Raises CaptionerError naming the file that is missing or torn, and HubError where the Hub refuses.
    """
    name = model.strip() or spec.default_model
    path = Path(name).expanduser()
    if path.is_file():
        path = path.parent
    if path.is_dir():
        require_files(spec, path)
        return path.resolve()
    if not is_hub_id(name):
        raise CaptionerError(
            f"There is no folder {name}.",
            why="It is no Hub id either, which would be written owner/name.",
            fix=f"Give the folder of a model for {spec.label}, or leave it out to use {spec.default_model}.",
        )
    from lorasmith.engine.hub import download_files

    revision = spec.revision if name == spec.default_model else "main"
    folder = download_files(
        name, revision, lambda names: _needed(spec, names, name), lambda found: _is_complete(spec, found), on_progress
    )
    require_files(spec, folder)
    return folder


def require_files(spec: CaptionerSpec, folder: Path) -> None:
    """Raise CaptionerError naming the file of `folder` that is missing, empty, torn, or a pickle."""
    present = [path.name for path in folder.iterdir() if path.is_file()]
    _require_names(spec, str(folder), present, _AGAIN)
    for name in present:
        if name in "|".join(spec.files).split("|") and (folder / name).stat().st_size == 0:
            raise CaptionerError(f"{folder / name} is empty.", fix=_AGAIN)
    if spec.safetensors:
        read_tensors(spec, folder)


def read_tensors(spec: CaptionerSpec, folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors in the safetensors files of `folder` by name; raises CaptionerError as `require_files`."""
    try:
        paths = BaseFiles("folder", folder, str(folder)).weight_files("")
    except BaseModelError as error:
        raise CaptionerError(error.what, why=error.why, fix=error.fix) from None
    if not paths:
        raise CaptionerError(f"{folder} has no safetensors weights, which {spec.label} needs.", fix=_AGAIN)
    if (folder / _INDEX).is_file():
        listed = set(read_json(folder / _INDEX).get("weight_map", {}).values())
        missing = sorted(listed - {path.name for path in paths})
        if missing:
            raise CaptionerError(f"{folder} has no {missing[0]}, which its {_INDEX} names.", fix=_AGAIN)
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        try:
            tensors |= read_header(path)[0]
        except BaseModelError as error:
            raise CaptionerError(f"{path} is damaged.", why=error.what, fix=_AGAIN) from None
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model; raises CaptionerError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CaptionerError(f"{path} cannot be read.", why=f"{error}.", fix=_AGAIN) from None
    return values


def _needed(spec: CaptionerSpec, names: Sequence[str], repo: str) -> list[str]:
    from lorasmith.engine.hub_choice import needed_part_files

    _require_names(spec, repo, names, f"Choose {spec.default_model}, or a like one.")
    return needed_part_files("", names, repo) if spec.safetensors else list(spec.files)


def _require_names(spec: CaptionerSpec, place: str, names: Sequence[str], fix: str) -> None:
    for wanted in spec.files:
        alternatives = wanted.split("|")
        if not any(name in names for name in alternatives):
            raise CaptionerError(f"{place} has no {' or '.join(alternatives)}, which {spec.label} needs.", fix=fix)


def _is_complete(spec: CaptionerSpec, folder: Path) -> bool:
    try:
        require_files(spec, folder)
    except CaptionerError:
        return False
    return True
