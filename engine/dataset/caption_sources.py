"""Which caption a picture has where there are several: the file beside it, then metadata.jsonl, then CSV.

Within one kind the order is that of `layouts.CAPTION_SUFFIXES` and `caption_lists.list_rank`. The class_tokens of a
Kohya file come last. A file that loses, or that no picture uses, is listed with the reason; nothing is merged.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorasmith.engine.dataset.caption_lists import (
    CaptionList,
    UnusableListError,
    list_rank,
    listing,
    read_json_caption,
    read_kohya_metadata,
    read_list,
)
from lorasmith.engine.dataset.captions import read_caption
from lorasmith.engine.dataset.folders import printable, same_name
from lorasmith.engine.dataset.items import CaptionSource, ImageItem, Refusal
from lorasmith.engine.dataset.layouts import Candidate, Layout, why_no_caption
from lorasmith.engine.dataset.roots import Root
from lorasmith.engine.errors import DatasetError


@dataclass(frozen=True)
class FoundCaptions:
    """The captions of one picture as they stand in their source, where they are from, and remarks for the user."""

    texts: tuple[str, ...] = ()
    path: Path | None = None
    source: CaptionSource = "none"
    notes: tuple[str, ...] = ()


@dataclass
class ListedCaptions:
    """What the caption lists of a root say, by the path of the picture; the list that counts comes first."""

    by_picture: defaultdict[Path, list[tuple[Path, tuple[str, ...]]]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)
    unusable: dict[Path, str] = field(default_factory=dict)


def read_lists(root: Root, layout: Layout) -> ListedCaptions:
    """Read the caption lists of a root and find the pictures that they name.

    Raises DatasetError where the `metadata_file` of a Kohya file cannot be used.
    """
    listed = ListedCaptions()
    if not layout.lists and (root.subset is None or root.subset.metadata is None):
        return listed
    names = _PictureNames(layout.candidates)
    if root.subset is not None and root.subset.metadata is not None:
        path = root.subset.metadata
        try:
            _match(read_kohya_metadata(path), path.name, root.folder, names, listed)
        except UnusableListError as error:
            raise DatasetError(f"{path} has no captions.", why=f"{error}.", fix=f"Correct {root.given.name}.") from None
        return listed
    for path, relative in sorted(layout.lists, key=lambda file: list_rank(file[0])):
        try:
            _match(read_list(path), relative, path.parent, names, listed)
        except UnusableListError as error:
            listed.unusable[path] = f"no caption list: {error}"
    return listed


def find_captions(candidate: Candidate, listed: ListedCaptions) -> FoundCaptions:
    """Return the captions of a picture, from the first source that has some."""
    notes: list[str] = []
    others = listed.by_picture.get(candidate.path, [])
    found: FoundCaptions | None = None
    for path in candidate.sidecars:
        text, note = read_json_caption(path) if path.suffix.lower() == ".json" else read_caption(path)
        if note:
            notes.append(f"caption {printable(path.name)}: {note}")
        if text is not None:
            found = FoundCaptions((text,), path, "sidecar")
            break
    if found is None and others:
        path, texts = others[0]
        found = FoundCaptions(texts, path, "metadata")
        others = others[1:]
        if not any(text.strip() for text in texts):
            notes.append(f"caption {printable(path.name)}: empty")
    tokens = candidate.root.subset.class_tokens if candidate.root.subset else ""
    if found is None and tokens:
        found = FoundCaptions((tokens,), None, "folder", (f"no caption: class_tokens of {candidate.root.given.name}",))
    found = found or FoundCaptions()
    for path, texts in others:
        if texts != found.texts:
            notes.append(f"has another caption in {printable(path.name)}, which is not used")
    return FoundCaptions(found.texts, found.path, found.source, (*found.notes, *notes))


def unused_captions(
    layout: Layout, listed: ListedCaptions, accepted: Mapping[Path, ImageItem], used: Iterable[Path]
) -> Iterator[Refusal]:
    """Yield a refusal for each caption file and caption list that no accepted picture (by its path) uses."""
    in_use = set(used)
    owners: defaultdict[Path, list[Candidate]] = defaultdict(list)
    for candidate in layout.candidates:
        for path in candidate.sidecars:
            owners[path].append(candidate)
    root = layout.candidates[0].root if layout.candidates else None
    for path, relative in layout.sidecars:
        if path not in in_use:
            ruled_out = why_no_caption(path, root) if root else ""
            yield Refusal(relative, ruled_out or _why_unused(path, owners[path], accepted))
    named: defaultdict[Path, list[Path]] = defaultdict(list)
    for picture, entries in listed.by_picture.items():
        for path, _ in entries:
            named[path].append(picture)
    for path, relative in layout.lists:
        if path not in in_use:
            yield Refusal(relative, _why_list_unused(path, root, listed, named[path], accepted))


def _why_unused(path: Path, owners: Sequence[Candidate], accepted: Mapping[Path, ImageItem]) -> str:
    items = [accepted[owner.path] for owner in owners if owner.path in accepted]
    if items:
        text, problem = read_json_caption(path) if path.suffix.lower() == ".json" else read_caption(path)
        other = items[0].caption_path
        return f"not used as a caption: {f'{printable(other.name)} is' if other and text is not None else problem}"
    if owners:
        return "caption of a picture that is not used"
    if path.suffix.lower() == ".json":
        return "neither a picture nor the caption of one with the same name"
    return "caption without a picture of the same name"


def _why_list_unused(
    path: Path, root: Root | None, listed: ListedCaptions, pictures: Sequence[Path], accepted: Mapping[Path, ImageItem]
) -> str:
    if root is not None and root.subset is not None and root.subset.metadata is not None:
        return why_no_caption(path, root)
    if path in listed.unusable:
        return listed.unusable[path]
    if any(picture in accepted for picture in pictures):
        return "caption list, not used: its pictures have captions elsewhere, which count first"
    return "caption list of pictures that are refused" if pictures else "caption list of pictures that are not there"


class _PictureNames:
    """Finds pictures by what a list calls them: a path, a path without extension, or a name that only one has."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._exact: dict[str, Path] = {}
        self._stems: defaultdict[str, list[Path]] = defaultdict(list)
        self._names: defaultdict[str, list[Path]] = defaultdict(list)
        for candidate in candidates:
            path = candidate.path
            self._exact[_normal(str(path))] = path
            self._stems[_normal(str(path.with_suffix("")))].append(path)
            self._names[same_name(path.name)].append(path)

    def find(self, folder: Path, name: str) -> list[Path]:
        for spelled in dict.fromkeys((name, name.replace("\\", "/"))):
            full = _normal(os.path.join(folder, spelled))
            if full in self._exact:
                return [self._exact[full]]
            if full in self._stems:
                return self._stems[full]
            named = self._names.get(same_name(os.path.basename(spelled)), [])
            below = [path for path in named if path.is_relative_to(folder)]
            if len(below) == 1:
                return below
        return []


def _normal(path: str) -> str:
    return same_name(os.path.normpath(path))


def _match(found: CaptionList, label: str, folder: Path, names: _PictureNames, listed: ListedCaptions) -> None:
    listed.notes += [f"{label}: {note}" for note in found.notes]
    lost = []
    for name, texts in found.captions.items():
        pictures = names.find(folder, name)
        if not pictures:
            lost.append(printable(name))
        for picture in pictures:
            _add(listed.by_picture[picture], found.path, texts)
    if lost:
        listed.notes.append(f"{label} names pictures that are not there ({len(lost)}): {listing(lost)}")


def _add(entries: list[tuple[Path, tuple[str, ...]]], path: Path, texts: Sequence[str]) -> None:
    """Add texts of a list to those of one picture; further names of the same picture in the same list add further."""
    if entries and entries[-1][0] == path:
        known = entries[-1][1]
        entries[-1] = (path, (*known, *(text for text in texts if text not in known)))
    else:
        entries.append((path, tuple(texts)))
