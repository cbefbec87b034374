"""Which folders a run reads: what the dataset settings name, whether folder, ZIP archive or Kohya dataset file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith.engine.config import DatasetSettings
from lorasmith.engine.dataset.archives import is_archive, open_archive
from lorasmith.engine.dataset.folders import named_repeats, printable
from lorasmith.engine.dataset.items import Refusal
from lorasmith.engine.dataset.kohya_files import KohyaSubset, is_kohya_file, read_kohya_file
from lorasmith.engine.errors import DatasetError


@dataclass(frozen=True)
class Root:
    """A folder that is read as a dataset or as a part of one.

    `given` is the path in the settings, of which `key` is the name; `folder` is what is walked, for an archive only
    once it is unpacked. Every `relative` starts with `prefix`. `repeats` counts for each of its pictures beside the
    folders' own. `dataset` counts the run's datasets from 0, regularization last. `refused` are entries of its archive.
    """

    given: Path
    key: str
    folder: Path
    dataset: int
    repeats: float
    regularization: bool = False
    prefix: str = ""
    subset: KohyaSubset | None = None
    refused: tuple[Refusal, ...] = ()

    @property
    def archive(self) -> bool:
        """Say whether it is a ZIP archive."""
        return self.subset is None and not self.given.is_dir()


def require_roots(settings: DatasetSettings) -> tuple[list[Root], list[str]]:
    """Return what the settings name, and notes on it; archives are not unpacked yet, and no picture is read.

    Raises DatasetError naming the setting where one is not given, does not exist or cannot be a dataset, and where two
    are the same folder.
    """
    notes: list[str] = []
    weights = settings.weights or [1.0] * (1 + len(settings.more_folders))
    named = [("dataset.folder", settings.folder)]
    named += [(f"dataset.more_folders[{index}]", text) for index, text in enumerate(settings.more_folders)]
    roots: list[Root] = []
    for dataset, (key, text) in enumerate(named):
        # The smallest weight counts as 1, so that every picture is used at least once an epoch.
        factor = settings.repeats * (weights[dataset] / min(weights) if dataset < len(weights) else 1.0)
        roots += _open(Root(require_path(text, key), key, Path(), dataset, factor), settings, notes)
    if settings.regularization_folder:
        key = "dataset.regularization_folder"
        path = require_path(settings.regularization_folder, key)
        roots += _open(Root(path, key, Path(), len(named), settings.repeats, True), settings, notes)
    _require_different(roots)
    notes += [note for root in roots if (note := _own_repeats(root))]
    return roots, notes


def open_roots(roots: Sequence[Root]) -> list[Root]:
    """Return the roots with archives unpacked and with prefixes; raises DatasetError where one cannot be unpacked."""
    opened = []
    for root in roots:
        if root.archive:
            unpacked = open_archive(root.given)
            root = replace(root, folder=unpacked.folder, refused=unpacked.refused)
        opened.append(root)
    return _with_prefixes(opened)


def require_path(text: str, key: str) -> Path:
    """Return the path that a setting gives; raises DatasetError where it is blank, or nothing is there."""
    if not text.strip():
        raise DatasetError("No dataset folder is given.", fix=f"Set {key} to the folder with the pictures.")
    try:
        path = Path(text).expanduser()
        path.stat()
    except FileNotFoundError:
        raise DatasetError(f"The folder {text} does not exist.", fix=f"Check {key}.") from None
    except (OSError, RuntimeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DatasetError(f"{text} cannot be read.", why=f"{why}.", fix=f"Check {key}.") from None
    return path


def _open(root: Root, settings: DatasetSettings, notes: list[str]) -> list[Root]:
    path = root.given
    if path.is_dir():
        return [replace(root, folder=path)]
    if is_kohya_file(path):
        file = read_kohya_file(path, settings)
        notes += file.notes
        return [_subset_root(root, subset) for subset in file.subsets]
    if is_archive(path):
        return [replace(root, folder=path)]
    raise DatasetError(
        f"{path} is not a folder.",
        fix=f"Set {root.key} to the folder that holds the pictures, a ZIP archive of it, or a Kohya dataset file.",
    )


def _subset_root(root: Root, subset: KohyaSubset) -> Root:
    for key, folder in (("image_dir", subset.folder), ("conditioning_data_dir", subset.masks)):
        if folder is not None and not os.path.isdir(folder):
            raise DatasetError(
                f"The folder {folder} of {root.given.name} does not exist.",
                why=f"It is {key} in {subset.where}; paths that are not given in full start at the file's own folder.",
                fix=f"Correct {key} there, or set {root.key} to the folder with the pictures.",
            )
    if subset.metadata is not None and not os.path.isfile(subset.metadata):
        raise DatasetError(
            f"The file {subset.metadata} of {root.given.name} does not exist.",
            why=f"It is metadata_file in {subset.where}.",
            fix="Correct it there, or remove it to use the captions beside the pictures.",
        )
    return replace(
        root,
        folder=subset.folder,
        repeats=root.repeats * subset.repeats,
        regularization=root.regularization or subset.regularization,
        subset=subset,
    )


def _require_different(roots: Sequence[Root]) -> None:
    known: dict[tuple[int, int], Root] = {}
    for root in roots:
        status = root.folder.stat()
        other = known.setdefault((status.st_dev, status.st_ino), root)
        if other is root:
            continue
        if root.regularization == other.regularization:
            fix = (
                f"Remove {root.key}; dataset.weights, dataset.repeats and dataset.more_resolutions use one more often."
            )
        else:
            fix = "Give the regularization pictures a folder of their own."
        raise DatasetError(f"{other.key} and {root.key} are the same folder.", why=f"Both are {root.folder}.", fix=fix)


def _own_repeats(root: Root) -> str:
    """Return a note where the repeats in a chosen folder's own name could be expected to count."""
    facts = named_repeats(root.folder.resolve().name)
    if facts is None or root.subset is not None or root.archive:
        return ""
    return (
        f"{root.key} is itself named like 10_name: its {facts[0]} repeats do not count, set dataset.repeats or choose "
        "the folder that it lies in"
    )


def _with_prefixes(roots: Sequence[Root]) -> list[Root]:
    """Give all but a first plain folder the folder's name as the beginning of every `relative`, made unique."""
    first = roots[0]
    own = {identity for root in roots if (identity := _name_below(first, root))}
    taken: set[str] = set()
    named = []
    for root in roots:
        if root is first and root.subset is None:
            named.append(root)
            continue
        stem = root.given.stem if root.archive else root.folder.resolve().name
        name, number = printable(stem) or "dataset", 2
        while name in taken or (first.subset is None and name not in own and os.path.exists(first.folder / name)):
            name, number = f"{printable(stem) or 'dataset'}-{number}", number + 1
        taken.add(name)
        named.append(replace(root, prefix=f"{name}/"))
    return named


def _name_below(first: Root, root: Root) -> str:
    """Return the name of a root that lies directly in the first one, where it is not read a second time."""
    folder = root.folder.resolve()
    return printable(folder.name) if folder.parent == first.folder.resolve() else ""
