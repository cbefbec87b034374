"""Which files of a dataset are pictures, captions and masks, in every layout that people have.

Captions lie beside their picture under the same name: `a.txt`, `a.caption`, `a.json` with a "caption" (ai-toolkit), or
the same after the whole name (`a.png.txt`); or in lists for many pictures (`caption_lists`). Masks are
`NAME-masklabel.png` beside the picture (OneTrainer), or have the picture's name in a folder `mask` or `masks`: below
the picture's folder, beside it, or one for a whole tree with the same folders inside (`masks/10_cat/a.png` for
`10_cat/a.png`). Folders named `10_name` repeat their pictures (Kohya); any other folders are only folders.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from lorasmith.engine.dataset.caption_lists import LIST_SUFFIXES
from lorasmith.engine.dataset.folders import folder_repeats, same_name
from lorasmith.engine.dataset.items import Refusal
from lorasmith.engine.dataset.roots import Root

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Extensions of captions beside a picture in lower case, the preferred one first."""
MASK_ENDING = "-masklabel"
MASK_FOLDERS = ("mask", "masks")
_CONDITIONING_ENDING = "-condlabel"

File = tuple[Path, str]
_Key = tuple[str, str]


@dataclass(frozen=True)
class Candidate:
    """A file that may be a picture; `sidecars` and `masks` are what belongs to it by name, the preferred first."""

    path: Path
    relative: str
    root: Root
    repeats: float
    class_name: str = ""
    sidecars: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()


@dataclass
class Layout:
    """The files of one root by what they are; `disputed` masks have the name of pictures in several folders."""

    candidates: list[Candidate] = field(default_factory=list)
    sidecars: list[File] = field(default_factory=list)
    lists: list[File] = field(default_factory=list)
    masks: list[File] = field(default_factory=list)
    disputed: set[Path] = field(default_factory=set)
    refused: list[Refusal] = field(default_factory=list)


def sort_files(root: Root, files: Iterable[File], mask_files: Sequence[File] = ()) -> Layout:
    """Return what the files of a root are; `mask_files` lie in the folder of masks that a Kohya file names."""
    layout = Layout(masks=list(mask_files))
    masks = _MaskNames()
    for path, relative in mask_files:
        masks.add(path, "", _place(relative, "")[1])
    # Keys are texts taken from the relative paths: thousands of Path objects would cost more than all else here.
    named: defaultdict[_Key, list[Path]] = defaultdict(list)
    pictures: list[tuple[File, _Key, str]] = []
    for file in files:
        folder, stem, name = _place(file[1], root.prefix)
        suffix = os.path.splitext(name)[1].lower()
        if stem.lower().endswith(_CONDITIONING_ENDING):
            layout.refused.append(Refusal(file[1], "a conditioning picture of OneTrainer, which is not used"))
        elif suffix in CAPTION_SUFFIXES or (root.subset and suffix == root.subset.caption_suffix):
            layout.sidecars.append(file)
            if not why_no_caption(file[0], root):
                named[folder, stem].append(file[0])
        elif suffix in LIST_SUFFIXES:
            layout.lists.append(file)
        elif stem.lower().endswith(MASK_ENDING) or _mask_folder(folder) is not None:
            layout.masks.append(file)
            masks.add(file[0], folder, stem)
        else:
            pictures.append((file, (folder, stem), name))
    _order_sidecars(root, named)
    found = [masks.of_picture(key) for _, key, _ in pictures]
    layout.disputed = _disputed([key for _, key, _ in pictures], found)
    for ((path, relative), key, name), (sure, beside) in zip(pictures, found, strict=True):
        count, class_name = (1, root.subset.class_tokens) if root.subset else folder_repeats(key[0])
        sidecars = named.get(key, []) + named.get((key[0], name), [])
        own = [*sure, *(mask for mask in beside if mask not in layout.disputed)]
        repeats = count * root.repeats
        layout.candidates.append(
            Candidate(path, relative, root, repeats, class_name, tuple(sidecars), tuple(dict.fromkeys(own)))
        )
    return layout


def why_no_caption(path: Path, root: Root) -> str:
    """Return why no file of this name counts as a caption here: a Kohya file can say so; "" where it does."""
    subset = root.subset
    if subset is None:
        return ""
    if subset.metadata is not None:
        return f"{root.given.name} takes the captions from {subset.metadata.name}"
    if subset.caption_suffix and path.suffix.lower() != subset.caption_suffix:
        return f"{root.given.name} sets caption_extension = {subset.caption_suffix}"
    return ""


def _place(relative: str, prefix: str) -> tuple[str, str, str]:
    """Return the folder inside the root, the name without its extension, and the whole name."""
    folder, _, name = relative.removeprefix(prefix).rpartition("/")
    name = same_name(name)
    return folder, os.path.splitext(name)[0], name


def _order_sidecars(root: Root, named: Mapping[_Key, list[Path]]) -> None:
    order = [root.subset.caption_suffix] if root.subset and root.subset.caption_suffix else CAPTION_SUFFIXES
    for paths in named.values():
        if len(paths) > 1:
            paths.sort(key=lambda path: (order.index(path.suffix.lower()), path.name != path.name.lower(), path.name))


@lru_cache(maxsize=1024)
def _mask_folder(folder: str) -> int | None:
    """Return which part of a folder's path inside the root is the last that is named like one of masks."""
    parts = folder.split("/")
    return next((place for place in reversed(range(len(parts))) if parts[place].lower() in MASK_FOLDERS), None)


@lru_cache(maxsize=1024)
def _near_folders(folder: str) -> tuple[str, ...]:
    """Return the path with one of its parts left out, in each way, the last part first."""
    depth = len(folder.split("/")) if folder else 0
    return tuple(_without_part(folder, place) for place in reversed(range(depth)))


def _without_part(folder: str, place: int) -> str:
    parts = folder.split("/")
    return "/".join(parts[:place] + parts[place + 1 :])


class _MaskNames:
    """Masks by the folder and the name of the picture that they belong to."""

    def __init__(self) -> None:
        self._beside: defaultdict[_Key, list[Path]] = defaultdict(list)
        self._in_folder: defaultdict[_Key, list[Path]] = defaultdict(list)

    def add(self, path: Path, folder: str, stem: str) -> None:
        stem = stem[: -len(MASK_ENDING)] if stem.lower().endswith(MASK_ENDING) else stem
        place = _mask_folder(folder)
        if place is None:
            self._beside[folder, stem].append(path)
        else:
            self._in_folder[_without_part(folder, place), stem].append(path)

    def of_picture(self, key: _Key) -> tuple[list[Path], list[Path]]:
        """Return the masks that are the picture's for sure, and those in a folder beside its own or one further up."""
        sure = self._beside.get(key, []) + self._in_folder.get(key, [])
        if not self._in_folder:
            return sure, []
        near = [(folder, key[1]) for folder in _near_folders(key[0])]
        return sure, [mask for other in near for mask in self._in_folder.get(other, []) if mask not in sure]


def _disputed(pictures: Sequence[_Key], found: Sequence[tuple[list[Path], list[Path]]]) -> set[Path]:
    """Return the masks that are another picture's for sure, or could belong to pictures in several folders."""
    claims: defaultdict[Path, set[str]] = defaultdict(set)
    for (folder, _), (_, beside) in zip(pictures, found, strict=True):
        for mask in beside:
            claims[mask].add(folder)
    owned = {mask for sure, _ in found for mask in sure} if claims else set()
    return {mask for mask, folders in claims.items() if len(folders) > 1 or mask in owned}
