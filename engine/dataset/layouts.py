"""Which files of a dataset are pictures, captions and masks, in every layout that people have.

Captions lie beside their picture under the same name: `a.txt`, `a.caption`, `a.json` with a "caption" (ai-toolkit), or
the same after the whole name (`a.png.txt`); or in lists for many pictures (`caption_lists`). Masks are
`NAME-masklabel.png` beside the picture (OneTrainer), or have the picture's name in a folder `mask` or `masks`: below
the picture's folder, beside it, or one for a whole tree with the same folders inside (`masks/10_cat/a.png` for
`10_cat/a.png`). Folders named `10_name` repeat their pictures (Kohya); any other folders are only folders.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

from lorasmith.engine.dataset.caption_lists import is_list
from lorasmith.engine.dataset.folders import folder_repeats, same_name
from lorasmith.engine.dataset.items import Refusal
from lorasmith.engine.dataset.roots import Root

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Extensions of captions beside a picture in lower case, the preferred one first."""
MASK_ENDING = "-masklabel"
MASK_FOLDERS = ("mask", "masks")
_CONDITIONING_ENDING = "-condlabel"

File = tuple[Path, str]
_Key = tuple[Path, str]


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


def sort_files(root: Root, files: Sequence[File], mask_files: Sequence[File] = ()) -> Layout:
    """Return what the files of a root are; `mask_files` lie in the folder of masks that a Kohya file names."""
    layout = Layout(masks=list(mask_files))
    pictures: list[File] = []
    for file in files:
        path, relative = file
        if path.stem.lower().endswith(_CONDITIONING_ENDING):
            layout.refused.append(Refusal(relative, "a conditioning picture of OneTrainer, which is not used"))
        elif is_sidecar(path, root):
            layout.sidecars.append(file)
        elif is_list(path):
            layout.lists.append(file)
        elif path.stem.lower().endswith(MASK_ENDING) or _mask_folder(path.parent, root.folder) is not None:
            layout.masks.append(file)
        else:
            pictures.append(file)
    sidecars = _sidecars_by_name(root, layout.sidecars)
    masks = _MaskNames(root, layout.masks, {path for path, _ in mask_files})
    found = [masks.of_picture(path) for path, _ in pictures]
    layout.disputed = _disputed(pictures, found)
    repeats = cache(lambda folder: (1, "") if root.subset else folder_repeats(root.folder, folder))
    for (path, relative), (sure, beside) in zip(pictures, found, strict=True):
        count, class_name = repeats(path.parent)
        if root.subset:
            class_name = root.subset.class_tokens
        layout.candidates.append(
            Candidate(
                path,
                relative,
                root,
                count * root.repeats,
                class_name,
                tuple(sidecars[_key(path)] + sidecars[_whole_key(path)]),
                tuple(dict.fromkeys(mask for mask in sure + beside if mask in sure or mask not in layout.disputed)),
            )
        )
    return layout


def is_sidecar(path: Path, root: Root) -> bool:
    """Say whether the file's name is that of a caption beside a picture."""
    suffix = path.suffix.lower()
    return suffix in CAPTION_SUFFIXES or (root.subset is not None and suffix == root.subset.caption_suffix)


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


def _key(path: Path) -> _Key:
    return path.parent, same_name(path.stem)


def _whole_key(path: Path) -> _Key:
    return path.parent, same_name(path.name)


def _sidecars_by_name(root: Root, files: Iterable[File]) -> defaultdict[_Key, list[Path]]:
    named: defaultdict[_Key, list[Path]] = defaultdict(list)
    for path, _ in files:
        if not why_no_caption(path, root):
            named[_key(path)].append(path)
    order = [root.subset.caption_suffix] if root.subset and root.subset.caption_suffix else CAPTION_SUFFIXES
    for paths in named.values():
        paths.sort(key=lambda path: (order.index(path.suffix.lower()), path.name != path.name.lower(), path.name))
    return named


@lru_cache(maxsize=1024)
def _mask_folder(folder: Path, root: Path) -> int | None:
    """Return which part of the path from the root to a folder is the last that is named like one of masks."""
    parts = folder.relative_to(root).parts
    return next((place for place in reversed(range(len(parts))) if parts[place].lower() in MASK_FOLDERS), None)


@lru_cache(maxsize=1024)
def _near_folders(folder: Path, root: Path) -> tuple[Path, ...]:
    """Return `folder` with one part of its path below the root left out, in each way, the last part first."""
    depth = len(folder.relative_to(root).parts)
    return tuple(_without_part(root, folder, place) for place in reversed(range(depth)))


def _without_part(root: Path, folder: Path, place: int) -> Path:
    parts = folder.relative_to(root).parts
    return root.joinpath(*parts[:place], *parts[place + 1 :])


class _MaskNames:
    """Masks by the folder and the name of the picture that they belong to."""

    def __init__(self, root: Root, masks: Iterable[File], by_kohya: set[Path]) -> None:
        self._root = root
        self._beside: defaultdict[_Key, list[Path]] = defaultdict(list)
        self._in_folder: defaultdict[_Key, list[Path]] = defaultdict(list)
        for path, _ in masks:
            name = same_name(path.stem)
            labelled = name.lower().endswith(MASK_ENDING)
            name = name[: -len(MASK_ENDING)] if labelled else name
            if path in by_kohya:
                self._beside[root.folder, name].append(path)
                continue
            place = _mask_folder(path.parent, root.folder)
            if place is None:
                self._beside[path.parent, name].append(path)
            else:
                self._in_folder[_without_part(root.folder, path.parent, place), name].append(path)

    def of_picture(self, path: Path) -> tuple[list[Path], list[Path]]:
        """Return the masks that are the picture's for sure, and those in a folder beside its own or one further up."""
        folder, name = _key(path)
        sure = self._beside.get((folder, name), []) + self._in_folder.get((folder, name), [])
        if not self._in_folder:
            return sure, []
        near = _near_folders(folder, self._root.folder)
        return sure, [mask for other in near for mask in self._in_folder.get((other, name), []) if mask not in sure]


def _disputed(pictures: Sequence[File], found: Sequence[tuple[list[Path], list[Path]]]) -> set[Path]:
    """Return the masks that are nobody's for sure and could belong to pictures in several folders."""
    claims: defaultdict[Path, set[Path]] = defaultdict(set)
    for (path, _), (_, beside) in zip(pictures, found, strict=True):
        for mask in beside:
            claims[mask].add(path.parent)
    owned = {mask for sure, _ in found for mask in sure}
    return {mask for mask, folders in claims.items() if len(folders) > 1 or mask in owned}
