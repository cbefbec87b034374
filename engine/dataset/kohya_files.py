"""Datasets described by a TOML file of Kohya's sd-scripts: which folders, how often, and with which captions.

Source of the keys and of their order (subset before dataset before general): kohya-ss/sd-scripts
docs/config_README-en.md. What says which pictures are used, and how often, is done: image_dir, num_repeats, is_reg,
class_tokens, caption_extension, metadata_file and conditioning_data_dir (masks, as with --masked_loss). Everything else
is a setting of the run here: where the file asks for something else, a note says so and names the setting. A key that
Kohya does not know is refused, since it is most likely misspelt.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.errors import DatasetError

MAX_FILE_BYTES = 1_000_000
_FOLDER_KEYS: Mapping[str, type] = {
    "image_dir": str, "num_repeats": int, "is_reg": bool, "class_tokens": str, "caption_extension": str,
    "metadata_file": str, "conditioning_data_dir": str,
}  # fmt: skip
_INHERITED = frozenset(("num_repeats", "caption_extension", "class_tokens"))
# Each key of Kohya that is a setting here, its value that means "nothing special", and the setting.
_SETTINGS: Mapping[str, tuple[Any, str]] = {
    "resolution": (None, "dataset.resolution"),
    "batch_size": (None, "train.batch_size"),
    "enable_bucket": (None, "dataset.buckets"),
    "bucket_reso_steps": (None, "dataset.bucket_step"),
    "random_crop": (False, "dataset.crop"),
    "flip_aug": (False, "dataset.flip"),
    "alpha_mask": (False, "dataset.masks"),
    "shuffle_caption": (False, "captions.shuffle"),
    "keep_tokens": (0, "captions.keep_tokens"),
    "caption_dropout_rate": (0, "captions.dropout"),
    "caption_tag_dropout_rate": (0, "captions.tag_dropout"),
    "caption_prefix": ("", "captions.prefix"),
    "caption_suffix": ("", "captions.suffix"),
    "enable_wildcard": (False, "captions.wildcards and captions.lines"),
    "prior_loss_weight": (1, "objective.prior_weight"),
}
# What lorasmith has no like of; the value is the one with which nothing is missed.
_WITHOUT_SETTING: Mapping[str, Any] = {
    "color_aug": False, "face_crop_aug_range": None, "keep_tokens_separator": "", "secondary_separator": "",
    "caption_separator": ",", "caption_dropout_every_n_epochs": 0, "token_warmup_min": 1, "token_warmup_step": 0,
    "resize_interpolation": None, "skip_image_resolution": None, "min_bucket_reso": None, "max_bucket_reso": None,
    "network_multiplier": 1.0, "max_token_length": None, "validation_split": 0.0, "validation_seed": None,
    "custom_attributes": None,
}  # fmt: skip
# These change nothing that is learnt here: caching is lorasmith's own, and too small pictures are told by the checks.
_WITHOUT_EFFECT = frozenset(("cache_info", "debug_dataset", "bucket_no_upscale"))
_KINDS = {str: "text", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True)
class KohyaSubset:
    """One folder of a dataset file; pictures lie directly in it, and its name says nothing.

    `where` names it in messages. `caption_suffix` is the only caption extension that counts, "" for all of them;
    `class_tokens` the caption of pictures without one.
    """

    folder: Path
    where: str
    repeats: int = 1
    regularization: bool = False
    class_tokens: str = ""
    caption_suffix: str = ""
    metadata: Path | None = None
    masks: Path | None = None


@dataclass(frozen=True)
class KohyaFile:
    """A dataset file: its folders, and what it sets that counts in the run's settings instead."""

    subsets: tuple[KohyaSubset, ...]
    notes: tuple[str, ...]


def is_kohya_file(path: Path) -> bool:
    """Say whether the file's name is that of a dataset file."""
    return path.suffix.lower() == ".toml"


def read_kohya_file(path: Path, settings: DatasetSettings) -> KohyaFile:
    """Read a dataset file; raises DatasetError naming the key that is unknown or of the wrong kind.

    Folders that are not given in full are looked for beside the file. A folder that several datasets name is read once,
    with a note.
    """
    content = _parse(path)
    general = _table(path, content.pop("general", {}), "general")
    datasets = _tables(path, content.pop("datasets", None), "datasets")
    if content:
        raise _problem(path, f"{next(iter(content))} is neither [general] nor [[datasets]]")
    subsets: dict[Path, KohyaSubset] = {}
    given: dict[str, Any] = {}
    notes: list[str] = []
    _collect(path, general, "[general]", given)
    for number, dataset in enumerate(datasets, 1):
        place = f"datasets {number}"
        inner = _tables(path, dataset.pop("subsets", None), f"{place}: subsets")
        _collect(path, dataset, f"[[datasets]] {number}", given)
        for index, table in enumerate(inner, 1):
            where = f"{place}, subset {index} of {path.name}"
            _collect(path, table, where, given)
            subset = _subset(path, where, table, {**general, **dataset})
            known = subsets.setdefault(subset.folder, subset)
            if known is not subset:
                notes.append(_said_twice(path, known, subset))
    notes += _setting_notes(path, given, settings)
    return KohyaFile(tuple(subsets.values()), tuple(notes))


def _parse(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _problem(path, "It is larger than 1 MB")
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise _problem(path, str(error.strerror or error)) from None
    except UnicodeDecodeError:
        raise _problem(path, "It is not UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        why = f"It is no TOML: {error}"
        if "escape" in str(error) or "hex" in str(error):
            why += " (write Windows paths in single quotes)"
        raise _problem(path, why) from None


def _table(path: Path, value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _problem(path, f"{name} is no table")
    return dict(value)


def _tables(path: Path, value: object, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise _problem(path, f"It has no [[{name.replace(': ', '.')}]]" if value is None else f"{name} is no list")
    return [_table(path, entry, name) for entry in value]


def _collect(path: Path, table: Mapping[str, Any], where: str, given: dict[str, Any]) -> None:
    """Refuse unknown keys and wrong kinds of value; keep the values of keys that are settings of the run here."""
    for key, value in table.items():
        if key in _FOLDER_KEYS:
            kind = _FOLDER_KEYS[key]
            if type(value) is not kind:
                raise _problem(path, f"{key} in {where} must be {_KINDS[kind]}")
        elif key in _SETTINGS or key in _WITHOUT_SETTING:
            values = given.setdefault(key, [])
            values += [value] if value not in values else []
        elif key not in _WITHOUT_EFFECT:
            raise _problem(path, f"{key} in {where} is no key of Kohya's dataset files")


def _subset(path: Path, where: str, table: Mapping[str, Any], above: Mapping[str, Any]) -> KohyaSubset:
    values = {key: value for key, value in above.items() if key in _INHERITED} | dict(table)
    folder = values.get("image_dir", "")
    if not folder.strip():
        raise _problem(path, f"image_dir is missing in {where}")
    repeats = values.get("num_repeats", 1)
    if not 0 <= repeats <= 10_000:
        raise _problem(path, f"num_repeats in {where} must be 0 to 10000")
    suffix = values.get("caption_extension", "").strip().lower()
    metadata, masks = values.get("metadata_file"), values.get("conditioning_data_dir")
    if masks and _resolve(path, masks) == _resolve(path, folder):
        raise _problem(path, f"conditioning_data_dir in {where} is the folder of the pictures itself")
    return KohyaSubset(
        folder=_resolve(path, folder),
        where=where,
        repeats=repeats,
        regularization=values.get("is_reg", False),
        class_tokens=values.get("class_tokens", ""),
        caption_suffix=suffix if suffix.startswith(".") or not suffix else f".{suffix}",
        metadata=_resolve(path, metadata) if metadata else None,
        masks=_resolve(path, masks) if masks else None,
    )


def _resolve(path: Path, text: str) -> Path:
    try:
        return (path.parent / Path(text).expanduser()).absolute()
    except RuntimeError:
        raise _problem(path, f"The home folder in {text} is unknown") from None


def _said_twice(path: Path, known: KohyaSubset, subset: KohyaSubset) -> str:
    if known.regularization != subset.regularization:
        raise _problem(path, f"{subset.folder} is a regularization folder in one place and not in another")
    return (
        f"{path.name} names {subset.folder} in {known.where} and in {subset.where}: it is read once, as the first "
        "says; for several resolutions set dataset.more_resolutions"
    )


def _setting_notes(path: Path, given: Mapping[str, list[Any]], settings: DatasetSettings) -> list[str]:
    notes = []
    for key, values in given.items():
        neutral, setting = _SETTINGS.get(key, (_WITHOUT_SETTING.get(key), ""))
        shown = ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
        if all(value == neutral or _agrees(key, value, settings) for value in values):
            continue
        here = f"that is {setting} here" if setting else "lorasmith has no such setting"
        notes.append(f"{path.name} sets {key} = {shown}: {here}, and the file's value is not used")
    return notes


def _agrees(key: str, value: Any, settings: DatasetSettings) -> bool:
    """Say whether the run's settings already are what the file asks for; those of other sections are not known here."""
    side = settings.resolution
    agreeing: Mapping[str, tuple[Any, ...]] = {
        "resolution": (side, [side, side], *settings.more_resolutions, *([s, s] for s in settings.more_resolutions)),
        "enable_bucket": (settings.buckets,),
        "bucket_reso_steps": (settings.bucket_step,),
        "random_crop": (settings.crop == "random",),
        "flip_aug": (settings.flip,),
        "alpha_mask": (settings.masks == "alpha",),
    }
    return value in agreeing.get(key, ())


def _problem(path: Path, why: str) -> DatasetError:
    return DatasetError(
        f"The dataset file {path} cannot be used.",
        why=f"{why}.",
        fix="Correct it as Kohya's documentation of dataset files says, or give the folder with the pictures itself.",
    )
